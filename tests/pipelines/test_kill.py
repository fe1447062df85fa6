"""SIGKILL in each stage, then the same command again: the artifacts are those of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from sae_core.artifacts import PROJECT, ArtifactStore
from sae_core.labels.reader import ATTEMPTS, LABELS
from sae_core.stages import VERSIONS

DRIVER = """
import os, signal, sys
import assets.resources, sae_core.artifacts
from pipelines import cli

stage = sys.argv.pop(1)
reporter, commit = assets.resources._reporter, sae_core.artifacts.ArtifactStore._commit

def die(): os.kill(os.getpid(), signal.SIGKILL)

def fatal_reporter(context, name):
    def report(done, total, unit, **values):
        if name == stage and done: die()  # in the middle of the work, if the stage tells of its progress
    return report

def fatal_commit(self, manifest, folder):
    if manifest.stage == stage: die()  # when all is written and nothing is said of it yet
    return commit(self, manifest, folder)

assets.resources._reporter, sae_core.artifacts.ArtifactStore._commit = fatal_reporter, fatal_commit
cli.main()
"""


def run(home: Path, kill_in: str = "nothing") -> int:
    """`mind-atlas run tiny`, killed in a stage; its exit status."""
    (home / "dagster").mkdir(exist_ok=True)
    shutil.copy(PROJECT / "dagster.yaml", home / "dagster")
    own = {"MIND_ATLAS_HOME": str(home), "MIND_ATLAS_CACHE": str(home / "cache"), "DAGSTER_HOME": str(home / "dagster")}
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | own
    command = [sys.executable, "-c", DRIVER, kill_in, "run", "tiny", "--json"]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def content(home: Path) -> dict[str, Any]:
    """Checksum of every file of every artifact; of labels and attempts, what they say but for times and repeats."""
    store = ArtifactStore(home)
    found = [store.get(stage, slug) for stage in VERSIONS for slug in store.slugs(stage)]
    files = {f"{made.manifest.key}/{name}": sums for made in found for name, sums in made.manifest.files.items()}
    told = [a | {"cached": False} for a in attempts(home)]
    (labels,) = home.glob(f"labels/*/*/{LABELS}")
    timeless = {ATTEMPTS: _timeless(told), LABELS: _timeless(pq.read_table(labels).to_pylist())}
    return {name: timeless.get(name.rpartition("/")[2], sums) for name, sums in files.items()}


def _timeless(rows: list[dict[str, Any]]) -> set[str]:
    return {json.dumps(row | {"seconds": 0, "made_at": ""}, sort_keys=True) for row in rows}


def attempts(home: Path) -> list[dict[str, Any]]:
    (file,) = home.glob(f"labels/*/*/{ATTEMPTS}")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture
def label_writer(httpserver: HTTPServer) -> str:
    """Base URL of a server that gives every prompt a label of its own."""

    def answer(request: Request) -> Response:
        digest = sha256(json.dumps(request.get_json()["messages"]).encode()).hexdigest()
        label = {"label": f"thing {digest[:8]}", "description": "A thing.", "kind": "input", "confidence": 0.5}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(label)}}
        body = {"id": digest, "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return Response(json.dumps(body), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    return httpserver.url_for("/v1")


@pytest.fixture
def homes(tiny_study: Path, label_writer: str, tmp_path: Path) -> tuple[Path, Path]:
    """Two homes with the tiny study, its labels written by a server: one left in peace, and one to be disturbed."""
    labels = f'features = 12\nbase_url = "{label_writer}"\nmodel = "m"'
    study = tiny_study.parent.parent / "written" / "tiny.toml"  # beside, as its paths are seen from its folder
    study.parent.mkdir(exist_ok=True)
    study.write_text(tiny_study.read_text("utf-8").replace("features = 0", labels), "utf-8")
    made = tmp_path / "calm", tmp_path / "disturbed"
    for home in made:
        (home / "studies").mkdir(parents=True)
        (home / "studies" / "tiny.toml").symlink_to(study)
    return made


def test_a_run_killed_in_each_stage_ends_with_the_artifacts_of_an_undisturbed_one(homes: tuple[Path, Path]):
    calm, disturbed = homes
    assert run(calm) == 0
    for stage in VERSIONS:
        assert run(disturbed, kill_in=stage) == -signal.SIGKILL, stage
        assert not list((disturbed / stage).glob("*/manifest.json")), stage
    assert run(disturbed) == 0
    assert content(disturbed) == content(calm)
    assert {name.partition("/")[0] for name in content(calm)} == set(VERSIONS)
    assert len({attempt["feature"] for attempt in attempts(calm)}) == 12
    assert any(attempt["cached"] for attempt in attempts(disturbed))  # what was answered is not asked again
