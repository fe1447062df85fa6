"""The exported attribution graph, field for field, against its schema as written down here.

Fields, their types and which may be null are facts of circuit-tracer's `frontend/graph_models.py`, schema version 1, at
its commit 196e2ce; which values a node of each kind has is what its constructors there make.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_core.artifacts import ArtifactStore
from sae_core.circuits.export import attribution_graph
from sae_core.circuits.reader import ERROR, Circuit, CircuitEdge, CircuitNode, labels_of, read_circuit, read_graph
from sae_core.language_model import LanguageModel

SLUG = "tiny-circuits.mini"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class GraphMetadata(Strict):
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float | None
    schema_version: Literal[1]


class Shown(Strict):
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class GraphNode(Strict):
    node_id: str
    feature: int
    layer: str = Field(pattern=r"^(E|\d+)$")
    ctx_idx: int = Field(ge=0)
    feature_type: Literal["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]
    token_prob: float = Field(ge=0, le=1)
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    jsNodeId: str
    clerp: str
    influence: float | None
    activation: float | None


class Link(Strict):
    source: str
    target: str
    weight: float = Field(allow_inf_nan=False)


class Graph(Strict):
    metadata: GraphMetadata
    qParams: Shown
    nodes: list[GraphNode]
    links: list[Link]


def cantor(x: int, y: int) -> int:
    """By counting along the diagonals, and not by the formula."""
    return sum(range(x + y + 1)) + y


@pytest.fixture(scope="module")
def circuit(circuit_store: Path) -> Circuit:
    return read_circuit(ArtifactStore(circuit_store), SLUG)


@pytest.fixture(scope="module")
def told(circuit_store: Path, circuit: Circuit) -> dict[str, Any]:
    store = ArtifactStore(circuit_store)
    return read_graph(store, SLUG, labels_of(store, circuit))


def check(told: dict[str, Any]) -> Graph:
    """Of the schema, with ids of its own for each node, and links whose ends are there and lead forward."""
    graph = Graph.model_validate(told)
    by_id = {node.node_id: node for node in graph.nodes}
    assert len(by_id) == len(graph.nodes) == len({node.jsNodeId for node in graph.nodes})
    for link in graph.links:
        assert {link.source, link.target} <= by_id.keys()
    assert len({(link.source, link.target) for link in graph.links}) == len(graph.links)
    assert all(node.ctx_idx < len(graph.metadata.prompt_tokens) for node in graph.nodes)
    assert set(graph.qParams.pinnedIds) <= by_id.keys()
    return graph


def test_the_graph_is_of_the_schema_and_every_link_has_both_ends(told: dict[str, Any], circuit: Circuit):
    graph = check(told)
    by_id = {node.node_id: node for node in graph.nodes}
    layers = [(int(by_id[link.source].layer), int(by_id[link.target].layer)) for link in graph.links]
    assert layers
    assert all(source < target for source, target in layers)
    assert [link.weight for link in graph.links] == [edge.weight for edge in circuit.edges]


def test_nodes_of_each_kind_have_the_values_that_their_kind_has(
    told: dict[str, Any], circuit: Circuit, lm: LanguageModel
):
    graph = check(told)
    *inner, output = graph.nodes
    for node, known in zip(inner, circuit.nodes, strict=True):
        layer = circuit.places[known.place].layer
        assert (node.node_id, node.layer) == (f"{layer}_{known.feature}_{node.ctx_idx}", str(layer))
        if known.feature == ERROR:
            assert (node.feature, node.feature_type, node.activation) == (-1, "mlp reconstruction error", None)
            assert node.jsNodeId == f"{layer}_-1-{node.ctx_idx}"
        else:
            assert (node.feature, node.feature_type) == (cantor(layer, known.feature), "cross layer transcoder")
            assert (node.jsNodeId, node.activation) == (f"{layer}_{known.feature}-0", known.act)
        assert (node.token_prob, node.is_target_logit) == (0, False)
    assert {node.feature_type for node in inner} == {"cross layer transcoder", "mlp reconstruction error"}
    target = lm.tokenizer(circuit.prompts[0][1]).input_ids[0]
    assert (output.feature_type, output.is_target_logit, output.feature) == ("logit", True, target)
    assert output.layer == str(lm.n_layers + 1)
    assert output.node_id == f"{lm.n_layers + 1}_{target}_{output.ctx_idx}"
    assert output.jsNodeId == f"L_{target}-{output.ctx_idx}"
    assert output.clerp.endswith(f"(p={output.token_prob:.3f})")
    assert "".join(graph.metadata.prompt_tokens) == graph.metadata.prompt == circuit.prompts[0][0]


def test_a_field_too_many_or_too_few_or_of_another_type_would_be_seen(told: dict[str, Any]):
    node, *rest = told["nodes"]
    for spoiled in (
        {key: value for key, value in node.items() if key != "jsNodeId"}, node | {"layer": 3}, node | {"more": 1},
        node | {"token_prob": None},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            check(told | {"nodes": [spoiled, *rest]})
    with pytest.raises(AssertionError):
        check(told | {"nodes": rest})


def test_two_dictionaries_at_one_layer_keep_their_nodes_apart(circuit: Circuit, lm: LanguageModel):
    first, second = circuit.places[0], replace(circuit.places[1], hook="mlp_out", layer=circuit.places[0].layer)
    nodes = [CircuitNode(place, feature, 0.1, 1.0, 1.0) for place in (0, 1) for feature in (5, ERROR)]
    edges = [CircuitEdge(0, 5, 1, 5, 0.1), CircuitEdge(1, 5, -1, -1, 0.2), CircuitEdge(0, ERROR, 1, ERROR, 0.3)]
    both = replace(circuit, places=[first, second], nodes=nodes, edges=edges)
    graph = check(attribution_graph(both, lm, lm.tokenizer(circuit.prompts[0][0]).input_ids))
    assert [link.source.split("_")[1] for link in graph.links] == ["5", "5", "-1"]
    assert len({node.layer for node in graph.nodes}) == 2
