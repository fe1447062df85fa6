"""The tiny study made again and again: in this process, as its text changes, and by the command line, under faults."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.run import bring_up_to_date
from sae_core.artifacts import GENERATION, PROJECT, ArtifactStore, file_sha256
from sae_core.labels.reader import ATTEMPTS, LABELS
from sae_core.stages import VERSIONS


class Workplace:
    """A store of its own, and a corpus that may change."""

    def __init__(self, root: Path, text: Path, instance: dg.DagsterInstance, study: str = "tiny") -> None:
        self.text, self.instance, self.study = text, instance, STUDIES.get(study)
        self.workshop = Workshop(root=str(root), device="cpu")
        self.store = ArtifactStore(root)

    def refresh(self) -> dict[str, str]:
        """Bring the study up to date: what each stage was."""
        steps = bring_up_to_date(self.study, self.workshop, self.instance, log_level="CRITICAL")
        return {recipe.stage: status.state for recipe, status in steps}

    def write(self, name: str, text: str) -> None:
        (self.text / name).write_text(text, "utf-8")

    def spoil(self) -> dict[str, str]:
        """Put gibberish in place of all text; returns what was there, by file."""
        good = {path.name: path.read_text("utf-8") for path in self.text.iterdir()}
        for i, name in enumerate(sorted(good)):
            self.write(name, f"{i} " + "".join(chr(33 + (i * 31 + n * n * 7) % 90) for n in range(300)))
        return good


@pytest.fixture(scope="module")
def place(tiny_study: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    kept = tmp_path_factory.mktemp("kept") / "text"
    shutil.copytree(text_folder, kept)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Workplace(tmp_path_factory.mktemp("store"), text_folder, instance)
    shutil.rmtree(text_folder)
    shutil.copytree(kept, text_folder)


DRIVER = """
import os, resource, signal, sys
import assets.resources, sae_core.artifacts
from pipelines import cli

stage, fault = sys.argv.pop(1), sys.argv.pop(1)
reporter, commit = assets.resources._reporter, sae_core.artifacts.ArtifactStore._commit

def strike():
    if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # no more memory from here on

def fatal_reporter(context, name):
    def report(done, total, unit, **values):
        if name == stage and done: strike()  # in the middle of the work, if the stage tells of its progress
    return report

def fatal_commit(self, manifest, folder):
    if manifest.stage == stage: strike()  # when all is written and nothing is said of it yet
    return commit(self, manifest, folder)

assets.resources._reporter, sae_core.artifacts.ArtifactStore._commit = fatal_reporter, fatal_commit
cli.main()
"""


class Home:
    """A home with the tiny study, worked on by the command line."""

    def __init__(self, folder: Path, study: Path) -> None:
        self.folder, self.store = folder, ArtifactStore(folder)
        (folder / "studies").mkdir(parents=True)
        (folder / "studies" / "tiny.toml").symlink_to(study)
        (folder / "dagster").mkdir()
        shutil.copy(PROJECT / "dagster.yaml", folder / "dagster")

    def start(self, *command: str, fault_in: str = "", fault: str = "kill") -> subprocess.Popen[str]:
        """Start `mind-atlas <command>`, with a fault in a stage; other commands than `run` need no stage."""
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {
            "MIND_ATLAS_HOME": str(self.folder), "MIND_ATLAS_CACHE": str(self.folder / "cache"),
            "DAGSTER_HOME": str(self.folder / "dagster"),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, fault_in, fault, *command], env=environment, cwd=self.folder / "dagster",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def command(self, *command: str, fault_in: str = "", fault: str = "kill") -> tuple[int, str]:
        """Exit status and what was said on standard error."""
        process = self.start(*command, fault_in=fault_in, fault=fault)
        said = process.communicate(timeout=900)[1]
        return process.returncode, said

    def run(self) -> None:
        """Bring the tiny study up to date."""
        status, said = self.command("run", "tiny", "--json")
        assert status == 0, said

    def content(self) -> dict[str, Any]:
        """Checksum of every file of every artifact, read from the disk; of what holds times, what it says but for them.

        These are labels, attempts (repeats do not count either, and how often a server had to be asked) and
        generations.
        """
        made = [self.store.get(stage, slug) for stage in VERSIONS for slug in self.store.slugs(stage)]
        files = {f"{m.manifest.key}/{name}": m.folder / name for m in made for name in m.manifest.files}
        told: dict[str, Callable[[Path], Any]] = {
            LABELS: lambda path: _timeless(pq.read_table(path).to_pylist()),
            ATTEMPTS: lambda path: _timeless([json.loads(line) for line in path.read_text("utf-8").splitlines()]),
            GENERATION: _parts,
        }
        return {name: told.get(path.name, file_sha256)(path) for name, path in files.items()}

    def attempts(self) -> list[dict[str, Any]]:
        (file,) = self.folder.glob(f"labels/*/*/{ATTEMPTS}")
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _timeless(rows: list[dict[str, Any]]) -> set[str]:
    times = {"seconds": 0, "made_at": "", "cached": False, "requests": 0}
    return {json.dumps(row | {name: times[name] for name in times.keys() & row.keys()}, sort_keys=True) for row in rows}


def _parts(generation: Path) -> dict[str, Any]:
    said = json.loads(generation.read_text("utf-8"))
    return said | {"manifests": {key: manifest["fingerprint"] for key, manifest in said["manifests"].items()}}


def answer(request: Request) -> Response:
    """A label of its own for every prompt."""
    digest = sha256(json.dumps(request.get_json()["messages"]).encode()).hexdigest()
    label = {"label": f"thing {digest[:8]}", "description": "A thing.", "kind": "input", "confidence": 0.5}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(label)}}
    body = {"id": digest, "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Response(json.dumps(body), content_type="application/json")


@pytest.fixture(scope="module")
def label_server() -> Iterator[HTTPServer]:
    with HTTPServer() as server:
        server.expect_request("/v1/chat/completions").respond_with_handler(answer)
        yield server


@pytest.fixture(scope="module")
def new_home(
    tiny_study: Path, label_server: HTTPServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Home]:
    """Makes homes with the tiny study, whose labels the server writes; in a folder of their own, or a given one."""
    labels = f'features = 12\nbase_url = "{label_server.url_for("/v1")}"\nmodel = "m"'
    study = tiny_study.parent.parent / "written" / "tiny.toml"  # beside, as its paths are seen from its folder
    study.parent.mkdir(exist_ok=True)
    study.write_text(tiny_study.read_text("utf-8").replace("features = 0", labels), "utf-8")
    return lambda folder=None: Home(folder or tmp_path_factory.mktemp("home") / "home", study)


@pytest.fixture(scope="module")
def calm(new_home: Callable[..., Home]) -> Home:
    """A home whose run nobody disturbed."""
    home = new_home()
    home.run()
    return home
