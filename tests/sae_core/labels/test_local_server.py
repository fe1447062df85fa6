import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sae_core.catalog import cache_dir
from sae_core.labels import Labels, build_labels
from sae_core.labels.local_server import local_server
from sae_core.labels.reader import LabelError
from sae_core.study import LabelSettings

MODEL = cache_dir() / "models" / "smollm2-135m-instruct.gguf"
needs_model = pytest.mark.skipif(not MODEL.is_file(), reason=f"no real label writer tested: {MODEL} is not fetched")

SERVE = """
import sys, time
from pathlib import Path
from sae_core.labels.local_server import local_server
with local_server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def is_open(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def closes(url: str) -> bool:
    deadline = time.monotonic() + 10
    while is_open(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_open(url)


def test_a_file_that_is_no_model_is_one_clear_line(tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(LabelError, match=r"bad\.gguf .*labels\.model") as failure, local_server(tmp_path / "bad.gguf"):
        pass
    assert "\n" not in str(failure.value)


@needs_model
def test_labels_are_written_by_a_real_local_model(make_features, tmp_path: Path):
    (tmp_path / "out").mkdir()
    settings = LabelSettings(model=str(MODEL), features=1)
    summary = build_labels(settings, make_features(), tmp_path / "out")
    assert summary["n_labeled"] + summary["n_failed"] == 1
    assert summary["completion_tokens"] > 0
    assert Labels.open(tmp_path / "out").table()["status"].to_pylist()[0] != "lexical"


@needs_model
def test_the_server_ends_with_the_block():
    with pytest.raises(KeyboardInterrupt), local_server(MODEL) as url:
        assert is_open(url)
        raise KeyboardInterrupt
    assert closes(url)


@needs_model
def test_the_server_does_not_outlive_a_killed_parent():
    with subprocess.Popen([sys.executable, "-c", SERVE, MODEL], stdout=subprocess.PIPE, text=True) as parent:
        url = parent.stdout.readline().strip()
        assert is_open(url)
        parent.send_signal(signal.SIGKILL)
    assert closes(url)
