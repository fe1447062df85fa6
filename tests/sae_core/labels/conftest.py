"""A real HTTP server on loopback that answers as a script says, and a small features artifact on disk."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Behavior = Callable[["Handler", dict[str, Any]], None]

GOOD = {"label": "planets", "description": "Fires on planets.", "kind": "input", "confidence": 0.8}
WORDS = (" Mars", " river", " the", " orbit", "\n", " <b>", " <<", "été", " 1984", " and")


class Handler(BaseHTTPRequestHandler):
    """Passes each request to the endpoint's behavior."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.endpoint.serve(self, body)  # type: ignore[attr-defined]

    def log_message(self, *args: object) -> None:
        pass

    def send(self, text: str, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        data = text.encode()
        fields = {"Content-Type": kind, "Content-Length": str(len(data))}
        for name, value in (fields | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, content: str | None, **more: Any) -> None:
        message = {"role": "assistant", "content": content}
        self.send(
            json.dumps(
                {
                    "id": "x", "object": "chat.completion", "created": 0, "model": "m",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
                } | more
            )
        )  # fmt: skip

    def error(self, status: int, message: str = "no", code: str | None = None, **headers: str) -> None:
        self.send(json.dumps({"error": {"message": message, "code": code}}), status, **headers)


class Endpoint:
    """An OpenAI-compatible server that misbehaves on purpose: `script` for the first requests, then `behavior`."""

    def __init__(self) -> None:
        self.script: list[Behavior] = []
        self.behavior: Behavior = lambda handler, body: handler.answer(json.dumps(GOOD))
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.endpoint = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler: Handler, body: dict[str, Any]) -> None:
        with self.lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.keys.append(handler.headers.get("Authorization"))
            behavior = self.script.pop(0) if self.script else self.behavior
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            behavior(handler, body)
        except BrokenPipeError:
            pass
        finally:
            with self.lock:
                self.under_way -= 1


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; no key, no proxy, and short waits between retries."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sae_core.labels.pace.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("sae_core.labels.pace.LONGEST_PAUSE", 0.02)
    return tmp_path / "cache"


@pytest.fixture
def make_features(tmp_path: Path) -> Callable[..., Path]:
    """Writes a features artifact of `n` features, of which those in `dead` never fire."""

    def make(n: int = 8, dead: tuple[int, ...] = (3,)) -> Path:
        folder = tmp_path / f"features-{n}"
        folder.mkdir()
        rows = [_feature(i, i in dead) for i in range(n)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "features.parquet")
        examples = [example for i in range(n) if i not in dead for example in _examples(i)]
        pq.write_table(pa.Table.from_pylist(examples), folder / "examples.parquet")
        return folder

    return make


def _feature(i: int, dead: bool) -> dict[str, Any]:
    return {
        "feature": i, "n_fired": 0 if dead else 100 + i, "density": 0.0 if dead else 0.0001 * (i + 1),
        "max_act": 0.0 if dead else 10.0 - i, "mean_act": 0.0 if dead else 5.0 - i / 10, "is_dead": dead,
        "promoted": [" orbit", " Orbit", "moon"], "promoted_logits": [3.0, 2.0, 1.0], "suppressed": [" the"],
        "suppressed_logits": [-1.0], "histogram": [5] * 20,
        "top_tokens": [] if dead else [" planet", "Planet", " Mars"],
        "top_token_shares": [] if dead else [0.5, 0.2, 0.1],
    }  # fmt: skip


def _examples(i: int) -> list[dict[str, Any]]:
    draw = random.Random(i)
    found = []
    for kind, level, act in [("top", 5, 10.0 - n) for n in range(6)] + [("level", v, 2.0 * v) for v in (5, 4, 3, 2, 1)]:
        tokens = [draw.choice(WORDS) for _ in range(32)]
        acts = [0.0] * 32
        acts[20], acts[21] = act, act / 2
        row = {"feature": i, "level": level, "kind": kind, "act": act, "document": 0, "position": 9, "peak": 20}
        found.append(row | {"tokens": tokens, "acts": acts})
    return sorted(found, key=lambda e: (-e["level"], -e["act"]))
