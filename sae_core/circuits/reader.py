"""Circuits that were made, as the command line, the API and the pages read them. Light: no torch."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sae_core.artifacts import ArtifactStore, Made
from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.names import Hook
from sae_core.stages import PER_STUDY

CIRCUIT, GRAPH = "circuit.json", "graph.json"
"""All that is told of a circuit, and the same in the format of attribution graphs."""
ERROR = -1
"""In place of a feature's number: what the dictionary misses."""


class NoCircuitError(MindAtlasError):
    """A circuit that was not made; the message says how it is."""


@dataclass(frozen=True)
class CircuitPlace:
    """One dictionary."""

    dictionary: str
    reads_hook: Hook
    reads_layer: int
    hook: Hook
    layer: int
    """Where its features act."""


@dataclass(frozen=True)
class CircuitNode:
    """A feature, or what a dictionary misses (-1), over all tokens."""

    place: int
    feature: int
    effect: float
    """In logits, in the mean over prompts; above 0 it speaks for the target."""
    act: float
    """Its largest activation in a prompt, in the mean; of an error, its norm."""
    prompts: float
    """Share of the prompts in which it fires."""


@dataclass(frozen=True)
class CircuitEdge:
    """What one node does through another; the target (-1, -1) is what is explained."""

    source_place: int
    source_feature: int
    target_place: int
    target_feature: int
    weight: float


@dataclass(frozen=True)
class CircuitPoint:
    """Faithfulness of a circuit of some size; see `faithfulness.Point`."""

    kind: str
    nodes: int
    faithfulness: float
    low: float
    high: float


@dataclass(frozen=True)
class Circuit:
    """All that is told of a circuit."""

    slug: str
    task: str
    description: str
    places: list[CircuitPlace]
    prompts: list[list[str]]
    """Text, target and other token of those that the model gets right; the first `found_on` find the circuit."""
    found_on: int
    right: float
    """Share of the task's prompts that the model gets right."""
    aligned: float
    """Share of the pairs whose prompts have as many tokens."""
    paired: bool
    """Whether prompts are held against a contrast, and not against the mean."""
    steps: int
    nodes: list[CircuitNode]
    edges: list[CircuitEdge]
    curve: list[CircuitPoint]
    ends: dict[str, float]
    """`full` and `empty`: the mean difference of logits of the model as it is and with everything at its mean;
    `errors_alone` and `features_alone`: the faithfulness of all errors, and of all features."""
    notes: list[str]

    def as_json(self, labels: dict[tuple[int, int], str]) -> dict[str, Any]:
        """All of it, the nodes with their labels."""
        told = asdict(self)
        for node in told["nodes"]:
            node["label"] = labels[node["place"], node["feature"]]
        return told


def circuits(store: ArtifactStore) -> list[str]:
    """Names of the circuits that were made by this version of the program."""
    found = ((slug, store.manifest("circuit", slug)) for slug in store.slugs("circuit"))
    return [slug for slug, manifest in found if manifest and manifest.version == PER_STUDY["circuit"]]


def made_circuit(store: ArtifactStore, slug: str) -> Made:
    """The artifact. Raises NoCircuitError when there is none."""
    if slug not in (known := circuits(store)):
        told = f"made are {', '.join(known)}" if known else "`mind-atlas circuit STUDY` makes those of a study"
        raise NoCircuitError(f"there is no circuit {slug!r}: {told}")
    return store.get("circuit", slug)


def read_circuit(store: ArtifactStore, slug: str) -> Circuit:
    """A circuit. Raises NoCircuitError when it was not made."""
    told = json.loads((made_circuit(store, slug).folder / CIRCUIT).read_text("utf-8"))
    kinds = {"places": CircuitPlace, "nodes": CircuitNode, "edges": CircuitEdge, "curve": CircuitPoint}
    return Circuit(**told | {key: [kind(**row) for row in told[key]] for key, kind in kinds.items()})


def read_graph(store: ArtifactStore, slug: str, labels: dict[tuple[int, int], str]) -> dict[str, Any]:
    """A circuit in the format of attribution graphs, its nodes with their labels; see `export`."""
    made = made_circuit(store, slug)
    graph: dict[str, Any] = json.loads((made.folder / GRAPH).read_text("utf-8"))
    nodes = read_circuit(store, slug).nodes  # in the same order; the output comes after them
    for told, node in zip(graph["nodes"], nodes, strict=False):
        told["clerp"] = labels[node.place, node.feature]
    return graph


def labels_of(store: ArtifactStore, circuit: Circuit) -> dict[tuple[int, int], str]:
    """What each node is called now, by place and feature."""
    dictionaries = [place.dictionary for place in circuit.places]
    return labels(store, dictionaries, [(node.place, node.feature) for node in circuit.nodes])


def labels(
    store: ArtifactStore, dictionaries: Sequence[str], keys: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], str]:  # fmt: skip
    """What features are called, by number of their dictionary and their own; those that do no better than a control's
    are marked. Empty before labels are made."""
    there = [Atlas(store, slug) if store.manifest("features", slug) else None for slug in dictionaries]

    def name(place: int, feature: int) -> str:
        atlas = there[place]
        return "what the dictionary misses" if feature == ERROR else atlas.shown(feature) if atlas else ""

    return {key: name(*key) for key in keys}
