"""SIGKILL in each stage, then the same command again: the artifacts are those of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sae_core.artifacts import PROJECT, ArtifactStore
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
    environment = os.environ | {"MIND_ATLAS_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
    command = [sys.executable, "-c", DRIVER, kill_in, "run", "tiny", "--json"]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def files(home: Path) -> dict[str, dict]:
    """Checksum of every file of every artifact."""
    store = ArtifactStore(home)
    found = [store.get(stage, slug).manifest for stage in VERSIONS for slug in store.slugs(stage)]
    return {manifest.key: manifest.files for manifest in found}


@pytest.fixture
def homes(tiny_study: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two homes with the tiny study: one to be left in peace, and one to be disturbed."""
    made = tmp_path / "calm", tmp_path / "disturbed"
    for home in made:
        (home / "studies").mkdir(parents=True)
        (home / "studies" / "tiny.toml").symlink_to(tiny_study)
    return made


def test_a_run_killed_in_each_stage_ends_with_the_artifacts_of_an_undisturbed_one(homes: tuple[Path, Path]):
    calm, disturbed = homes
    assert run(calm) == 0
    for stage in VERSIONS:
        assert run(disturbed, kill_in=stage) == -signal.SIGKILL, stage
        assert not list((disturbed / stage).glob("*/manifest.json")), stage
    assert run(disturbed) == 0
    assert files(disturbed) == files(calm)
    assert len(files(calm)) == len(VERSIONS)
