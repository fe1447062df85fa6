"""Labels from a server that misbehaves: is every feature labeled or recorded, and nothing bought twice?

    python benchmarks/labeling.py                       the load test and the throughput of RESULTS.md
    python benchmarks/labeling.py --features 60 --kills 1 --only load
    python benchmarks/labeling.py --only throughput     the share of what the concurrency limit allows: at least 0.8

The load test asks a server on loopback that answers after 50 ms, and to 5% of the requests with 429, to 2% with 500,
to 2% with something malformed (half of them prose in place of JSON, half a body cut short), and to 1% not at all. The
process that labels is killed with SIGKILL on the way and started again. The server keeps the book: an answer that it
wrote twice to the same request is a duplicate, unless the first was under way when the process was killed. Throughput
is measured at the same server without faults; the client's CPU time beside it says how much of a core that takes,
whoever else is at work. Client and server share the machine.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

LATENCY = 0.05
FAULTS = {"429": 0.05, "500": 0.02, "prose": 0.01, "cut": 0.01, "hang": 0.01}
HANG, TIMEOUT = 30.0, 2.0
"""Seconds for which a hanging request is held, and after which the client takes it for lost."""
UNDER_WAY = 0.5
"""Seconds within which an answer that the server wrote may not have been kept yet when the process was killed."""
WORDS = ("Mars", "river", "the", "orbit", "été", "1984", "and", "bridge", "of", "le", "def", "return", "мост", "año")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--only", choices=["load", "throughput"])
    parser.add_argument("--role", choices=["server", "labeler"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--faults", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "server":
        asyncio.run(serve(options.folder, bool(options.faults)))
    elif options.role == "labeler":
        label(options)
    else:
        measure(options)


# ---- the server


async def serve(folder: Path, faults: bool) -> None:
    """Answer on a free port, whose URL is the first line of standard output; write the book at the end of input."""
    draw, book = random.Random(0), []
    counts: Counter[str] = Counter()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (body := await _read(reader)) is not None:
                start = time.monotonic()
                fate = draw.random()
                fault = next((name for name, edge in edges if fate < edge), "") if faults else ""
                counts[fault or "answered"] += 1
                await asyncio.sleep(HANG if fault == "hang" else LATENCY)
                if fault == "hang":
                    break
                digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
                writer.write(_response(fault, digest))
                await writer.drain()
                if fault in ("", "prose"):
                    book.append((digest, start, time.monotonic()))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    total, edges = 0.0, []
    for name, share in FAULTS.items():
        total += share
        edges.append((name, total))
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    (folder / "book.json").write_text(json.dumps({"counts": counts, "book": book}))
    os._exit(0)  # hanging requests and all


async def _read(reader: asyncio.StreamReader) -> Any:
    """The body of the next request of a connection; None when it was closed."""
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    lines = head.decode("latin-1").lower().splitlines()
    length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), None)
    return None if length is None else json.loads(await reader.readexactly(length))


def _response(fault: str, digest: str) -> bytes:
    label = {"label": f"thing {digest[:8]}", "description": "A thing.", "kind": "input", "confidence": 0.5}
    text = "I would say that it is a thing." if fault == "prose" else json.dumps(label)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 600, "completion_tokens": 40, "total_tokens": 640}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    status = {"429": "429 Too Many Requests", "500": "500 Internal Server Error"}.get(fault, "200 OK")
    body = json.dumps({"error": {"message": "no"}} if status[0] != "2" else whole).encode()
    body = body[: len(body) // 2] if fault == "cut" else body
    after = "Retry-After: 0.2\r\n" if fault == "429" else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{after}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def server(folder: Path, faults: bool) -> Iterator[str]:
    """A server in a process of its own; `book.json` is in `folder` afterwards."""
    command = [sys.executable, __file__, "--role", "server", "--folder", str(folder), "--faults", str(int(faults))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(20)


# ---- the client, in a process that can be killed


def label(options: argparse.Namespace) -> None:
    """Label all features, and keep memory in use (MB) and processor time (s) at every progress report."""
    from sae_core.labels import build_labels
    from sae_core.study import LabelSettings

    settings = LabelSettings(
        model="m", base_url=options.url, features=options.features, concurrency=options.concurrency, timeout=TIMEOUT,
        prompt_price=0.1, completion_price=0.4, max_dollars=10.0,
    )  # fmt: skip
    with (options.folder / "memory.jsonl").open("a") as file:

        def report(done: int, total: int, unit: str, **values: float) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            file.write(json.dumps([os.getpid(), done, used, time.process_time()]) + "\n")
            file.flush()

        (options.folder / "labels").mkdir(exist_ok=True)
        summary = build_labels(settings, options.folder, options.folder / "labels", report)
    (options.folder / "summary.json").write_text(json.dumps(summary))


def write_features(folder: Path, n: int) -> None:
    """A features artifact: every feature fires, on words drawn at random."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, examples = [], []
    for i in range(n):
        draw = random.Random(i)
        rows.append({
            "feature": i, "n_fired": 100, "density": 0.001, "max_act": 10.0, "mean_act": 5.0, "is_dead": False,
            "promoted": [" orbit"], "promoted_logits": [3.0], "suppressed": [" the"], "suppressed_logits": [-1.0],
            "histogram": [5] * 20, "top_tokens": [f" {draw.choice(WORDS)}"], "top_token_shares": [0.9],
        })  # fmt: skip
        for level in range(10):
            tokens = [f" {draw.choice(WORDS)}" for _ in range(32)]
            acts = [0.0] * 20 + [10.0 - level] + [0.0] * 11
            place = {"document": 0, "position": 9, "peak": 20, "act": 10.0 - level, "tokens": tokens, "acts": acts}
            examples.append({"feature": i, "level": 5 - level // 2, "kind": "top" if level < 5 else "level"} | place)
    pq.write_table(pa.Table.from_pylist(rows), folder / "features.parquet")
    pq.write_table(pa.Table.from_pylist(examples), folder / "examples.parquet", row_group_size=8192)


def run_labeler(folder: Path, url: str, options: argparse.Namespace, kill_at: int = 0) -> float:
    """Label, or begin to: killed when so many attempts are on record. Returns the moment of the end."""
    command = [
        sys.executable, __file__, "--role", "labeler", "--folder", str(folder), "--url", url,
        "--features", str(options.features), "--concurrency", str(options.concurrency),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "MIND_ATLAS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "sk-benchmark",
    }  # fmt: skip
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None:
        if kill_at and n_bought(folder) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    end = time.monotonic()
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), process.returncode
    return end


def n_bought(folder: Path) -> int:
    """Answers that are in the cache."""
    return sum(1 for _ in (folder / "cache").rglob("*.json"))


# ---- what is measured


def measure(options: argparse.Namespace) -> None:
    for name, test in (("load", load), ("throughput", throughput)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="mind-atlas-labeling-") as folder:
                write_features(Path(folder), options.features)
                print(json.dumps({"test": name} | test(Path(folder), options)), flush=True)


def load(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Faults and kills."""
    import pyarrow.parquet as pq

    start = time.monotonic()
    with server(folder, faults=True) as url:
        stops = [(turn + 1) * options.features // (options.kills + 1) for turn in range(options.kills)]
        killed = [run_labeler(folder, url, options, kill_at=stop) for stop in stops]
        run_labeler(folder, url, options)
    seconds = time.monotonic() - start
    told = json.loads((folder / "book.json").read_text())
    answers: dict[str, list[tuple[float, float]]] = {}
    for digest, begun, ended in told["book"]:
        answers.setdefault(digest, []).append((begun, ended))
    twice = [pair for pairs in answers.values() for pair in pairs[:-1]]
    excused = [(b, e) for b, e in twice if any(b < end and e > end - UNDER_WAY for end in killed)]
    rows = pq.read_table(folder / "labels" / "labels.parquet").to_pylist()
    memory = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    last = [used for pid, _, used, _ in memory if pid == memory[-1][0]]
    return {
        "features": options.features,
        "concurrency": options.concurrency,
        "kills": len(killed),
        "status": Counter(row["status"] for row in rows),
        "errors": Counter(row["error"][:40] for row in rows if row["error"]),
        "server": told["counts"],
        "bought_twice": len(twice) - len(excused),
        "lost_to_kills": len(excused),
        "dollars": json.loads((folder / "summary.json").read_text())["dollars"],
        "seconds": round(seconds, 1),
        "memory_mb": [round(used, 1) for used in (last[len(last) // 4], last[-1], max(last))],
    }


def throughput(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """No faults; from the first request that the server saw to its last answer."""
    with server(folder, faults=False) as url:
        run_labeler(folder, url, options)
    book = json.loads((folder / "book.json").read_text())["book"]
    seconds = max(end for _, _, end in book) - min(begun for _, begun, _ in book)
    rate, limit = len(book) / seconds, options.concurrency / LATENCY
    reports = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    cpu = (reports[-1][3] - reports[0][3]) / (len(reports) - 1)
    return {
        "features": options.features,
        "concurrency": options.concurrency,
        "client_cpu_ms_per_request": round(1000 * cpu, 2),
        "requests_per_second": round(rate, 1),
        "limit": limit,
        "share_of_what_the_concurrency_limit_allows": round(rate / limit, 3),
    }


if __name__ == "__main__":
    main()
