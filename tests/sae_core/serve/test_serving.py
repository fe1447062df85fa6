"""`mind-atlas serve` in a process of its own."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from pipelines.serving import ServeError, serve
from sae_core.artifacts import ArtifactError, ArtifactStore
from sae_core.atlas import Atlas
from sae_core.steers import SteeringError


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


@pytest.mark.parametrize(
    ("steered", "message"),
    [
        ("loud", "write NAME=FEATURE:STRENGTH"),
        ("=1:2", "write NAME=FEATURE:STRENGTH"),
        ("loud=one:2", "write FEATURE:STRENGTH"),
        ("loud=64:2", "the steered model loud: feature 64 does not exist"),
        ("loud=1:nan", "the steered model loud: feature 1: strength nan is no number"),
        ("loud=1:2,1:3", "a feature is steered twice"),
    ],
)
def test_a_steered_model_that_cannot_be_is_refused_before_anything_is_served(
    tiny_atlas: Path, monkeypatch: pytest.MonkeyPatch, steered: str, message: str
):
    monkeypatch.setenv("MIND_ATLAS_HOME", str(tiny_atlas))
    with pytest.raises(SteeringError, match=message):
        serve("", "127.0.0.1", 0, False, [steered])


def test_the_command_serves_on_loopback_and_says_where(tiny_atlas: Path):
    alive = int(np.argmax(Atlas.open(ArtifactStore(tiny_atlas)).features.table()["max_act"].to_numpy()))
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0", "--steered", f"loud={alive}:4"]
    environment = os.environ | {"MIND_ATLAS_HOME": str(tiny_atlas)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", server.stderr.readline())
        with urllib.request.urlopen(address) as page:
            assert "tiny-llama" in page.read().decode()
        with urllib.request.urlopen(f"{address}v1/models") as models:
            assert [model["id"] for model in json.load(models)["data"]] == ["tiny-llama", "tiny-llama+loud"]
    finally:
        server.terminate()
        server.wait(20)
        assert server.stderr
        server.stderr.close()
