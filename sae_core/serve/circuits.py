"""Circuits as pages and as JSON: a graph that a script draws, and the same as tables without one."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from sae_core.circuits.reader import circuits, labels_of, read_circuit, read_graph
from sae_core.serve.render import page
from sae_core.serve.shapes import View
from sae_core.serve.shelf import Shelf

router = APIRouter(responses={404: {"description": "There is no such circuit."}})


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
