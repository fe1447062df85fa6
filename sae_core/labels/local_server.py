"""llama.cpp's OpenAI-compatible server on loopback, in a process of its own that cannot outlive this one.

A process of its own, because then the model's memory goes when it ends and a crash in native code ends only it.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sae_core.labels.reader import LabelError

CONTEXT_TOKENS = 4096
"""Room for a prompt, its answer and the repair turn."""
START_SECONDS = 300.0
_STOP_SECONDS = 10.0


@contextmanager
def local_server(model: Path) -> Iterator[str]:
    """Serve a GGUF model; yields the `base_url` once it answers, and stops the server afterwards.

    One request is worked on at a time, with as many threads as there are physical cores: on a CPU reading the
    prompt is bound by arithmetic, so requests side by side gain nothing and lose the common prefix's cache.

    Raises:
        LabelError: the server does not start, because the file is no usable model or memory does not suffice.
    """
    command = [sys.executable, "-m", "sae_core.labels.local_server", str(model)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},  # threads that spin as they wait stall on a busy machine
            start_new_session=True,  # a Ctrl-C in the terminal is for us, who then stop the server
        )  # fmt: skip
        with process:
            try:
                yield f"{_address(process, model, log)}/v1"
            finally:
                _stop(process)


def _address(process: subprocess.Popen[str], model: Path, log: IO[bytes]) -> str:
    """Wait for the line with which the server says that the model is loaded and the port is open."""
    assert process.stdout is not None
    give_up = threading.Timer(START_SECONDS, process.kill)
    give_up.start()
    try:
        line = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
    finally:
        give_up.cancel()
    if line is None:
        code = process.wait()
        raise LabelError(
            f"the local label writer did not start with {model} (exit code {code}): {_last_line(log)}; "
            "name another GGUF model in labels.model, or an endpoint in labels.base_url"
        )
    return line


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the server ends when it can read no more
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _serve(model: str) -> None:
    """Serve until standard input ends, which it does when the parent closes it or dies."""
    import xllamacpp  # here, so that the parent never loads the native library

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {Path(model).name}
    params.hostnames, params.port = ["127.0.0.1"], 0  # any free port
    params.n_ctx, params.n_parallel = CONTEXT_TOKENS, 1
    params.cache_ram_mib = 0  # the one slot keeps the prefix that all prompts share; more would only take memory
    params.ui = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # at once, even in the middle of an answer


if __name__ == "__main__":
    _serve(sys.argv[1])
