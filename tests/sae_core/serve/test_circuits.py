"""Circuits as pages and as JSON."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.circuits.reader import read_circuit
from sae_core.serve import create_app

SLUG = "tiny-circuits.mini"


@pytest.fixture(scope="module")
def client(circuit_store: Path) -> TestClient:
    return TestClient(create_app(ArtifactStore(circuit_store)), base_url="http://127.0.0.1")


def test_the_list_says_how_faithful_each_circuit_is(client: TestClient, circuit_store: Path):
    (line,) = client.get("/api/circuits").json()
    assert line["slug"] == SLUG
    assert line["nodes"] == len(read_circuit(ArtifactStore(circuit_store), SLUG).nodes)
    assert f'href="/circuits/{SLUG}"' in client.get("/circuits").text


def test_a_circuit_can_be_read_without_a_script(client: TestClient, circuit_store: Path):
    circuit, text = read_circuit(ArtifactStore(circuit_store), SLUG), client.get(f"/circuits/{SLUG}").text
    for node in circuit.nodes:
        assert f"{node.effect:+.3f}" in text
    assert text.count("<tr>") == 3 + len(circuit.nodes) + len(circuit.edges) + len({p.nodes for p in circuit.curve})


def test_the_api_gives_it_as_json_and_as_an_attribution_graph(client: TestClient):
    told, graph = (
        client.get(f"/api/circuits/{SLUG}").json(),
        client.get(f"/api/circuits/{SLUG}?format=attribution-graph").json(),
    )
    assert all("label" in node for node in told["nodes"])
    assert len(graph["nodes"]) == len(told["nodes"]) + 1
    assert client.get(f"/api/circuits/{SLUG}?format=other").status_code == 422


def test_what_is_not_there_is_said_with_what_is(client: TestClient, tiny_atlas: Path):
    answer = client.get("/api/circuits/none.such")
    assert answer.status_code == 404
    assert SLUG in answer.json()["detail"]
    with TestClient(create_app(ArtifactStore(tiny_atlas)), base_url="http://127.0.0.1") as one:
        assert "two sites or more" in one.get("/circuits").text
        assert one.get("/api/circuits").json() == []
        assert 'href="/circuits"' not in one.get("/").text
