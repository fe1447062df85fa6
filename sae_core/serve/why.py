"""Why this token and not that one: the page, and the API behind it. Its script reads the state from the address."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import HTMLResponse

from sae_core.atlas import Atlas
from sae_core.circuits.answer import Answer, Held, Next, Question, answer, follows
from sae_core.errors import MindAtlasError
from sae_core.serve.live import MAX_CHARACTERS, Live, LiveError
from sae_core.serve.render import page
from sae_core.serve.shelf import ChosenAtlas, Shelf
from sae_core.serve.streams import in_time

if TYPE_CHECKING:
    from sae_core.prompt_reader import PromptReader

T = TypeVar("T", Answer, Next)
router = APIRouter()

MAX_PROMPT = MAX_CHARACTERS // 2
"""Characters of a prompt: the model runs on from the site once for every ablation."""
_LIMIT = 30  # features at tokens that are ablated
_HELD = 16  # features held at once
_STEPS = 32
_WORD = 100  # characters of a target


class WhyQuestion(BaseModel):
    """A prompt, and the two tokens between which the model chose."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    target: str = Field("", max_length=_WORD)
    """Its first token is the one that is asked about; left out, the likeliest."""
    against: str = Field("", max_length=_WORD)
    """Its first token is the one that it is held against; left out, the likeliest other."""
    compare: str = Field("", max_length=MAX_PROMPT)
    """A second prompt, about the same two tokens."""
    limit: int = Field(10, ge=1, le=_LIMIT)
    """Features at tokens that are told, and ablated."""
    steps: int = Field(0, ge=0, le=_STEPS)
    """Of integrated gradients; 0: the gradient alone."""
    dictionary: str = ""

    @property
    def question(self) -> Question:
        return Question(self.prompt, self.target, self.against, self.compare, self.limit, self.steps)


class HeldField(BaseModel):
    """A feature held at a strength, as requests say it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    feature: int
    strength: float = Field(0.0, allow_inf_nan=False)
    """In maxima of the feature over the corpus; 0 takes it away."""
    position: int | None = None
    """At this token; null: at all."""


class NextQuestion(BaseModel):
    """A prompt, and features that are held at strengths while the model reads it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    target: str = Field("", max_length=_WORD)
    against: str = Field("", max_length=_WORD)
    held: list[HeldField] = Field([], max_length=_HELD)
    dictionary: str = ""


@router.get("/why", response_class=HTMLResponse, include_in_schema=False)
def why_page(request: Request, atlas: ChosenAtlas) -> HTMLResponse:
    """The page."""
    return page(request, "why.html", dictionary=atlas.dictionary, max_prompt=MAX_PROMPT, most=_LIMIT, word=_WORD)


@router.post("/api/why", tags=["atlas"], responses={503: {"description": "No place is free."}})
async def why(request: Request, asked: WhyQuestion) -> Answer:
    """What the next token owes to each feature at each token of the prompt, the largest checked by ablation."""
    return await _made(request, asked.dictionary, lambda atlas, reader: answer(atlas, reader, asked.question))


@router.post("/api/why/next", tags=["atlas"], responses={503: {"description": "No place is free."}})
async def next_token(request: Request, asked: NextQuestion) -> Next:
    """What follows the prompt, as the model is and with features held."""
    held = [Held(one.feature, one.strength, one.position) for one in asked.held]
    question = Question(asked.prompt, asked.target, asked.against)
    return await _made(request, asked.dictionary, lambda atlas, reader: follows(atlas, reader, question, held))


async def _made(request: Request, dictionary: str, make: "Callable[[Atlas, PromptReader], T]") -> T:
    """Something that the model's thread makes, in time; what cannot be made of what was sent is a bad request."""
    shelf: Shelf = request.app.state.shelf
    live: Live = request.app.state.live
    atlas = shelf.atlas(dictionary)

    def items() -> Iterator[T]:
        yield make(atlas, live.reader(atlas))

    stream = live.start(items())
    try:
        (made,) = [item async for item in in_time(request, stream, live.seconds)]
    except LiveError:
        raise
    except MindAtlasError as error:
        raise LiveError(str(error), 400) from None
    finally:
        stream.close()
    return made
