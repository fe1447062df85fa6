"""Latency of `mind-atlas serve` on a synthetic atlas, in the artifacts' own formats, against a real server.

    python benchmarks/serve.py --features 50000          20 concurrent readers; 1000000 for the whole claim

Prints sizes and a table: feature page, word search, neighbor query (with recall@10 against exact search), memory,
start to first page, and, where chromium is, the map's first paint. The limits are those at 1,000,000 features; that of
the map is for 100,000.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_core.artifacts import ArtifactStore, Recipe
from sae_core.by_feature import ROW_GROUP
from sae_core.features.build import _EXAMPLES, _FEATURES, _lists
from sae_core.labels.meaning import write_index
from sae_core.labels.reader import SCHEMA
from sae_core.neighbor_index import INDEX, NeighborIndex
from sae_core.neighbors import _table, build_index, nearest, recall
from sae_core.study import NeighborSettings
from sae_core.word_index import WordIndex

SITE = "synthetic.resid_post.L00.synthetic"
D_MODEL, EXAMPLES, TOKENS, GROUP = 128, 4, 16, 256  # features of a group as in the features stage
READERS = 20
LIMITS = {
    "feature page, p95 ms": 50.0, "word search, p95 ms": 150.0, "neighbor query, p95 ms": 20.0,
    "memory, GB": 4.0, "start to first page, s": 5.0, "map, first paint, s": 2.0,
}  # fmt: skip
LEAST = {"recall@10": 0.95}


def main() -> None:
    """Make, serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=400, help="of each kind")
    parser.add_argument("--home", type=Path, help="keep the synthetic atlas here, and use it again")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a reader reads before asking again")
    parser.add_argument(
        "--no-neighbors", action="store_true", help="make no index of neighbors, nor of meaning, which take longest"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = ArtifactStore(options.home or Path(scratch))
        slug = f"{SITE}.batch_top_k.w{options.features}.k32"
        found = make(store, slug, options.features, not options.no_neighbors)
        show(found | measure(store, slug, options))


def make(store: ArtifactStore, slug: str, n: int, with_neighbors: bool = True) -> dict[str, float]:
    """Write the artifacts of `n` features, batch by batch; returns sizes and the recall of the index."""
    rng, words = np.random.default_rng(0), pa.array([f" {w}" for w in _words(20_000)])
    settings = NeighborSettings()

    def features(draft: Any) -> dict[str, Any]:
        with (
            pq.ParquetWriter(draft.folder / "features.parquet", _FEATURES) as rows,
            pq.ParquetWriter(draft.folder / "examples.parquet", _EXAMPLES) as examples,
        ):
            for start in range(0, n, GROUP):
                ids = np.arange(start, min(start + GROUP, n))
                rows.write_table(feature_rows(ids, words, rng))
                examples.write_table(example_rows(ids, words, rng), row_group_size=ROW_GROUP)
        return {"n_features": n}

    def labels(draft: Any) -> dict[str, Any]:
        text = words.take(pa.array(rng.zipf(1.3, (n, 3)).clip(1, len(words)).ravel() - 1)).to_pylist()
        names = ["".join(text[3 * i : 3 * i + 3]).strip() for i in range(n)]
        columns = {"feature": np.arange(n), "label": names, "lexical": names, "status": ["written"] * n}
        blank = {f.name: pa.nulls(n, f.type) for f in SCHEMA if f.name not in columns}
        table = pa.table({f.name: (columns | blank)[f.name] for f in SCHEMA}, SCHEMA)
        pq.write_table(table, draft.folder / "labels.parquet", row_group_size=ROW_GROUP)
        if with_neighbors:
            known = [word.strip() for word in words.to_pylist()]
            tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, known[0]))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            vectors = rng.standard_normal((len(words), D_MODEL), np.float32)
            write_index(vectors, tokenizer, [[(name, 1.0)] for name in names], draft.folder)
        return {}

    def neighbors(draft: Any) -> dict[str, Any]:
        rows = clustered(n, rng)
        index = build_index(rows, settings)
        faiss.write_index(index, str(draft.folder / INDEX))
        table = _table(*nearest(index, rows, np.arange(n), settings.count))
        pq.write_table(table, draft.folder / "neighbors.parquet", row_group_size=8 * ROW_GROUP)
        return {"recall_at_10": recall(index, rows)}

    def feature_map(draft: Any) -> dict[str, Any]:
        cluster = rng.integers(-1, 500, n)
        place = rng.normal(size=(501, 2)) * 8
        spots = (place[cluster + 1] + rng.normal(size=(n, 2))).astype(np.float32)
        columns = {"feature": np.arange(n, dtype=np.int32), "x": spots[:, 0], "y": spots[:, 1]}
        table = pa.table(columns | {"cluster": cluster.astype(np.int32)})
        pq.write_table(table, draft.folder / "map.parquet", row_group_size=8 * ROW_GROUP)
        return {}

    sizes, start = {}, time.perf_counter()
    stages = (features, labels, neighbors, feature_map) if with_neighbors else (features, labels, feature_map)
    for build in stages:
        made = store.make(Recipe(build.__name__, slug, 1, {"n": n, "levels": 5}), build)
        sizes[f"{build.__name__}, MB"] = sum(file["bytes"] for file in made.manifest.files.values()) / 1e6
        if "recall_at_10" in made.manifest.summary:
            sizes["recall@10"] = made.manifest.summary["recall_at_10"]
    sizes["made in, s"], start = time.perf_counter() - start, time.perf_counter()
    WordIndex.open(store, slug)
    sizes["words, MB"] = sum(path.stat().st_size for path in (store.root / "search").rglob("*")) / 1e6
    return sizes | {"words gathered in, s": time.perf_counter() - start}


def _words(n: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnoprstuvwz", k=rng.randint(3, 9))) for _ in range(n)]


def clustered(n: int, rng: np.random.Generator) -> np.ndarray:
    """Unit rows about common directions, as decoder rows lie; rows without any structure have no near ones."""
    centers = rng.normal(size=(max(n // 50, 1), D_MODEL)).astype(np.float32)
    rows = centers[rng.integers(0, len(centers), n)] + 0.7 * rng.standard_normal((n, D_MODEL), np.float32)
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def feature_rows(ids: np.ndarray, words: pa.Array, rng: np.random.Generator) -> pa.Table:
    """Rows of `features.parquet`."""
    n = len(ids)
    twelve = np.full(n, 12)

    def tokens() -> pa.Array:
        return _lists(twelve, words.take(pa.array(rng.integers(0, len(words), n * 12))))

    def numbers() -> pa.Array:
        return _lists(twelve, -np.sort(-rng.random((n, 12), np.float32)).ravel())

    columns = {
        "feature": ids, "n_fired": rng.integers(1, 10_000, n), "density": 10 ** rng.uniform(-6, -2, n),
        "max_act": np.full(n, 9.0), "mean_act": np.full(n, 2.0), "is_dead": np.zeros(n, bool), "promoted": tokens(),
        "promoted_logits": numbers(), "suppressed": tokens(), "suppressed_logits": numbers(),
        "histogram": _lists(np.full(n, 20), rng.integers(0, 500, n * 20)), "top_tokens": tokens(),
        "top_token_shares": numbers(),
    }  # fmt: skip
    return pa.table(columns, _FEATURES)


def example_rows(ids: np.ndarray, words: pa.Array, rng: np.random.Generator) -> pa.Table:
    """Rows of `examples.parquet`: EXAMPLES for each feature, of TOKENS tokens."""
    n = len(ids) * EXAMPLES
    lengths = np.full(n, TOKENS)
    acts = np.zeros((n, TOKENS), np.float32)
    acts[:, TOKENS // 2] = np.tile(np.linspace(9, 1, EXAMPLES), len(ids))
    text = words.take(pa.array(rng.zipf(1.2, n * TOKENS).clip(1, len(words)) - 1))
    columns = {
        "feature": np.repeat(ids, EXAMPLES), "level": np.tile(np.arange(EXAMPLES, 0, -1), len(ids)),
        "kind": ["top"] * n, "act": acts.max(1), "document": np.zeros(n), "position": np.arange(n),
        "peak": np.full(n, TOKENS // 2), "tokens": _lists(lengths, text), "acts": _lists(lengths, acts.ravel()),
    }  # fmt: skip
    return pa.table(columns, _EXAMPLES)


def measure(store: ArtifactStore, slug: str, options: argparse.Namespace) -> dict[str, float]:
    """Start the server in a process of its own, and ask it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import sys, uvicorn; from pathlib import Path; from sae_core.artifacts import ArtifactStore; "
        "from sae_core.serve import create_app; "
        "uvicorn.run(create_app(ArtifactStore(Path(sys.argv[1]))), port=int(sys.argv[2]), log_level='error')"
    )
    start = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-c", code, str(store.root), str(port)])
    try:
        base = f"http://127.0.0.1:{port}"
        wait(f"{base}/f/{slug}/0")
        found = {"start to first page, s": time.perf_counter() - start}
        found |= asyncio.run(ask(base, slug, options, server.pid))
        found |= {} if options.no_neighbors else near(store, slug, options)
        found["map, first paint, s"] = first_paint(f"{base}/map")
        found["memory, GB"] = resident(server.pid)
    finally:
        server.terminate()
        server.wait()
    return found


def wait(address: str) -> None:
    """Until the first page comes."""
    for _ in range(1200):
        try:
            httpx.get(address, timeout=60).raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise SystemExit("the server did not start within a minute")


async def ask(base: str, slug: str, options: argparse.Namespace, server: int) -> dict[str, float]:
    """The requests, READERS at a time, after one of each kind to warm up; and the processor time that each took."""
    rng, words = random.Random(1), _words(20_000)
    kinds: dict[str, Callable[[], str]] = {
        "feature page": lambda: f"{base}/f/{slug}/{rng.randrange(options.features)}",
        "word search": lambda: f"{base}/api/search?q={rng.choice(words[:2000])}",
    }
    if not options.no_neighbors:
        kinds["neighborhood page"] = lambda: f"{base}/near/{slug}/{rng.randrange(options.features)}"
    found = {}
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=READERS)) as client:
        for kind, address in kinds.items():
            begin = time.perf_counter()
            (await client.get(address())).raise_for_status()
            found[f"{kind}, first, s"] = time.perf_counter() - begin
            busy = processor_seconds(server)
            times = await at_once(
                lambda address=address: timed(client, address()), options.requests, options.pause, rng
            )
            found[f"{kind}, server CPU ms each"] = 1000 * (processor_seconds(server) - busy) / options.requests
            found[f"{kind}, p50 ms"] = 1000 * statistics.median(times)
            found[f"{kind}, p95 ms"] = 1000 * float(np.percentile(times, 95))
    return found


async def at_once(request: Callable[[], Awaitable[float]], count: int, pause: float, rng: random.Random) -> list[float]:
    """`count` requests by READERS readers, each asking again after it has read for `pause` seconds in the mean."""
    left, times = count, []

    async def reader() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await asyncio.sleep(rng.uniform(0, 2 * pause))
            times.append(await request())

    await asyncio.gather(*(reader() for _ in range(READERS)))
    return times


async def timed(client: httpx.AsyncClient, address: str) -> float:
    """Seconds until the whole answer is here."""
    start = time.perf_counter()
    (await client.get(address)).raise_for_status()
    return time.perf_counter() - start


def near(store: ArtifactStore, slug: str, options: argparse.Namespace) -> dict[str, float]:
    """The neighbor query itself, one after another."""
    index = NeighborIndex(store.get("neighbors", slug).folder)
    times = []
    for feature in random.Random(2).choices(range(options.features), k=options.requests):
        start = time.perf_counter()
        index.near(feature, 10)
        times.append(time.perf_counter() - start)
    return {"neighbor query, p95 ms": 1000 * float(np.percentile(times, 95))}


def first_paint(address: str) -> float:
    """Seconds from opening the map until its points are drawn, in headless chromium; NaN where there is none."""
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return float("nan")
    if not Path(chromium).exists():
        return float("nan")
    arguments = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as play:
        page = play.chromium.launch(executable_path=chromium, args=arguments).new_page()
        page.goto(address)
        page.wait_for_selector("#map[data-ready]", timeout=120_000)
        return float(page.get_attribute("#map", "data-ready") or "nan") / 1000


def resident(pid: int) -> float:
    """Memory of a process now, in GB, with what it maps from files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken, which hangs less on what else the machine does than the clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(found: dict[str, float]) -> None:
    """The table, with the load of the machine: beside other work, times are upper bounds."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, value in found.items():
        limit, least = LIMITS.get(name), LEAST.get(name)
        told = "" if limit is None else f"at most {limit:g}: {'met' if value <= limit else 'not met'}"
        told = told if least is None else f"at least {least:g}: {'met' if value >= least else 'not met'}"
        print(f"{name:28} {value:10.3f}   {told}")


if __name__ == "__main__":
    main()
