"""Circuits as pages and as JSON: a graph that a script draws, tables without one, and tasks without some nodes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import HTMLResponse, Response

from sae_core.circuits.edit import Edit, edited
from sae_core.circuits.reader import circuits, labels_of, read_circuit, read_graph
from sae_core.serve.live import Live, LiveError
from sae_core.serve.render import page
from sae_core.serve.shapes import View
from sae_core.serve.shelf import Shelf
from sae_core.serve.streams import event_stream

router = APIRouter(responses={404: {"description": "There is no such circuit."}})

_NODES = 1000  # taken out at once


class CircuitLine(View):
    """A circuit that was made."""

    slug: str
    task: str
    description: str
    nodes: int
    edges: int
    faithfulness: float
    """Of its nodes, alone."""
    random: float
    """Of as many features at random with the same errors."""


class NodeField(BaseModel):
    """A node of a circuit, as requests say it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    place: int
    """Number of the dictionary, in the order of a forward pass."""
    feature: int
    """-1 for what the dictionary misses."""


class AblateQuestion(BaseModel):
    """Nodes of a circuit that are taken out."""

    model_config = ConfigDict(extra="forbid")
    nodes: list[NodeField] = Field(min_length=1, max_length=_NODES)


@router.get("/api/circuits", tags=["atlas"])
def circuits_list(request: Request) -> list[CircuitLine]:
    """The circuits that were made."""
    shelf: Shelf = request.app.state.shelf
    found = []
    for slug in circuits(shelf.store):
        told, summary = read_circuit(shelf.store, slug), shelf.store.get("circuit", slug).manifest.summary
        measured = {key: summary[key] for key in ("nodes", "edges", "faithfulness", "random")}
        found.append(CircuitLine(slug=slug, task=told.task, description=told.description, **measured))
    return found


@router.get("/api/circuits/{slug}", tags=["atlas"])
def circuit(request: Request, slug: str, format: Literal["json", "attribution-graph"] = "json") -> dict[str, Any]:
    """A circuit with its nodes' labels; all that is known, or in the format of attribution graphs."""
    shelf: Shelf = request.app.state.shelf
    found = read_circuit(shelf.store, slug)
    labels = labels_of(shelf.store, found)
    return read_graph(shelf.store, slug, labels) if format == "attribution-graph" else found.as_json(labels)


@router.post(
    "/api/circuits/{slug}/ablate",
    tags=["atlas"],
    responses={200: {"model": Edit, "description": "An event."}, 503: {"description": "No place is free."}},
)
async def ablate(request: Request, slug: str, asked: AblateQuestion) -> Response:
    """The task, and held-out text, without nodes of its circuit, beside as many others at random.

    As server-sent events, one after each pass of the model: each tells all that is known so far, the last one all.
    An event `error` ends what cannot go on.
    """
    shelf: Shelf = request.app.state.shelf
    live: Live = request.app.state.live
    read_circuit(shelf.store, slug)
    if (order := live.studies.circuits.get(slug)) is None:
        raise LiveError(f"no study file here says what model {slug} is of: start the server where its study is", 404)
    study, keys = order.study, {(node.place, node.feature) for node in asked.nodes}

    def told() -> Iterator[dict[str, Any]]:
        for known in edited(shelf.store, study, slug, keys, lambda: live.model(study.model)):
            yield asdict(known)

    return await event_stream(request, live.start(told()), live.seconds)


@router.get("/circuits", response_class=HTMLResponse, include_in_schema=False)
def circuits_page(request: Request) -> HTMLResponse:
    """What there is."""
    return page(request, "circuits.html", found=circuits_list(request))


@router.get("/circuits/{slug}", response_class=HTMLResponse, include_in_schema=False)
def circuit_page(request: Request, slug: str) -> HTMLResponse:
    """One circuit."""
    shelf: Shelf = request.app.state.shelf
    found = read_circuit(shelf.store, slug)
    labels = labels_of(shelf.store, found)
    curve: dict[int, dict[str, float]] = {}
    for point in found.curve:
        curve.setdefault(point.nodes, {})[point.kind] = point.faithfulness
    return page(request, "circuit.html", circuit=found, labels=labels, curve=sorted(curve.items()))
