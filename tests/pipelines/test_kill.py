"""SIGKILL in each stage, then the same command again: the artifacts are those of an undisturbed run."""

import signal
from collections.abc import Callable
from typing import Any

from sae_core.stages import VERSIONS


def test_a_run_killed_in_each_stage_ends_with_the_artifacts_of_an_undisturbed_one(
    calm: Any, new_home: Callable[[], Any]
) -> None:
    disturbed = new_home()
    for stage in VERSIONS:
        assert disturbed.command("run", "tiny", "--json", fault_in=stage)[0] == -signal.SIGKILL, stage
        assert not list((disturbed.folder / stage).glob("*/manifest.json")), stage
    disturbed.run()
    assert disturbed.content() == calm.content()
    assert {name.partition("/")[0] for name in calm.content()} == set(VERSIONS)
    assert len({attempt["feature"] for attempt in calm.attempts()}) == 12
    assert any(attempt["cached"] for attempt in disturbed.attempts())  # what was answered is not asked again
