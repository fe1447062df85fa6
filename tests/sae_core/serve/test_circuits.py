"""Circuits as pages and as JSON, and tasks without nodes of theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sae_core.artifacts import ArtifactStore
from sae_core.circuits.reader import read_circuit
from sae_core.serve import create_app
from sae_core.studies import Studies, study_folders

SLUG = "tiny-circuits.mini"


@pytest.fixture(scope="module")
def client(circuit_store: Path) -> TestClient:
    app = create_app(ArtifactStore(circuit_store), studies=Studies.load(*study_folders()))
    return TestClient(app, base_url="http://127.0.0.1")


def test_the_list_says_how_faithful_each_circuit_is(client: TestClient, circuit_store: Path):
    (line,) = client.get("/api/circuits").json()
    assert line["slug"] == SLUG
    assert line["nodes"] == len(read_circuit(ArtifactStore(circuit_store), SLUG).nodes)
    assert f'href="/circuits/{SLUG}"' in client.get("/circuits").text


def test_a_circuit_can_be_read_without_a_script(client: TestClient, circuit_store: Path):
    circuit, text = read_circuit(ArtifactStore(circuit_store), SLUG), client.get(f"/circuits/{SLUG}").text
    for node in circuit.nodes:
        assert f"{node.effect:+.3f}" in text
    assert text.count("<tr>") == 5 + len(circuit.nodes) + len(circuit.edges) + len({p.nodes for p in circuit.curve})


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


def ablate(client: TestClient, *nodes: dict[str, Any], **options: Any) -> Any:
    return client.post(f"/api/circuits/{SLUG}/ablate", json={"nodes": [*nodes]}, **options)


def test_a_task_without_a_node_is_told_pass_by_pass(client: TestClient):
    node, *_ = client.get(f"/api/circuits/{SLUG}").json()["nodes"]
    answer = ablate(client, {"place": node["place"], "feature": node["feature"]})
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert [known["done"] for known in told] == list(range(2, told[-1]["total"] + 1))
    assert told[0]["before"]["loss"] is None
    assert told[-1]["after"]["loss"] > 0
    assert told[-1]["after"]["difference"] != told[-1]["before"]["difference"]
    assert all(one["before"] > 0 for one in told[-1]["prompts"])


@pytest.mark.parametrize(
    ("nodes", "status", "why"),
    [
        ([], 422, "at least 1 item"),
        ([{"place": 0, "feature": 1}] * 1001, 422, "at most 1000"),
        ([{"place": 9, "feature": 1}], 400, "has no node ?:1"),
        ([{"place": 0, "feature": -2}], 400, "has no node"),
        ([{"place": 0}], 422, "Field required"),
        ([{"place": 0, "feature": 1, "strength": 2}], 422, "Extra inputs"),
    ],
)
def test_nodes_that_cannot_be_taken_out_are_refused(client: TestClient, nodes: list[Any], status: int, why: str):
    answer = ablate(client, *nodes)
    assert answer.status_code == status
    assert why in answer.json()["detail"]


def test_other_sites_and_unknown_circuits_are_refused_and_a_full_house_says_so(client: TestClient, circuit_store: Path):
    assert ablate(client, {"place": 0, "feature": 1}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    missing = client.post("/api/circuits/none.such/ablate", json={"nodes": [{"place": 0, "feature": 1}]})
    assert (missing.status_code, SLUG in missing.json()["detail"]) == (404, True)
    unknown = TestClient(create_app(ArtifactStore(circuit_store)), base_url="http://127.0.0.1")
    assert "no study file here says" in ablate(unknown, {"place": 0, "feature": 1}).json()["detail"]
    turns = client.app.state.live._turns  # type: ignore[attr-defined]
    places, turns._places = turns._places, 0
    assert ablate(client, {"place": 0, "feature": 1}).status_code == 503
    turns._places = places


def test_an_answer_that_does_not_come_in_time_is_said(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    node, *_ = client.get(f"/api/circuits/{SLUG}").json()["nodes"]
    monkeypatch.setattr(client.app.state.live, "seconds", 0.001)  # type: ignore[attr-defined]
    answer = ablate(client, {"place": node["place"], "feature": node["feature"]})
    assert answer.status_code == 504
    assert "no answer within 0.001 s" in answer.json()["detail"]


def test_the_shape_of_the_events_is_documented(client: TestClient):
    paths = client.get("/api/openapi.json").json()["paths"]
    answer = paths["/api/circuits/{slug}/ablate"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["$ref"].endswith("/Edit")
