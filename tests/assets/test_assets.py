"""Every asset, materialized by Dagster on a real (tiny) model: made, cached, re-made when a setting changes."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.run import ASSETS
from sae_core.artifacts import ArtifactStore
from sae_core.checks import CHECKS

STAGES = ["corpus", "activations", "dictionary", "features", "neighbors", "feature_map", "labels"]


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
    assert told(materialize("neighbors", root), "neighbors")["cached"] is False


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
    (kept,) = result.get_asset_check_evaluations()
    assert kept.passed
    store, name = ArtifactStore(root), slug("safety")
    path = root / "safety" / name / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["summary"]["names_found"] = ["citation_surnames"]
    path.write_text(json.dumps(manifest), "utf-8")
    again = materialize("safety", root, again=True, **config)
    summary = store.get("safety", name).manifest.summary
    (kept,) = again.get_asset_check_evaluations()
    assert kept.passed == ("citation_surnames" in summary["names_found"])
    assert summary["n_lost"] == (0 if kept.passed else 1)
