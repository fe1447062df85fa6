"""The application: pages, JSON API and static files behind one door."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import duckdb
import pyarrow as pa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from sae_core.artifacts import ArtifactError, ArtifactStore
from sae_core.atlas import Atlas, SearchError
from sae_core.circuits.reader import NoCircuitError
from sae_core.errors import MindAtlasError
from sae_core.features.reader import FeatureError
from sae_core.names import SlugError
from sae_core.serve import api, circuits, contrast, labeling, pages, reports, steer, why
from sae_core.serve.door import LOOPBACK, Door
from sae_core.serve.live import Live, LiveError
from sae_core.serve.map import prepare as prepare_map
from sae_core.serve.map import router as map_router
from sae_core.serve.monitor_api import monitor_api
from sae_core.serve.openai_api import Presets, openai_api
from sae_core.serve.render import page
from sae_core.serve.shelf import Shelf
from sae_core.serve.views import NotFoundError
from sae_core.steers import SteeringError
from sae_core.studies import Studies

_STATUS: dict[type[MindAtlasError], int] = {
    ArtifactError: 404, FeatureError: 404, NotFoundError: 404, NoCircuitError: 404, SlugError: 404, SearchError: 400,
    SteeringError: 400,
}  # fmt: skip
"""The answer to each error; any other that a user can mend is 500."""

_DAMAGED = (pa.ArrowInvalid, duckdb.InvalidInputException)
"""What pyarrow and DuckDB say of a file that is not the Parquet its name tells."""


def create_app(
    store: ArtifactStore,
    dictionary: str = "",
    studies: Studies | None = None,
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    token: str = "",
    presets: Presets | None = None,
    label: labeling.Command | None = None,
) -> FastAPI:
    """The atlas as a web application.

    Args:
        store: where the artifacts are.
        dictionary: the dictionary that is meant when a request names none; without one, the newest finished.
        studies: what says which language model an atlas describes; without it, own texts cannot be tested.
        hosts: names under which the server may be asked for, which keeps other sites' pages from reaching it by a
            name of their own; empty for any.
        token: what every request must bring; empty for none.
        presets: steered models by name, for clients of OpenAI's API and the steering page.
        label: what writes labels of chosen features; without it, none can be asked for here.
    """
    shelf = Shelf(store, dictionary)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=_prepare, args=(shelf,), daemon=True).start()  # pages are there meanwhile
        yield

    app = FastAPI(
        title="Mind Atlas", description=api.DESCRIPTION, openapi_url="/api/openapi.json", docs_url=None, redoc_url=None,
        lifespan=running,
    )  # fmt: skip
    app.state.shelf = shelf
    app.state.live = live = Live(studies or Studies([]))
    app.state.presets = presets or {}
    app.state.labeling = labeling.Labeling(label)
    app.add_middleware(Door, hosts=hosts, token=token)
    app.include_router(pages.router)
    app.include_router(map_router)
    app.include_router(steer.router)
    app.include_router(reports.router)
    app.include_router(contrast.router)
    app.include_router(labeling.router)
    app.include_router(why.router)
    app.include_router(circuits.router)
    app.include_router(api.router)
    app.include_router(monitor_api(shelf, live))
    app.include_router(openai_api(shelf.atlas, live, presets))
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    app.add_exception_handler(MindAtlasError, _mendable)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    for vanished in (FileNotFoundError, duckdb.IOException):
        app.add_exception_handler(vanished, _vanished)
    for damaged in _DAMAGED:
        app.add_exception_handler(damaged, _damaged)
    return app


def _prepare(shelf: Shelf) -> None:
    """Have ready what the first search and the first visitor of the map would else wait for, as far as it is made."""
    for prepare in (Atlas.open_indexes, prepare_map):
        with suppress(MindAtlasError, OSError, duckdb.IOException, *_DAMAGED):  # told to whoever asks for it
            prepare(shelf.atlas())


def _mendable(request: Request, error: Exception) -> Response:
    if isinstance(error, LiveError):
        return _answer(request, error.status, str(error))
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    return _answer(request, status, str(error))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(request, error.status_code, "there is no such page" if error.status_code == 404 else error.detail)


def _invalid(request: Request, error: Exception) -> Response:
    """What a person mistyped in an address is a page that is not there; a program is told which field is wrong."""
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    path = any(e["loc"][0] == "path" for e in error.errors())
    return _answer(request, 404 if path else 422, wrong)


def _vanished(request: Request, error: Exception) -> Response:
    """A file went while it was read: the stage was made anew, and its old folder dropped."""
    return _answer(request, 503, "this part of the atlas is being made anew: reload the page")


def _damaged(request: Request, error: Exception) -> Response:
    """What a table holds is no table: a disk's fault, or a hand's."""
    return _answer(request, 500, f"a file of this atlas cannot be read ({error}): `mind-atlas verify` names it")


def _answer(request: Request, status: int, message: str) -> Response:
    """The error as JSON to programs, as a page that helps to people."""
    message = message.encode("utf-8", "replace").decode()
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": message}, status)
    return page(request, "error.html", status=status, code=status, message=message)
