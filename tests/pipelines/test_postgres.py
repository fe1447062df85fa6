"""Dagster's runs in a real PostgreSQL, two at once; where its programs are installed."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml


def program(name: str) -> str | None:
    """Debian keeps a server's programs off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


def as_server(*command: str) -> None:
    """Run a command as somebody else than root, as whom PostgreSQL refuses to run."""
    user = ["setpriv", "--reuid", "nobody", "--clear-groups"] if os.getuid() == 0 else []
    subprocess.run([*user, *command], check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=120)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of its own, on a socket."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    if not (initdb and pg_ctl):
        pytest.skip("no PostgreSQL server is installed here (Debian: apt install postgresql)")
    if not find_spec("dagster_postgres"):
        pytest.skip('the extra is missing: pip install "mind-atlas[postgres]"')
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())  # a short path: it holds a socket
    if os.getuid() == 0:
        shutil.chown(folder, "nobody")
    data = str(folder / "data")
    as_server(initdb, "-D", data, "-U", "atlas", "-A", "trust")
    as_server(pg_ctl, "-D", data, "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -c listen_addresses=''", "start")
    yield f"postgresql+psycopg2://atlas@/postgres?host={folder}"
    as_server(pg_ctl, "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder)


def test_two_runs_at_once_end_with_one_atlas_and_both_are_in_the_database(
    postgres: str, new_home: Callable[[], Any]
) -> None:
    home = new_home()
    file = home.folder / "dagster" / "dagster.yaml"
    settings = yaml.safe_load(file.read_text("utf-8"))
    file.write_text(yaml.safe_dump(settings | {"storage": {"postgres": {"postgres_url": postgres}}}), "utf-8")
    both = [home.start("run", "tiny", "--json") for _ in range(2)]
    said = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert not list(home.folder.rglob("runs.db"))
    from dagster import DagsterInstance

    with DagsterInstance.from_config(str(home.folder / "dagster")) as instance:
        assert instance.get_runs_count() >= 9
        assert all(run.is_success for run in instance.get_runs())
