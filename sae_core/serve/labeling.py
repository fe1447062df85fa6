"""Labels for chosen features, asked for in the browser: a page to start it, and what came of it so far.

The server itself writes nothing. It starts a process of its own that does what `mind-atlas label` does: it makes the
labels anew beside those that are served, within the study's budget, and readers see them when they are whole.
"""

import hmac
import json
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Annotated, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.serve.render import page
from sae_core.serve.shapes import View
from sae_core.serve.shelf import ChosenAtlas
from sae_core.serve.views import NotFoundError, names
from sae_core.studies import Studies

router = APIRouter()

MOST = 50
"""Features at once."""
_DIGITS = 12  # of a number
Command = Callable[[str, Sequence[int]], list[str]]
"""Program and arguments that label features of a dictionary. It prints progress as lines of JSON: `done`, `total` and
`unit`; and, when it fails, one line on standard error that says why."""


class LabelingError(MindAtlasError):
    """Labels that are not written, because of what was asked or when."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer."""


class LabelingView(View):
    """The labeling that was asked for last."""

    dictionary: str = ""
    features: list[int] = Field(default=[])
    """Empty when none was asked for."""
    running: bool = False
    done: int = 0
    total: int = 0
    unit: str = ""
    """What is counted: bytes while a local model is fetched, then `labels`, `scored`, `judged`."""
    error: str = ""
    """Why it failed."""


class Labeling:
    """Starts what labels features, one at a time, and follows it.

    Args:
        command: what to start; None where features cannot be labeled.
    """

    def __init__(self, command: Command | None) -> None:
        self.command = command
        self.key = secrets.token_urlsafe()
        """What a form must send back: a page of another site cannot know it."""
        self.now = LabelingView()
        self._lock = threading.Lock()

    def start(self, dictionary: str, features: Sequence[int]) -> None:
        """Begin to label features. Raises LabelingError when others are being labeled."""
        if self.command is None:
            raise LabelingError("this server writes no labels: `mind-atlas label` does", 403)
        with self._lock:
            if self.now.running:
                raise LabelingError(f"{len(self.now.features)} features are being labeled: wait for these", 409)
            self.now = LabelingView(dictionary=dictionary, features=list(features), running=True)
        threading.Thread(target=self._run, args=(self.command(dictionary, features),), daemon=True).start()

    def _run(self, command: list[str]) -> None:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
            try:
                with subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    encoding="utf-8",
                    errors="replace",
                ) as process:
                    for line in process.stdout or ():
                        self._tell(**_progress(line))
                error = _last_line(complaints) if process.returncode else ""
            except OSError as failure:
                error = f"{command[0]} cannot be started: {failure.strerror}"
        self._tell(running=False, error=error)

    def _tell(self, **news: Any) -> None:
        with self._lock:
            self.now = self.now.model_copy(update=news)


def _progress(line: str) -> dict[str, Any]:
    """What a line of progress says; nothing where it is none."""
    try:
        said = json.loads(line)
        return {"done": int(said["done"]), "total": int(said["total"]), "unit": str(said["unit"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    lines = file.read().split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")
    return said.removeprefix("mind-atlas: ")[:500]


@router.get("/api/label", tags=["atlas"])
def labeling(request: Request) -> LabelingView:
    """How far the labeling is that was asked for last."""
    now: LabelingView = request.app.state.labeling.now
    return now


@router.get("/label", response_class=HTMLResponse, include_in_schema=False)
def label_page(
    request: Request, atlas: ChosenAtlas, feature: Annotated[list[int], Query(default_factory=list)]
) -> HTMLResponse:
    """Features to be labeled, and a button; those that are being labeled, and how far that is."""
    return _page(request, atlas, feature)


@router.post("/label", response_class=HTMLResponse, include_in_schema=False)
async def label(request: Request, atlas: ChosenAtlas) -> Response:
    """Begin, and go to the page that shows how far it is; or say what is wrong."""
    form = parse_qs((await request.body()).decode("utf-8", "replace"))
    work: Labeling = request.app.state.labeling
    if not hmac.compare_digest(form.get("key", [""])[0].encode(), work.key.encode()):
        return _page(request, atlas, [], LabelingError("this page is from before the server's start: reload it", 403))
    numbers = (text for text in form.get("feature", []) if text.isdecimal() and len(text) < _DIGITS)
    features = list(dict.fromkeys(map(int, numbers)))
    try:
        if not 0 < len(features) <= MOST:
            raise LabelingError(f"{len(features)} features were chosen: choose 1 to {MOST}", 400)
        if dead := [feature for feature in features if atlas.features.feature(feature).is_dead]:
            raise LabelingError(f"feature {dead[0]} never fires: there is nothing to name it by", 400)
        work.start(atlas.dictionary, features)
    except LabelingError as error:
        return _page(request, atlas, features[:MOST], error)
    asked = [("dictionary", atlas.dictionary), *(("feature", str(feature)) for feature in features)]
    return RedirectResponse(f"/label?{urlencode(asked)}", 303)


def _page(request: Request, atlas: Atlas, features: Sequence[int], error: LabelingError | None = None) -> HTMLResponse:
    work: Labeling = request.app.state.labeling
    if work.command is None:
        raise NotFoundError("this server writes no labels: `mind-atlas label --feature N` does")
    now, chosen = work.now, list(dict.fromkeys(features))[:MOST]
    if now.dictionary != atlas.dictionary or (chosen and chosen != now.features):
        now = LabelingView(running=now.running)  # nothing of these, but that others are under way
    chosen = chosen or now.features
    for feature in chosen:
        atlas.features.feature(feature)  # refuses one that is not there
    return page(
        request, "label.html", status=error.status if error else 200, dictionary=atlas.dictionary, now=now,
        features=[names(atlas, feature) for feature in chosen], key=work.key, error=str(error or ""),
        writer=_writer(request.app.state.live.studies, atlas.dictionary), here=str(request.url.query),
    )  # fmt: skip


def _writer(studies: Studies, dictionary: str) -> str:
    """Who would write the labels, and what it may cost; never more of an address than its host."""
    if not (order := studies.dictionaries.get(dictionary)):
        return ""
    settings = order.study.labels
    where = f"at {urlsplit(settings.base_url).hostname}" if settings.base_url else "on this machine"
    dollars = f"for at most ${settings.max_dollars:g}" if settings.max_dollars is not None else ""
    requests = f"in at most {settings.max_requests} requests" if settings.max_requests is not None else ""
    return " ".join(filter(None, (settings.model, where, dollars, requests)))
