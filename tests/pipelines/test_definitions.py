import re
from pathlib import Path

import dagster as dg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.definitions import build_defs, defs
from pipelines.run import bring_up_to_date, plan
from pipelines.schedules import SCHEDULES
from sae_core import training
from sae_core.artifacts import ArtifactStore
from sae_core.notify import notify
from sae_core.stages import ON_DEMAND, PER_STUDY, VERSIONS
from sae_core.studies import Studies


def test_definitions_load_and_every_stage_is_an_asset():
    dg.Definitions.validate_loadable(defs)
    keys = {key.to_user_string() for key in defs.resolve_all_asset_keys()}
    assert keys == set(VERSIONS) | set(ON_DEMAND) | set(PER_STUDY)


def test_every_asset_has_a_description_a_group_a_kind_and_a_check():
    specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
    graph = defs.resolve_asset_graph()
    for name, spec in specs.items():
        assert spec.description, name
        assert spec.group_name != "default", name
        assert spec.kinds, name
        assert graph.get_check_keys_for_assets({spec.key}), name


def test_lineage_runs_from_the_corpus_to_the_labels():
    graph = defs.resolve_asset_graph()
    nodes = {key.to_user_string(): graph.get(key) for key in graph.get_all_asset_keys()}
    parents = {name: {parent.to_user_string() for parent in node.parent_keys} for name, node in nodes.items()}
    assert parents["activations"] == {"corpus"}
    assert parents["dictionary"] == {"activations", "corpus"}
    assert parents["features"] == {"dictionary", "activations", "corpus"}
    assert parents["labels"] == {"features", "neighbors"}
    assert parents["steering"] == {"activations", "dictionary", "features"}
    assert parents["steering_report"] == parents["steering"] | {"steering", "corpus", "labels"}
    assert parents["neighbors"] == parents["feature_map"] == {"dictionary"}
    assert parents["atlas"] == set(VERSIONS) - {"atlas"}
    assert parents["multilingual"] == {"features"}
    assert parents["safety"] == {"features", "steering"}
    assert parents["circuit"] == {"activations", "dictionary"}
    assert parents["behaviors"] == {"features", "safety"}
    assert parents["scaling"] == {"activations"}
    assert parents["science"] == {"scaling", "activations", "corpus"}


def test_what_is_made_on_demand_is_no_part_of_the_job_that_makes_a_dictionary():
    job = defs.resolve_job_def("make_dictionary")
    made = {key.to_user_string() for key in job.asset_layer.selected_asset_keys}
    assert made == set(VERSIONS) - {"corpus", "activations"}


def test_a_dictionary_hangs_on_its_own_site_and_a_site_on_its_own_corpus(tiny_study: Path):
    graph = defs.resolve_asset_graph()
    study = STUDIES.get("tiny")
    slug = study.spec(study.dictionaries[0]).slug
    with dg.DagsterInstance.ephemeral() as instance:
        for child, parent, key, expected in (
            ("dictionary", "activations", slug, study.site.slug),
            ("dictionary", "corpus", slug, "tiny"),
            ("activations", "corpus", study.site.slug, "tiny"),
        ):
            mapping = graph.get_partition_mapping(dg.AssetKey(child), dg.AssetKey(parent))
            upstream, downstream = (graph.get(dg.AssetKey(name)).partitions_def for name in (parent, child))
            with dg.partition_loading_context(dynamic_partitions_store=instance):
                mapped = mapping.get_upstream_mapped_partitions_result_for_partitions(
                    downstream.subset_with_partition_keys([key]), downstream, upstream
                )
            assert list(mapped.partitions_subset.get_partition_keys()) == [expected]


def test_fresh_definitions_take_a_workshop_of_their_own(tmp_path: Path):
    own = build_defs(Workshop(root=str(tmp_path)))
    assert own is not defs
    assert own.resources["workshop"].root == str(tmp_path)


def test_every_study_has_a_schedule_of_its_own_that_passes_over_what_was_never_made(workshop: Workshop):
    assert {s.cron_schedule for s in SCHEDULES} == {"0 3 * * 1"}
    assert len(SCHEDULES) == len(STUDIES.by_name)
    schedule = defs.resolve_schedule_def("retrain_tiny")
    assert schedule.job_name == "build_atlas"
    context = dg.build_schedule_context(resources={"workshop": workshop})
    assert "never made" in schedule.evaluate_tick(context).skip_message
    with dg.DagsterInstance.ephemeral() as instance:
        list(bring_up_to_date(STUDIES.get("tiny"), workshop, instance, until="dictionary"))
    (request,) = schedule.evaluate_tick(context).run_requests
    assert request.run_config == {"ops": {"study_up_to_date": {"config": {"study": "tiny"}}}}


@pytest.fixture
def workshop(tiny_study: Path, tmp_path: Path) -> Workshop:
    return Workshop(root=str(tmp_path / "store"), device="cpu")


def test_bringing_a_study_up_to_date_makes_each_stage_once_and_then_runs_nothing(workshop: Workshop):
    study = STUDIES.get("tiny")
    with dg.DagsterInstance.ephemeral() as instance:
        first = list(bring_up_to_date(study, workshop, instance))
        runs = instance.get_runs()
        assert {step.status.state for step in first} == {"missing"}
        assert len(runs) == len(first) == len(VERSIONS)
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        assert {step.status.state for step in bring_up_to_date(study, workshop, instance)} == {"made"}
        assert len(instance.get_runs()) == len(runs)
    assert {step.status.state for step in plan(study, workshop.store)} == {"made"}


def test_the_dictionaries_of_a_study_are_trained_from_one_read(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    learned: list[list[int]] = []

    def recorded(trainings: list[training.Training], source: training.Activations):
        learned.append([t.n_steps - t.done for t in trainings])
        return together(trainings, source)

    together = training.together
    monkeypatch.setattr(training, "together", recorded)
    with dg.DagsterInstance.ephemeral() as instance:
        steps = list(bring_up_to_date(STUDIES.get("pair"), workshop, instance, until="dictionary"))
        assert [step.recipe.stage for step in steps] == ["corpus", "activations", "dictionary", "dictionary"]
        assert learned == [[78, 78], [0]]
        ran = [run for run in instance.get_runs() if run.job_name == "make_dictionary"]
        told = [instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION) for run in ran]
        pictured = ["frontier" in log.asset_materialization.metadata for (log,) in told]
        assert pictured == [True, False]  # the newest first: one point alone is no frontier
    assert len(workshop.store.slugs("dictionary")) == 2
    assert workshop.store.slugs("features") == []


def test_one_changed_setting_remakes_what_follows_and_nothing_else(workshop: Workshop, tiny_study: Path):
    study = STUDIES.get("tiny")
    with dg.DagsterInstance.ephemeral() as instance:
        list(bring_up_to_date(study, workshop, instance))
        changed = study.model_copy(update={"features": study.features.model_copy(update={"top_examples": 3})})
        states = {step.recipe.stage: step.status for step in plan(changed, workshop.store)}
        stale = {stage for stage, status in states.items() if status.state == "stale"}
        assert stale == {"features", "labels", "steering", "atlas"}
        assert states["features"].why == "top_examples: made with 12, now 3"
        assert states["labels"].why == "features changes"


def test_a_changed_study_file_is_followed_stage_by_stage(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    study = STUDIES.get("tiny")
    changed = study.model_copy(update={"neighbors": study.neighbors.model_copy(update={"count": 5})})
    with dg.DagsterInstance.ephemeral() as instance:
        list(bring_up_to_date(study, workshop, instance))
        recipes = [step.recipe for step in plan(study, workshop.store)]
        before = {r.key: workshop.store.get(r.stage, r.slug).manifest for r in recipes}
        monkeypatch.setattr("assets.resources.STUDIES", Studies([changed]))
        list(bring_up_to_date(changed, workshop, instance))
    after = {key: workshop.store.get(m.stage, m.slug).manifest for key, m in before.items()}
    assert [m.stage for key, m in after.items() if m != before[key]] == ["neighbors", "labels", "atlas"]


def test_a_study_that_cannot_be_made_is_refused_before_its_shared_corpus_is_made(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    """Whichever of two studies of one corpus comes first, each is judged by its own site and batch."""
    good = STUDIES.get("tiny")
    deep = good.activations.model_copy(update={"layer": 9})
    greedy = [d.model_copy(update={"batch_tokens": 6_000, "variant": "greedy"}) for d in good.dictionaries]
    bad = [
        good.at(deep).model_copy(update={"name": "deep"}),
        good.model_copy(update={"name": "greedy", "dictionaries": greedy}),
    ]
    monkeypatch.setattr("assets.resources.STUDIES", Studies([*bad, good]))
    with dg.DagsterInstance.ephemeral() as instance:
        for study, why in zip(bad, ("layers 0 to 3", "batch_tokens = 6000: the corpus has"), strict=True):
            with pytest.raises(dg.Failure, match=why):
                list(bring_up_to_date(study, workshop, instance))
            assert not any(workshop.store.slugs(stage) for stage in VERSIONS)
        next(bring_up_to_date(good, workshop, instance))
        assert workshop.store.slugs("corpus") == ["tiny"]
        with pytest.raises(dg.Failure, match="batch_tokens = 6000"):  # now that there is a corpus
            list(bring_up_to_date(bad[1], workshop, instance))
        assert workshop.store.slugs("activations") == []


def test_the_sensor_asks_once_for_each_change_of_a_built_study(workshop: Workshop, text_folder: Path):
    sensor = defs.resolve_sensor_def("changes")
    with dg.DagsterInstance.ephemeral() as instance:

        def tick():
            context = dg.build_sensor_context(instance=instance, resources={"workshop": workshop})
            return sensor.evaluate_tick(context)

        assert not tick().run_requests  # nothing is built yet
        list(bring_up_to_date(STUDIES.get("tiny"), workshop, instance))
        assert not tick().run_requests
        assert re.search("nothing .* has changed", tick().skip_message)
        new = text_folder / "new.txt"
        new.write_text("A new document of some length, about nothing much at all.\n" * 3, "utf-8")
        try:
            (first,), (second,) = tick().run_requests, tick().run_requests
            assert first.run_key == second.run_key  # Dagster runs a key once
            assert first.tags["mind_atlas/changed"].startswith("corpus: sources: made with")
            assert first.run_config == {"ops": {"study_up_to_date": {"config": {"study": "tiny"}}}}
        finally:
            new.unlink()
        assert not tick().run_requests


def test_a_webhook_is_told_how_a_whole_run_ended(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, httpserver: HTTPServer
):
    told: list[dict[str, str]] = []
    httpserver.expect_request("/hook", method="POST").respond_with_handler(
        lambda request: (told.append(request.get_json()), Response(status=204))[1]
    )
    monkeypatch.setenv("MIND_ATLAS_WEBHOOK", httpserver.url_for("/hook"))
    own = build_defs(workshop)
    with dg.DagsterInstance.ephemeral() as instance:
        config = {"ops": {"study_up_to_date": {"config": {"study": "no-such-study"}}}}
        job = own.resolve_job_def("build_atlas")
        result = job.execute_in_process(instance=instance, run_config=config, raise_on_error=False)
        context = dg.build_run_status_sensor_context(
            "tell_failure", result.get_run_failure_event(), instance, result.dagster_run
        ).for_run_failure()
        own.resolve_sensor_def("tell_failure")(context)
        assert own.resolve_job_def("retrain").execute_in_process(instance=instance).success
    assert "build_atlas failed" in told[0]["text"]
    assert told[0]["run_id"] == result.run_id


def test_a_webhook_that_does_not_answer_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIND_ATLAS_WEBHOOK", "http://127.0.0.1:9/hook")
    assert notify("something", "1") is False
    monkeypatch.setenv("MIND_ATLAS_WEBHOOK", "file:///etc/passwd")
    assert notify("something", "1") is False


def test_the_retrain_job_follows_the_plan_of_built_studies(workshop: Workshop):
    own = build_defs(workshop)
    with dg.DagsterInstance.ephemeral() as instance:
        assert own.resolve_job_def("retrain").execute_in_process(instance=instance).success
        assert workshop.store.slugs("corpus") == []  # nothing was built, so nothing is kept fresh
        config = {"ops": {"study_up_to_date": {"config": {"study": "tiny"}}}}
        assert own.resolve_job_def("build_atlas").execute_in_process(instance=instance, run_config=config).success
    assert {s.status.state for s in plan(STUDIES.get("tiny"), ArtifactStore(Path(workshop.root)))} == {"made"}
