"""Two sets of prompts, and the features that tell them apart: a page that needs no JavaScript, and its API."""

from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import parse_qs

import numpy as np
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, ValidationError
from starlette.responses import HTMLResponse

from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.serve.live import MAX_CHARACTERS, Live, LiveError
from sae_core.serve.render import page
from sae_core.serve.shapes import Named, Near, View
from sae_core.serve.shelf import ChosenAtlas, Shelf
from sae_core.serve.streams import in_time
from sae_core.serve.views import names

router = APIRouter()

MAX_PROMPTS = 200
"""A side."""
MAX_ALL = 10 * MAX_CHARACTERS
"""Characters of all prompts."""
_PIECE = 16  # prompts read between two turns of others
_LIMIT = 10
_SIDES = ("positive", "negative")
_NO_TEST = "an angle is no test: whether a feature tells unseen prompts apart, the ranking by activations says"
By = Literal["activations", "difference", "probe"]
RANKED: dict[By, str] = {
    "activations": "how well they tell the sets apart",
    "difference": "the angle to the difference of the means",
    "probe": "the angle to a linear probe",
}
Prompt = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class ContrastQuestion(View):
    """Prompts of two kinds."""

    model_config = ConfigDict(extra="forbid")
    positive: list[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS)
    negative: list[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS)
    by: By = "activations"
    """What features are ranked by."""
    limit: int = Field(_LIMIT, ge=1, le=100)
    dictionary: str = ""


class Separates(Named):
    """A feature that tells the sets apart."""

    pool: str
    """Over tokens: `max` or `mean`."""
    find_auc: float
    p: float
    """Chance of `find_auc` without a difference, corrected for all features and both pools."""
    effect: float
    """Cohen's d on the prompts that find."""
    active: tuple[float, float]
    """Share of the positives, and of the negatives, on which it fires at all."""
    auc: float | None
    """On prompts that played no part in finding; null when there are too few to keep some apart."""
    low: float | None
    high: float | None


class ContrastView(View):
    """What was found."""

    by: By
    features: list[Separates]
    """Best first, by activations."""
    near: list[Near]
    """Best first, by a direction."""
    exclusive: list[Named]
    """Active on all positives that find, and on no negative."""
    prompts: dict[str, int]
    duplicates: int
    windowed: int
    """Prompts longer than the context, read in windows."""
    tried: int
    """Features and pools that were compared."""
    claim: str
    """What was shown; or that nothing is claimed, and why."""


@router.post("/api/contrast", tags=["atlas"], responses={503: {"description": "No place is free."}})
async def contrast(request: Request, asked: ContrastQuestion) -> ContrastView:
    """The features that best tell the positives from the negatives: chosen on half of the prompts, judged on the rest.

    Duplicates, and prompts on both sides, are left out and counted. Below 40 prompts a side in each half nothing is
    claimed.
    """
    shelf: Shelf = request.app.state.shelf
    live: Live = request.app.state.live
    characters = sum(map(len, [*asked.positive, *asked.negative]))
    if characters > MAX_ALL:
        raise LiveError(f"the prompts have {characters:,} characters: give at most {MAX_ALL:,} in all", 413)
    items = live.start(_compared(live, shelf.atlas(asked.dictionary), asked))
    try:
        *_, found = [item async for item in in_time(request, items, live.seconds)]
    except LiveError:
        raise
    except MindAtlasError as error:  # of the prompts: what was sent is wrong
        raise LiveError(str(error), 400) from None
    finally:
        items.close()
    assert isinstance(found, ContrastView), "what was found comes last"
    return found


@router.get("/contrast", response_class=HTMLResponse, include_in_schema=False)
def contrast_page(request: Request, atlas: ChosenAtlas) -> HTMLResponse:
    """Two empty boxes."""
    return _page(request, atlas, {})


@router.post("/contrast", response_class=HTMLResponse, include_in_schema=False)
async def contrast_answer(request: Request, atlas: ChosenAtlas) -> HTMLResponse:
    """The boxes as they were sent, and what tells them apart; or what was wrong with them."""
    form = {key: values[0] for key, values in parse_qs((await request.body()).decode("utf-8", "replace")).items()}
    sides = {side: [line for line in form.get(side, "").splitlines() if line.strip()] for side in _SIDES}
    try:
        asked = ContrastQuestion.model_validate(
            {**sides, "by": form.get("by", "activations"), "dictionary": atlas.dictionary}
        )
        return _page(request, atlas, form, found=await contrast(request, asked))
    except ValidationError as error:
        wrong = error.errors()[0]
        return _page(request, atlas, form, error=f"{wrong['loc'][0]}: {wrong['msg']}", status=400)
    except LiveError as error:
        return _page(request, atlas, form, error=str(error), status=error.status)


def _page(
    request: Request, atlas: Atlas, form: dict[str, str], found: ContrastView | None = None, error: str = "",
    status: int = 200,
) -> HTMLResponse:  # fmt: skip
    return page(
        request, "contrast.html", status=status, dictionary=atlas.dictionary, form=form, found=found, error=error,
        ranked=RANKED, max_prompts=MAX_PROMPTS, max_characters=MAX_ALL,
    )  # fmt: skip


def _compared(live: Live, atlas: Atlas, asked: ContrastQuestion) -> "Iterator[int | ContrastView]":
    """How many prompts were read, now and then; at last what was found. In the model's thread."""
    from sae_core import prompt_search as search  # torch, which nothing else here needs
    from sae_core.prompt_reader import joined

    sets = search.split_prompts(asked.positive, asked.negative)
    texts, reader, parts = sets.texts, live.reader(atlas), []
    for at in range(0, len(texts), _PIECE):
        parts.append(reader.pool(texts[at : at + _PIECE]))
        yield at
    pooled = joined(parts)
    found = search.contrast_of(atlas, sets, pooled, asked.limit)
    features, near, claim = found.features, [], found.claim
    if asked.by != "activations":
        raw = [pooled.raw[np.concatenate(sets.places[side::2])] for side in (0, 1)]  # find and test alike
        near = search.nearest(atlas, reader, search.direction(raw[0], raw[1], asked.by), asked.limit)
        features, claim = [], _NO_TEST
    yield ContrastView(
        by=asked.by,
        features=[Separates.model_validate(feature, from_attributes=True) for feature in features],
        near=[Near(**row._asdict()) for row in near],
        exclusive=[Named(**names(atlas, i)) for i in found.exclusive[: asked.limit]],
        prompts=found.prompts,
        duplicates=found.duplicates,
        windowed=found.windowed,
        tried=found.tried,
        claim=claim,
    )
