"""`mind-atlas serve` in a process of its own."""

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipelines.serving import ServeError, serve
from sae_core.artifacts import ArtifactError


@pytest.mark.parametrize(
    ("host", "expose", "token", "message"),
    [
        ("0.0.0.0", False, "", "0.0.0.0 lets other machines read the atlas .* add --expose"),
        ("::", False, "", "add --expose"),
        ("no such host", False, "", "add --expose"),
        ("0.0.0.0", True, "short", "MIND_ATLAS_TOKEN must have 16"),
        ("0.0.0.0", True, "a token with spaces in it", "no space"),
        ("192.0.2.1", True, "", "cannot listen on 192.0.2.1:0"),
    ],
)
def test_a_server_that_may_not_be_started_says_why(
    tiny_atlas: Path, monkeypatch: pytest.MonkeyPatch, host: str, expose: bool, token: str, message: str
):
    monkeypatch.setenv("MIND_ATLAS_HOME", str(tiny_atlas))
    monkeypatch.setenv("MIND_ATLAS_TOKEN", token)
    with pytest.raises(ServeError, match=message):
        serve("", host, 0, expose)


def test_without_an_atlas_the_server_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIND_ATLAS_HOME", str(tmp_path))
    with pytest.raises(ArtifactError, match="`mind-atlas run` makes one"):
        serve("", "127.0.0.1", 0, False)


def test_the_command_serves_on_loopback_and_says_where(tiny_atlas: Path):
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0"]
    environment = os.environ | {"MIND_ATLAS_HOME": str(tiny_atlas)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
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
