"""The real web server and daemon, asked through the API that Dagster's own pages use."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from assets.partitions import STUDIES
from sae_core.artifacts import PROJECT
from sae_core.stages import ON_DEMAND, PER_STUDY, VERSIONS

LAUNCH = """
mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } }
} }"""
RUN = """
query($id: ID!) { runOrError(runId: $id) { ... on Run {
  status
  assetMaterializations { metadataEntries { label ... on BoolMetadataEntry { boolValue } } }
  assetCheckEvaluations: eventConnection { events { __typename
    ... on AssetCheckEvaluationEvent { evaluation { checkName success severity description } }
    ... on ExecutionStepFailureEvent { error { message } failureMetadata { description } }
  } }
} } }"""
SCHEDULED = """
{ runsOrError(filter: {tags: [{key: "dagster/schedule_name", value: "retrain_tiny"}]}) {
  ... on Runs { results { runId status jobName } }
} }"""
START = """
mutation($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) { __typename
  ... on ScheduleStateResult { scheduleState { status } }
  ... on PythonError { message }
} }"""
NODES = """
{ assetNodes { assetKey { path } groupName description jobNames partitionKeys
  configField { configType { ... on CompositeConfigType { fields { name description } } } } } }"""


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def materialize(self, asset: str, partition: str, **config: Any) -> dict[str, Any]:
        node = next(n for n in self.ask(NODES)["assetNodes"] if n["assetKey"]["path"] == [asset])
        job = next(name for name in node["jobNames"] if name.startswith("__ASSET_JOB"))
        params = {
            "selector": {
                "repositoryLocationName": "pipelines.definitions", "repositoryName": "__repository__",
                "pipelineName": job, "assetSelection": [{"path": [asset]}], "assetCheckSelection": None,
            },
            "mode": "default",
            "runConfigData": json.dumps({"ops": {asset: {"config": config}}}),
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": partition}]},
        }  # fmt: skip
        launched = self.ask(LAUNCH, params=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return self.wait(launched["run"]["runId"])

    def wait(self, run_id: str) -> dict[str, Any]:
        for _ in range(240):
            run = self.ask(RUN, id=run_id)["runOrError"]
            if run["status"] in ("SUCCESS", "FAILURE", "CANCELED"):
                return run
            time.sleep(0.5)
        raise AssertionError(f"the run has not ended: {run['status']}")


@contextmanager
def running(home: Path, study: Path) -> Iterator[Server]:
    """`dagster dev`, web server and daemon, in a home that knows one study."""
    shutil.copy(PROJECT / "dagster.yaml", home)
    (home / "studies").mkdir()
    (home / "studies" / "tiny.toml").symlink_to(study)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("dagster")), "dev", "-m", "pipelines.definitions"]
    environment = os.environ | {"DAGSTER_HOME": str(home), "MIND_ATLAS_HOME": str(home)}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)], cwd=home, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        server = Server(port)
        for _ in range(120):
            try:
                server.ask("{ version }")
                break
            except OSError:
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # a busy machine: the test is over, so is its patience
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tiny_study: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("dagster"), tiny_study) as server:
        yield server


def checks(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    events = run["assetCheckEvaluations"]["events"]
    found = [e["evaluation"] for e in events if e["__typename"] == "AssetCheckEvaluationEvent"]
    return {evaluation["checkName"]: evaluation for evaluation in found}


def test_every_asset_is_shown_with_group_description_partitions_and_typed_described_settings(server: Server):
    nodes = {node["assetKey"]["path"][0]: node for node in server.ask(NODES)["assetNodes"]}
    assert nodes.keys() == VERSIONS.keys() | ON_DEMAND.keys() | PER_STUDY.keys()
    for name, node in nodes.items():
        assert node["description"], name
        named = "circuits.agreement" if name in PER_STUDY else "tiny"  # a shipped study's
        assert any(named in key for key in node["partitionKeys"]), name
        fields = node["configField"]["configType"]["fields"]
        assert all(field["description"] for field in fields), name
        assert "again" in {field["name"] for field in fields}, name


def test_any_asset_is_materialized_for_a_partition_and_the_second_time_is_cached(server: Server):
    study = STUDIES.get("tiny")
    dictionary = study.spec(study.dictionaries[0]).slug
    partitions = {"corpus": "tiny", "activations": study.site.slug}
    for asset in VERSIONS:
        run = server.materialize(asset, partitions.get(asset, dictionary))
        assert run["status"] == "SUCCESS", run
        assert all(check["success"] for check in checks(run).values()), run
    again = server.materialize("dictionary", dictionary)
    entries = again["assetMaterializations"][0]["metadataEntries"]
    assert {e["label"]: e.get("boolValue") for e in entries}["cached"] is True


def test_a_failed_check_and_a_failed_run_read_clearly(server: Server):
    short = server.materialize("corpus", "tiny", tokens=10_000_000)
    assert short["status"] == "SUCCESS"
    verdict = checks(short)["enough_text"]
    assert (verdict["success"], verdict["severity"]) == (False, "WARN")
    assert verdict["description"].startswith("enough_text is 0.0")
    failed = server.materialize("activations", STUDIES.get("tiny").site.slug, sink_norm=0.5)
    assert failed["status"] == "FAILURE"
    assert "activations: sink_norm = 0.5: Input should be greater than 1" in json.dumps(failed["assetCheckEvaluations"])


@pytest.mark.daemon
def test_a_schedule_that_is_turned_on_runs_in_the_real_daemon(
    request: pytest.FixtureRequest, tiny_study: Path, tiny_atlas: Path, tmp_path: Path
):
    if "daemon" not in request.config.option.markexpr:
        pytest.skip("waits for the clock, and photographs docs/schedule.png: run it with -m daemon")
    from playwright.sync_api import sync_playwright

    study = tiny_study.parent.parent / "each-minute" / "tiny.toml"  # beside, as its paths are seen from its folder
    study.parent.mkdir()
    study.write_text(f'{tiny_study.read_text("utf-8")}\n[retraining]\nschedule = "* * * * *"\n', "utf-8")
    home = tmp_path / "home"
    shutil.copytree(tiny_atlas, home)
    selector = {
        "repositoryLocationName": "pipelines.definitions", "repositoryName": "__repository__",
        "scheduleName": "retrain_tiny",
    }  # fmt: skip
    with running(home, study) as server:
        started = server.ask(START, selector=selector)["startSchedule"]
        assert started["scheduleState"]["status"] == "RUNNING", started
        for _ in range(300):
            runs = server.ask(SCHEDULED)["runsOrError"]["results"]
            if any(run["status"] == "SUCCESS" for run in runs):
                break
            time.sleep(1)
        assert {run["jobName"] for run in runs} == {"build_atlas"}
        assert any(run["status"] == "SUCCESS" for run in runs), runs
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 600})
            page.goto(f"{server.url}/runs")
            page.get_by_text("retrain_tiny").first.wait_for(timeout=60_000)
            page.screenshot(path=PROJECT / "docs" / "schedule.png")
            browser.close()
