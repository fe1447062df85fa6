"""`mind-atlas serve` in a process of its own."""

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

MIND_ATLAS = [sys.executable, "-m", "pipelines.cli", "serve"]


def surroundings(home: Path, **more: str) -> dict[str, str]:
    return os.environ | {"MIND_ATLAS_HOME": str(home)} | more


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["--host", "0.0.0.0"], {}, "add --expose"),
        (["--host", "0.0.0.0", "--expose"], {"MIND_ATLAS_TOKEN": "short"}, "MIND_ATLAS_TOKEN must have 16"),
        (["--host", "no such host"], {}, "add --expose"),
        (["--dictionary", "nowhere"], {}, "no finished dictionary nowhere"),
    ],
)
def test_a_server_that_cannot_be_started_says_why(
    tiny_atlas: Path, arguments: list[str], more: dict[str, str], message: str
):
    done = subprocess.run(
        MIND_ATLAS + arguments, capture_output=True, text=True, env=surroundings(tiny_atlas, **more), check=False
    )
    assert done.returncode == 1
    assert message in done.stderr


def test_the_command_serves_on_loopback_and_says_where(tiny_atlas: Path):
    server = subprocess.Popen(
        [*MIND_ATLAS, "--port", "0"], stderr=subprocess.PIPE, text=True, env=surroundings(tiny_atlas)
    )
    try:
        assert server.stderr
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", server.stderr.readline())
        with urllib.request.urlopen(address) as page:
            assert "tiny-llama" in page.read().decode()
    finally:
        server.terminate()
        server.wait(20)
        assert server.stderr
        server.stderr.close()
