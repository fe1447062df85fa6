"""SIGKILL in each stage, then the same command again: the artifacts are those of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae_core.artifacts import MANIFEST, ArtifactStore
from sae_core.stages import VERSIONS


def start(home: Path) -> subprocess.Popen[bytes]:
    (home / "dagster").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"MIND_ATLAS_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
    command = [str(Path(sys.executable).with_name("mind-atlas")), "run", str(home / "studies" / "tiny.toml")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def files(home: Path) -> dict[str, dict]:
    """Checksum of every file of every artifact."""
    store = ArtifactStore(home)
    found = {(stage, slug): store.get(stage, slug).manifest for stage in VERSIONS for slug in store.slugs(stage)}
    return {f"{stage}/{slug}": manifest.files for (stage, slug), manifest in found.items()}


def kill_in(stage: str, home: Path) -> bool:
    """Start the run and kill it once the stage has begun to write; False when the run ended before."""
    process = start(home)
    while process.poll() is None:
        begun = [p for p in (home / stage).glob("*/*/*") if p.is_file()]
        if begun and not list((home / stage).glob(f"*/{MANIFEST}")):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


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
    process = start(calm)
    assert process.wait(300) == 0, process.stderr.read()
    killed = [stage for stage in VERSIONS if kill_in(stage, disturbed)]
    process = start(disturbed)
    assert process.wait(300) == 0, process.stderr.read()
    assert files(disturbed) == files(calm)
    assert {"corpus", "activations", "dictionary"} <= set(killed)
