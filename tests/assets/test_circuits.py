"""The circuit of a study's task, made by Dagster: once, checked, and again when the task changes."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.run import ASSETS
from sae_core.artifacts import ArtifactStore
from sae_core.circuits.reader import labels_of, read_circuit, read_graph
from sae_core.stages import recipes
from sae_core.studies import Order

SLUG = "tiny-circuits.mini"


def materialize(root: Path, **config: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        ASSETS, selection=["circuit"], partition_key=SLUG, raise_on_error=False,
        resources={"workshop": Workshop(root=str(root), device="cpu")},
        run_config={"ops": {"circuit": {"config": config}}},
    )  # fmt: skip


def test_a_circuit_that_is_made_is_cached_and_its_checks_are_told(circuit_store: Path):
    result = materialize(circuit_store)
    assert result.success
    metadata = result.asset_materializations_for_node("circuit")[0].metadata
    assert metadata["cached"].value is True
    assert "| nodes | circuit |" in metadata["report"].md_str
    verdicts = {e.check_name: e.passed for e in result.get_asset_check_evaluations()}
    assert verdicts.keys() == {"adds_up", "beats_random"}
    assert verdicts["adds_up"]


def test_a_study_asks_for_a_circuit_of_each_task_after_all_else_and_else_for_none(circuit_store: Path):
    study = STUDIES.get("tiny-circuits")
    *_, last = recipes(study)
    assert (last.stage, last.slug) == ("circuit", SLUG)
    assert [p.stage for p in last.parents] == ["activations", "dictionary"] * 2
    assert ArtifactStore(circuit_store).status(last).state == "made"
    assert "circuit" not in {recipe.stage for recipe in recipes(STUDIES.get("tiny"), on_demand=True)}


def test_another_task_or_setting_makes_the_circuit_stale_and_the_pace_of_its_folder_does_not(
    circuit_store: Path, tmp_path: Path
):
    study, store = STUDIES.get("tiny-circuits"), ArtifactStore(circuit_store)
    file = Path(study.circuits.folder) / "mini.toml"
    (tmp_path / "mini.toml").write_text(file.read_text("utf-8"), "utf-8")
    moved = Order(study, None).override("circuits", {"folder": str(tmp_path)})
    assert store.status(moved.recipe("circuit", SLUG)).state == "made"
    (tmp_path / "mini.toml").write_text(file.read_text("utf-8").replace("Anything", "Something"), "utf-8")
    assert store.status(moved.recipe("circuit", SLUG)).state == "stale"
    fewer = Order(study, None).override("circuits", {"nodes": 3})
    assert store.status(fewer.recipe("circuit", SLUG)).state == "stale"


def test_tables_json_and_attribution_graph_say_the_same(circuit_store: Path):
    store = ArtifactStore(circuit_store)
    circuit, made = read_circuit(store, SLUG), store.get("circuit", SLUG)
    nodes, edges = (pq.read_table(made.folder / f"{name}.parquet").to_pylist() for name in ("nodes", "edges"))
    assert 0 < len(circuit.nodes) <= 12
    assert [(n["place"], n["feature"]) for n in nodes if n["kept"]] == [(n.place, n.feature) for n in circuit.nodes]
    assert len(nodes) == made.manifest.summary["nodes_that_fire"] > 12
    assert [e["weight"] for e in edges] == [e.weight for e in circuit.edges]
    labels = labels_of(store, circuit)
    assert labels.keys() == {(n.place, n.feature) for n in circuit.nodes}
    graph = read_graph(store, SLUG, labels)
    assert graph.keys() == {"metadata", "qParams", "nodes", "links"}
    ids = {node["node_id"] for node in graph["nodes"]}
    assert len(ids) == len(graph["nodes"]) == len(circuit.nodes) + 1
    assert {link[end] for link in graph["links"] for end in ("source", "target")} <= ids
    assert [link["weight"] for link in graph["links"]] == [e.weight for e in circuit.edges]
    assert sum(node["is_target_logit"] for node in graph["nodes"]) == 1
    assert json.loads((made.folder / "circuit.json").read_text("utf-8"))["curve"][0]["faithfulness"] == 0


def test_a_task_that_the_model_cannot_do_is_said_in_one_line(circuit_store: Path, lm_network: Any):
    from sae_core.circuits.build import ask
    from sae_core.circuits.network import CircuitError
    from sae_core.circuits.tasks import Task

    few = Task(name="few", description="x", prompts=[("The old bridge", " the", " a")])
    with pytest.raises(CircuitError, match=r"of 1 prompts the model gets [01] right, and a circuit wants 4"):
        ask(lm_network, few)
    same = Task(name="same", description="x", prompts=[("The old bridge", " the", " the")])
    with pytest.raises(CircuitError, match="asks for nothing"):
        ask(lm_network, same)
    long = Task(name="long", description="x", prompts=[("The old bridge", " zzzqx", " a")] * 1)
    with pytest.raises(CircuitError):
        ask(lm_network, long)


@pytest.fixture(scope="module")
def lm_network(circuit_store: Path) -> Any:
    from sae_core.circuits.network import Network, places_of
    from sae_core.language_model import LanguageModel

    study = STUDIES.get("tiny-circuits")
    lm = LanguageModel.load(study.model, precision="float32")
    return Network(lm, places_of(ArtifactStore(circuit_store), study, lm.device))


def test_prompts_are_split_in_two_and_pairs_stay_together(lm_network: Any):
    from sae_core.circuits.build import ask
    from sae_core.circuits.tasks import Task

    texts = ["The old bridge", "The lazy dog", "Rain fell on", "She measured the", "A planet turns", "The quick brown"]
    prompts = []
    for text in texts:
        first = " the" if _likes(lm_network, text) else " a"
        prompts.append((text, first, " a" if first == " the" else " the"))
    asked = ask(lm_network, Task(name="all", description="x", prompts=prompts))
    assert (asked.right, len(asked.find), len(asked.test)) == (1, 3, 3)
    assert [one.prompt.text for one in asked.find] == texts[::2]
    assert all(one.contrast is None for one in (*asked.find, *asked.test))


def _likes(network: Any, text: str) -> bool:
    from sae_core.circuits.build import _is_right, read_prompt
    from sae_core.circuits.tasks import Prompt

    return _is_right(network, read_prompt(network, Prompt(text, " the", " a"), []))
