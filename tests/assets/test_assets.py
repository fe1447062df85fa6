"""Every asset, materialized by Dagster on a real (tiny) model: made, cached, re-made when a setting changes."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.run import ASSETS
from sae_core.artifacts import ArtifactStore
from sae_core.checks import CHECKS
from sae_core.features import Features
from sae_core.labels import Labels
from sae_core.stages import VERSIONS

STAGES = list(VERSIONS)


def slug(stage: str) -> str:
    study = STUDIES.get("tiny")
    if stage == "corpus":
        return study.corpus.name
    return study.site.slug if stage == "activations" else study.spec(study.dictionaries[0]).slug


def materialize(stage: str, root: Path, **config: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        ASSETS,
        selection=[stage],
        partition_key=slug(stage),
        resources={"workshop": Workshop(root=str(root), device="cpu")},
        run_config={"ops": {stage: {"config": config}}},
        raise_on_error=False,
    )


def told(result: dg.ExecuteInProcessResult, stage: str) -> dict[str, Any]:
    assert result.success, result.get_step_failure_events()
    event = result.asset_materializations_for_node(stage)[0]
    return {key: getattr(value, "value", value) for key, value in event.metadata.items()}


@pytest.fixture(scope="module")
def root(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which every stage of the tiny study has been materialized once."""
    root = tmp_path_factory.mktemp("store")
    for stage in STAGES:
        assert told(materialize(stage, root), stage)["cached"] is False
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_made_is_cached_and_keeps_its_data_version(root: Path, stage: str):
    before = ArtifactStore(root).get(stage, slug(stage)).manifest
    result = materialize(stage, root)
    assert told(result, stage)["cached"] is True
    assert ArtifactStore(root).get(stage, slug(stage)).manifest == before
    tags = result.asset_materializations_for_node(stage)[0].tags
    assert tags["dagster/data_version"] == before.fingerprint


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reports_its_numbers_and_every_check(root: Path, stage: str):
    result = materialize(stage, root)
    metadata = told(result, stage)
    assert Path(metadata["folder"]).is_dir()
    assert metadata["settings"] == ArtifactStore(root).get(stage, slug(stage)).manifest.settings
    evaluated = {e.check_name: e for e in result.get_asset_check_evaluations()}
    assert evaluated.keys() == {check.name for check in CHECKS[stage]}
    assert all("wanted" in e.description for e in evaluated.values())


def test_curves_and_tables_are_there_to_look_at(root: Path):
    assert told(materialize("dictionary", root), "dictionary")["fvu_curve"].startswith("![fvu](data:image/svg+xml")
    assert len(told(materialize("dictionary", root), "dictionary")["fvu_curve"]) < 1000
    assert "data:image/png" in told(materialize("feature_map", root), "feature_map")["map"]
    (source,) = told(materialize("corpus", root), "corpus")["sources"].records
    assert source.data["documents"] > 0


def test_a_setting_changed_in_the_launchpad_remakes_that_stage_alone(root: Path):
    assert told(materialize("neighbors", root, count=3), "neighbors")["cached"] is False
    assert told(materialize("neighbors", root, count=3), "neighbors")["cached"] is True
    assert told(materialize("feature_map", root), "feature_map")["cached"] is True
    status = ArtifactStore(root).status(STUDIES.order(slug("neighbors")).recipe("neighbors", slug("neighbors")))
    assert status == ("stale", "count: made with 3, now 20")
    assert told(materialize("neighbors", root), "neighbors")["cached"] is True  # the served atlas still has them


def test_again_makes_what_is_there_and_gets_the_same_bytes(root: Path):
    before = ArtifactStore(root).get("neighbors", slug("neighbors")).manifest.files
    assert told(materialize("neighbors", root, again=True), "neighbors")["cached"] is False
    assert ArtifactStore(root).get("neighbors", slug("neighbors")).manifest.files == before


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        ("dictionary", {"lr_warmup": 0.9, "lr_decay": 0.9}, "must not overlap"),
        ("neighbors", {"count": 0}, "greater than or equal to 1"),
        ("activations", {"sink_norm": 0.5}, "sink_norm = 0.5: Input should be greater than 1"),
        ("activations", {"precision": "float8"}, "bfloat16"),
    ],
)
def test_a_bad_launchpad_value_fails_in_words_and_loses_nothing(root: Path, stage: str, config: dict, message: str):
    before = ArtifactStore(root).get(stage, slug(stage)).manifest
    result = materialize(stage, root, **config)
    assert not result.success
    failure = result.get_step_failure_events()[0].event_specific_data
    assert message in str(failure)
    assert ArtifactStore(root).get(stage, slug(stage)).manifest == before


def test_a_stage_whose_parent_is_missing_says_which(tiny_study: Path, tmp_path: Path):
    result = materialize("activations", tmp_path)
    assert not result.success
    assert "corpus of tiny is not made yet" in str(result.get_step_failure_events()[0].event_specific_data)


def test_run_config_is_typed_and_described(tiny_study: Path):
    job = dg.Definitions(assets=ASSETS, resources={"workshop": Workshop()}).resolve_implicit_global_asset_job_def()
    schema = job.get_node_named("dictionary").definition.config_schema.config_type.fields
    assert {"again", "lr", "tokens", "seed"} <= schema.keys()
    assert not {"d_sae", "k", "architecture"} & schema.keys()  # the partition's name says them
    assert all(field.description for field in schema.values())
    assert "Peak learning rate" in schema["lr"].description


def test_the_safety_audit_is_made_on_demand_and_a_lost_concept_fails_its_check(root: Path):
    config = {"concepts": ["citation_surnames"]}
    result = materialize("safety", root, **config)
    assert "citation_surnames" in told(result, "safety")["report"]
    assert kept(result).passed
    store, name = ArtifactStore(root), slug("safety")
    path = root / "safety" / name / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["summary"]["names_found"] = ["citation_surnames"]
    path.write_text(json.dumps(manifest), "utf-8")
    again = materialize("safety", root, again=True, **config)
    summary = store.get("safety", name).manifest.summary
    found = "citation_surnames" in summary["names_found"]
    assert kept(again).passed == found
    assert summary["n_lost"] == (0 if found else 1)


def kept(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    return next(e for e in result.get_asset_check_evaluations() if e.check_name == "kept")


@pytest.fixture
def label_writer(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A server that writes labels: the `config` of a run that asks it, and the requests that it is to `fail`."""
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("sae_core.labels.client.RETRIES", 0)
    monkeypatch.setattr(dg.RetryPolicy, "calculate_delay", lambda self, attempt: 0.05)
    server: dict[str, Any] = {"n": 0, "fail": range(0), "keys": set()}

    def answer(request: Request) -> Response:
        server["n"] += 1
        server["keys"].add(request.headers["Authorization"])
        if server["n"] in server["fail"]:
            return Response("{}", 500)
        message = {"role": "assistant", "content": json.dumps({"label": f"thing {server['n']}"})}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return Response(json.dumps(body), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    server["config"] = {"base_url": httpserver.url_for("/v1"), "model": "m", "concurrency": 1}
    return server


def alive(root: Path) -> list[int]:
    table = Features.open(ArtifactStore(root).get("features", slug("features")).folder).table()
    return [row["feature"] for row in table.to_pylist() if not row["is_dead"]]


def names(root: Path) -> dict[int, str]:
    rows = Labels.open(ArtifactStore(root).get("labels", slug("labels")).folder).rows()
    return {row.feature: row.label for row in rows if row.status == "written"}


def test_chosen_features_are_labeled_beside_the_others_and_stay_so(root: Path, label_writer: dict[str, Any]):
    config = label_writer["config"] | {"features": 3}
    told(materialize("labels", root, **config), "labels")
    manifest, before = ArtifactStore(root).get("labels", slug("labels")).manifest, names(root)
    assert len(before) == 3
    chosen = [feature for feature in alive(root) if feature not in before][:2]
    assert told(materialize("labels", root, **config, only=chosen), "labels")["n_labeled"] == 5
    after = names(root)
    assert after.keys() == before.keys() | set(chosen)
    assert before.items() <= after.items()
    now = ArtifactStore(root).get("labels", slug("labels")).manifest
    assert (now.fingerprint, now.settings) == (manifest.fingerprint, manifest.settings)
    assert now.folder != manifest.folder
    assert told(materialize("labels", root, **config), "labels")["cached"] is True
    assert names(root) == after


def test_chosen_features_of_labels_that_are_not_up_to_date_are_refused(root: Path, label_writer: dict[str, Any]):
    told(materialize("labels", root), "labels")
    result = materialize("labels", root, **label_writer["config"], only=alive(root)[:1])
    failure = str(result.get_step_failure_events()[0].event_specific_data)
    assert "is not up to date (base_url: made with" in failure
    assert "mind-atlas run" in failure
    assert label_writer["n"] == 0


def test_labels_of_a_server_that_stops_midway_are_tried_again_and_nothing_is_bought_twice(
    root: Path, label_writer: dict[str, Any]
):
    label_writer["fail"] = range(4, 9)
    result = materialize("labels", root, **label_writer["config"], features=10, scorers=["embedding"])
    assert told(result, "labels")["n_labeled"] == 10
    assert [event.event_type_value for event in result.all_events].count("STEP_UP_FOR_RETRY") == 1
    assert label_writer["n"] == 10 + 5


def test_a_server_that_never_answers_is_not_asked_again(root: Path, label_writer: dict[str, Any]):
    label_writer["fail"] = range(1, 100)
    result = materialize("labels", root, **label_writer["config"], features=11)
    assert not result.success
    assert label_writer["n"] == 5


def test_the_key_may_come_from_dagster_and_is_written_nowhere(
    root: Path, label_writer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TEAM_KEY", "sk-very-secret")
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        result = dg.materialize(
            ASSETS, selection=["labels"], partition_key=slug("labels"), instance=instance,
            resources={"workshop": Workshop(root=str(root), device="cpu", api_key=dg.EnvVar("TEAM_KEY"))},
            run_config={"ops": {"labels": {"config": label_writer["config"] | {"features": 2}}}},
        )  # fmt: skip
        assert label_writer["keys"] == {"Bearer sk-very-secret"}
        assert told(result, "labels")["dollars"].startswith("unknown")
        written = [file for folder in (root, tmp_path) for file in folder.rglob("*") if file.is_file()]
        assert any(file.name == "attempts.jsonl" for file in written)
        assert not [file for file in written if b"very-secret" in file.read_bytes()]
