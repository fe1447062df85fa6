"""What the commands share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sae_core.artifacts import PROJECT

COUNT = "from pipelines.commands.shared import work\nwith work(False) as (runs, _): print(runs.get_runs_count())"


def test_several_commands_that_start_at_once_make_one_record_of_runs(tmp_path: Path) -> None:
    """Dagster makes its tables when it finds none, and fails where another process was quicker."""
    shutil.copy(PROJECT / "dagster.yaml", tmp_path)
    environment = os.environ | {"DAGSTER_HOME": str(tmp_path), "MIND_ATLAS_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    ended = [(*process.communicate(timeout=300), process.returncode) for process in started]
    assert [(out, status) for out, _, status in ended] == [("0\n", 0)] * 4, ended
