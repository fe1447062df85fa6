"""The fault table of docs/reliability.md: `make chaos`. Every fault must end in the artifacts of an undisturbed run.

Run on request, for it takes long: `pytest tests/pipelines/test_chaos.py -m chaos`; MIND_ATLAS_KILLS says how many
kills (default 50). What was run goes into the table; a fault that this machine cannot make is said to be so.
"""

import os
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from sae_core.artifacts import MANIFEST, PROJECT
from sae_core.stages import VERSIONS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(4 * 3600)]
STAGES = list(VERSIONS)
KILLS = int(os.environ.get("MIND_ATLAS_KILLS", "50"))
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
Rows = list[tuple[str, str]]


@pytest.fixture(scope="module", autouse=True)
def told(request: pytest.FixtureRequest) -> Iterator[Rows]:
    """What happened, by fault; written into the table at the end."""
    if "chaos" not in request.config.option.markexpr:
        pytest.skip("faults of all kinds take an hour: run them with `make chaos`")
    rows: Rows = []
    yield rows
    page = PROJECT / "docs" / "reliability.md"
    head, _, rest = page.read_text("utf-8").partition(BEGIN)
    table = ["| fault | what happened |", "| --- | --- |", *(f"| {fault} | {what} |" for fault, what in rows)]
    when = f"Run {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores. In every row the final artifacts were equal to\n"
    text = [
        BEGIN,
        when + "the undisturbed ones, file by file (SHA-256; what holds times, by what it says but for them).",
        "",
    ]
    page.write_text(head + "\n".join([*text, *table, "", END]) + rest.partition(END)[2], "utf-8")


def ended_alike(home: Any, calm: Any) -> None:
    home.run()
    assert home.content() == calm.content()


def test_killed_at_random_moments(calm: Any, new_home: Callable[..., Any], told: Rows) -> None:
    order, killed, homes = random.Random(0), 0, 1
    home, start = new_home(), time.monotonic()
    home.run()
    seconds = time.monotonic() - start
    home = new_home()
    while killed < KILLS:
        process = home.start("run", "tiny", "--json")
        try:
            process.communicate(timeout=order.uniform(0.1, 0.6) * seconds)
            ended_alike(home, calm)  # it was done before: begin anew
            home, homes = new_home(), homes + 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
    ended_alike(home, calm)
    told.append(
        (f"SIGKILL at {killed} random moments", f"{homes} atlases were finished on the way; the same command went on")
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no file system can be mounted here: this needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(disk: Path) -> Path:
    """Use up all the space there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:  # closing would write what a buffer still holds, and fail
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return filler


def test_the_disk_is_full_in_each_stage(calm: Any, new_home: Callable[..., Any], small_disk: Path, told: Rows) -> None:
    home = new_home(small_disk / "home")
    for stage in STAGES:
        filler = fill(small_disk)
        status, said = home.command("run", "tiny", "--json", "--until", stage)
        filler.unlink(missing_ok=True)
        assert status == 1, f"{stage}: {said}"
        assert not list(home.folder.glob(f"{stage}/*/{MANIFEST}")), stage
        assert home.command("run", "tiny", "--json", "--until", stage)[0] == 0
    ended_alike(home, calm)
    told.append(("disk full in each stage", "one line and status 1; with space again, the same command went on"))


def test_a_byte_flips_in_each_kind_of_artifact(calm: Any, new_home: Callable[..., Any], told: Rows) -> None:
    home = new_home()
    home.run()
    for stage in STAGES:
        (slug,) = home.store.slugs(stage)
        made = home.store.get(stage, slug)
        file = max((made.folder / name for name in made.manifest.files), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert home.command("verify", "--repair")[0] == 1
    ended_alike(home, calm)
    assert home.command("verify")[0] == 0
    told.append(("a byte flipped in each stage's largest file", "`verify --repair` found each; `run` made these again"))


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_manifest_is_cut_off(calm: Any, new_home: Callable[..., Any], told: Rows, share: float) -> None:
    home = new_home()
    home.run()
    for stage in STAGES:
        (path,) = home.folder.glob(f"{stage}/*/{MANIFEST}")
        text = path.read_text("utf-8")
        path.write_text(text[: int(len(text) * share)], "utf-8")
        status, said = home.command("status", "tiny")
        assert (status, said.count("\n")) == (1, 1), said
        assert home.command("verify", "--repair")[0] == 1
        home.run()
    ended_alike(home, calm)
    what = "truncated" if share else "empty"
    told.append(
        (
            f"an {what} manifest in each stage" if not share else f"a {what} manifest in each stage",
            "one line names the cure, `verify --repair`; what a generation kept was found again",
        )
    )


def test_the_store_is_read_only(calm: Any, new_home: Callable[..., Any], small_disk: Path, told: Rows) -> None:
    home = new_home(small_disk / "home")
    assert home.command("run", "tiny", "--json", "--until", "dictionary")[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, said = home.command("run", "tiny", "--json")
    assert status == 1, said
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    ended_alike(home, calm)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert home.command("features", "bridge")[0] == 0
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    told.append(("a read-only store", "making: one line and status 1; reading a finished atlas works"))


def test_two_runs_at_once(calm: Any, new_home: Callable[..., Any], told: Rows) -> None:
    home = new_home()
    both = [home.start("run", "tiny", "--json") for _ in range(2)]
    assert [process.communicate(timeout=1800) and process.returncode for process in both] == [0, 0]
    ended_alike(home, calm)
    told.append(("two runs at once", "one waited for the other at each stage and took what it had made"))


def test_no_daemon_is_running(calm: Any, told: Rows) -> None:
    assert calm.content()
    told.append(
        ("a stopped Dagster daemon", "the command line needs none: no run of this table had one; schedules wait")
    )


def test_the_database_of_runs_is_locked(calm: Any, new_home: Callable[..., Any], told: Rows) -> None:
    home = new_home()
    assert home.command("run", "tiny", "--json", "--until", "corpus")[0] == 0
    database = next((home.folder / "dagster").rglob("runs.db"))
    with sqlite3.connect(database, isolation_level=None) as held:
        held.execute("BEGIN EXCLUSIVE")
        status = home.command("run", "tiny", "--json")[0]
        held.execute("ROLLBACK")
    ended_alike(home, calm)
    told.append(
        (
            "a locked SQLite (Dagster's runs)",
            f"status {status} while it was locked; afterwards the same command went on",
        )
    )


def test_the_label_server_vanishes(
    calm: Any, new_home: Callable[..., Any], label_server: HTTPServer, told: Rows
) -> None:
    home = new_home()
    assert home.command("run", "tiny", "--json", "--until", "steering")[0] == 0
    label_server.stop()
    back = threading.Timer(25, label_server.start)
    back.start()
    home.run()  # tries again by itself
    back.join()
    ended_alike(home, calm)
    asked = max(attempt.get("requests", 0) for attempt in home.attempts())
    assert asked > 1
    told.append(("a label server that is gone for 25 s", f"it was asked up to {asked} times for one label"))


def test_memory_ends_in_the_middle_of_training(calm: Any, new_home: Callable[..., Any], told: Rows) -> None:
    home = new_home()
    status, said = home.command("run", "tiny", "--json", fault_in="dictionary", fault="memory")
    assert status == 1, said
    ended_alike(home, calm)
    told.append(("memory limit hit in training (RLIMIT_AS)", "one line and status 1; the same command went on"))
