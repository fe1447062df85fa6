"""The steering page: one prompt and three answers, token by token.

As the model is, steered, and asked in words for what the features stand for; all drawn with the same seed.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

import pyarrow.parquet as pq
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import HTMLResponse, Response

from sae_core.atlas import Atlas
from sae_core.labels.reader import doubted
from sae_core.serve.live import MAX_CHARACTERS, Live, LiveError
from sae_core.serve.render import page
from sae_core.serve.shapes import SteeredFeature, SteeredToken
from sae_core.serve.shelf import ChosenAtlas, Shelf
from sae_core.serve.streams import SteerField, event_stream, in_time
from sae_core.serve.views import names
from sae_core.steers import ABSURD, Method, Scope, Steer, cautions

if TYPE_CHECKING:
    from sae_core.generation import Token
    from sae_core.language_model import LanguageModel
    from sae_core.steering import Steering

router = APIRouter()

MAX_TOKENS = 512
_FEATURES = 16  # steered at once
_SUGGESTED = 6  # presets from the atlas
_WORDS = 3  # that stand for a feature without a label
_BRIEF = 34  # characters of a name on a button
_DEFAULT = 2.0  # strength where none was looked for
FORMULAS: dict[Method, str] = {
    "clamp": "x\u2032 = x + (s\u00b7m \u2212 f) d",
    "add": "x\u2032 = x + s\u00b7m\u00b7d",
    "scale": "x\u2032 = x + (s \u2212 1)\u00b7f\u00b7d",
    "min_clamp": "x\u2032 = x + (max(f, s\u00b7m) \u2212 f) d",
}
SCOPES: dict[Scope, str] = {
    "all": "all positions",
    "generated": "generated tokens only",
    "last_turn": "from the last user turn on",
    "no_special": "all but special tokens",
}


class SteerQuestion(BaseModel):
    """A prompt, and what is done to the model that answers it."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    steering: list[SteerField] = Field([], max_length=_FEATURES)
    scope: Scope = "all"
    max_tokens: int = Field(64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**31)
    dictionary: str = ""


@router.get("/steer", response_class=HTMLResponse, include_in_schema=False)
def steer_page(request: Request, atlas: ChosenAtlas) -> HTMLResponse:
    """The page; its script reads the state from the address."""
    presets = {**request.app.state.presets, **suggested(atlas)}
    return page(
        request, "steer.html", dictionary=atlas.dictionary, formulas=FORMULAS, scopes=SCOPES, absurd=ABSURD,
        methods=get_args(Method), max_characters=MAX_CHARACTERS, max_tokens=MAX_TOKENS,
        presets={name: [f"{s.feature}:{s.strength:g}:{s.method}" for s in steers] for name, steers in presets.items()},
    )  # fmt: skip


@router.get("/api/steer/{dictionary}/{feature}", tags=["atlas"])
def steered_feature(atlas: ChosenAtlas, feature: int) -> SteeredFeature:
    """What one wants to know of a feature before steering it."""
    card = atlas.feature(feature, neighbors=0)
    measured = card.steering or {}
    found = measured.get("suggested_strength")
    return SteeredFeature(
        **names(atlas, feature),
        is_dead=card.row.is_dead,
        max_act=card.row.max_act,
        strength=found or _DEFAULT,
        suggested_strength=found,
        output_score=measured.get("output_score"),
        role=measured.get("role") or "",
    )


@router.post("/api/steer/{dictionary}/{feature}/strength", tags=["atlas"])
async def look_for_strength(request: Request, atlas: ChosenAtlas, feature: int) -> SteeredFeature:
    """The same, with the largest strength up to which texts are fluent looked for now, on the live model."""
    live: Live = request.app.state.live
    known = steered_feature(atlas, feature)
    if known.is_dead:
        raise LiveError(f"feature {feature} is dead: it never fires on the corpus, so it has no strength", 400)
    steps = live.start(_strengths(live, atlas, feature))
    try:
        found = [strength async for strength in in_time(request, steps, live.seconds)][-1]
    finally:
        steps.close()
    return known.model_copy(update={"suggested_strength": found, "strength": found or known.strength})


def _strengths(live: Live, atlas: Atlas, feature: int) -> Iterator[float]:
    """In the model's thread."""
    from sae_core.steering_scores import search_strength  # torch, which nothing else here needs
    from sae_core.steering_texts import Subject

    settings = live.studies.order(atlas.dictionary).study.steering
    yield from search_strength(Subject.of(atlas, *live.ready(atlas)), feature, settings)


@router.post(
    "/api/steer",
    tags=["atlas"],
    responses={200: {"model": SteeredToken, "description": "An event."}, 503: {"description": "No place is free."}},
)
async def steer(request: Request, asked: SteerQuestion) -> Response:
    """Answers as server-sent events, one a token of each column in turn.

    The first event is another: `start` says which columns come, `notes` what one should know of the strengths, and
    `words` what the prompt of the last column begins with. An event `error` ends what cannot go on.
    """
    shelf: Shelf = request.app.state.shelf
    live: Live = request.app.state.live
    return await event_stream(request, live.start(_answers(live, shelf.atlas(asked.dictionary), asked)))


def suggested(atlas: Atlas) -> dict[str, tuple[Steer, ...]]:
    """The features of the best output scores that have a suggested strength, by name."""
    made = atlas.store.manifest("steering", atlas.dictionary) and atlas.store.get("steering", atlas.dictionary)
    if not made:
        return {}
    columns = ["feature", "output_score", "suggested_strength"]
    rows = pq.read_table(made.folder / "scores.parquet", columns=columns).to_pylist()
    best = sorted((r for r in rows if r["suggested_strength"]), key=lambda r: -r["output_score"])[:_SUGGESTED]
    named = ((r["feature"], r["suggested_strength"]) for r in best)
    return {f"{i} {_brief(atlas, i)}".strip(): (Steer(i, strength),) for i, strength in named}


def _brief(atlas: Atlas, feature: int) -> str:
    """The beginning of a feature's name, with all of its mark."""
    name = atlas.name(feature)
    short = name if len(name) <= _BRIEF else f"{name[: _BRIEF - 1]}…"
    return doubted(short, atlas.beats_control(feature))


def instruction(atlas: Atlas, steers: list[Steer]) -> str:
    """Words that ask for what is turned up; empty when nothing is."""
    up = [s.feature for s in steers if s.strength > (1 if s.method == "scale" else 0)]
    wanted = [words for feature in up if (words := _in_words(atlas, feature))]
    return f"In your answer, bring in: {'; '.join(wanted)}." if wanted else ""


def _in_words(atlas: Atlas, feature: int) -> str:
    """The written label; where there is none, words that the feature fires on."""
    card = atlas.feature(feature, neighbors=0)
    if written := (card.label or {}).get("label"):
        return str(written)
    words = [token.strip() for token in card.row.top_tokens if sum(map(str.isalnum, token)) >= 2]
    return f"words such as {', '.join(words[:_WORDS])}" if words else ""


def _answers(live: Live, atlas: Atlas, asked: SteerQuestion) -> Iterator[dict[str, Any]]:
    """In the model's thread."""
    from sae_core.generation import Sampling, read_prompt, stream  # torch, which nothing else here needs
    from sae_core.steering import Steering, max_acts

    lm, dictionary = live.ready(atlas)
    steers = [field.steer for field in asked.steering]
    steering = Steering(atlas.site, dictionary, steers, max_acts(atlas), sink_norm=atlas.sink_norm, scope=asked.scope)
    words = instruction(atlas, steers)
    prompts = {"default": asked.prompt, "steered": asked.prompt} | (
        {"words": f"{words} {asked.prompt}"} if words else {}
    )
    sampling = Sampling(asked.max_tokens, asked.temperature, seed=asked.seed)
    streams = {
        name: _watched(
            lm,
            steering,
            stream(
                lm,
                read_prompt(lm, [{"role": "user", "content": text}]),
                sampling,
                steering if name == "steered" else None,
            ),
        )
        for name, text in prompts.items()
    }
    notes = cautions(atlas, steers)
    if not lm.tokenizer.chat_template:
        notes.append("the model has no chat template: it completes the prompt as plain text")
    yield {"start": list(streams), "notes": notes, "words": words}
    while streams:
        for name in list(streams):
            if (told := next(streams[name], None)) is None:
                del streams[name]
            else:
                yield {"column": name, **told}


def _watched(lm: "LanguageModel", steering: "Steering", tokens: "Iterator[Token]") -> Iterator[dict[str, Any]]:
    """The tokens, with what the steered features had on the token before each."""
    before: list[float] = []

    def look(x: Any) -> Any:
        before[:] = steering.acts(x)[0, -1].tolist()
        return x

    while True:
        with lm.edit(steering.site.hook, steering.site.layer, look):
            token = next(tokens, None)
        if token is None:
            return
        yield {"text": token.text, "logprob": token.logprob, "finish": token.finish, "before": [*before]}
