"""Features whose meaning is known by construction, on disk as the stages write them."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SUBJECTS = ("the old man", "a young doctor", "her brother", "the village", "our teacher", "the committee")
VERBS = ("opened", "visited", "remembered", "built", "described", "sold")
OBJECTS = ("the bridge", "a small garden", "the report", "some bread", "the castle", "an engine")


def _plain(draw: random.Random) -> str:
    return " ".join(draw.choice(words) for words in (SUBJECTS, VERBS, OBJECTS))


CONCEPTS: dict[str, tuple[str, Callable[[random.Random], str]]] = {
    "days of the week": (
        r"\b(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b",
        lambda d: f"{_plain(d)} on {d.choice(('Monday', 'Tuesday', 'Thursday', 'Friday', 'Sunday'))} and {_plain(d)}",
    ),
    "numbers and digits": (r"\d{3}", lambda d: f"{_plain(d)} in {d.randint(1100, 2024)} with {d.randint(100, 999)}"),
    "Python code": (
        r"\b(def|return|import|lambda)\b",
        lambda d: f"def {d.choice('fgh')}(x): return x + {d.randint(2, 9)} import {d.choice(('os', 'sys', 'json'))}",
    ),
    "French text": (
        r"\b(le|la|les|des|est|dans)\b",
        lambda d: " ".join(d.choice(("la maison est dans le jardin", "les enfants jouent dans la rue",
                                     "il est des villes que le vent aime")) for _ in range(2)),
    ),
    "Russian text in Cyrillic script": (
        "[а-я]{3}",
        lambda d: " ".join(d.choice(("город спит у реки", "мост и старый дом", "дети читают книгу")) for _ in range(2)),
    ),
}  # fmt: skip
"""What a feature fires on: its true name, the rule that finds it in a text, and texts that hold it."""
N_TEXTS, N_WINDOWS = 14, 8


@pytest.fixture(scope="session")
def planted(tiny_embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Features and neighbors: feature i fires on the words that rule i finds. Shown to the writer were 0, 1 and 2."""
    draw = random.Random(0)
    root = tmp_path_factory.mktemp("planted")
    examples, windows, firings = [], [], []

    def fires(rule: str, tokens: list[str]) -> list[float]:
        return [8.0 if re.search(rule, token) else 0.0 for token in tokens]

    for _, make in [*CONCEPTS.values(), ("", _plain), ("", _plain)]:
        for _ in range(N_WINDOWS):
            windows.append(re.findall(r" ?[^ ]+", make(draw)))
    for feature, (rule, make) in enumerate(CONCEPTS.values()):
        for n in range(N_TEXTS):
            tokens = re.findall(r" ?[^ ]+", make(draw))
            acts = fires(rule, tokens)
            examples.append(_example(feature, n, tokens, acts))
        for window, tokens in enumerate(windows):
            firings += [(feature, window, place, act) for place, act in enumerate(fires(rule, tokens)) if act]
    _write(root / "features.parquet", [_feature(i) for i in range(len(CONCEPTS))])
    _write(root / "examples.parquet", examples)
    _write(root / "windows.parquet", [{"window": i, "document": 1000 + i, "tokens": w} for i, w in enumerate(windows)])
    columns = list(zip(*firings, strict=True))
    pq.write_table(pa.table(dict(zip(("feature", "window", "place", "value"), map(list, columns), strict=True))),
                   root / "firings.parquet")  # fmt: skip
    n = len(CONCEPTS)
    neighbors = [{"feature": i, "rank": r, "neighbor": (i + r) % n, "cosine": 0.5} for i in range(n) for r in (1, 2)]
    _write(root / "neighbors.parquet", neighbors)
    return SimpleNamespace(
        folder=root, embedder=str(tiny_embedder), rules={name: rule for name, (rule, _) in CONCEPTS.items()}
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _example(feature: int, n: int, tokens: list[str], acts: list[float]) -> dict[str, Any]:
    level = 5 - n % 5
    return {
        "feature": feature, "level": level, "kind": "level", "act": float(level), "document": 100 * feature + n,
        "position": 0, "peak": acts.index(max(acts)), "tokens": tokens, "acts": acts,
    }  # fmt: skip


def _feature(i: int) -> dict[str, Any]:
    return {
        "feature": i, "n_fired": 100, "density": 0.001, "max_act": 8.0, "mean_act": 5.0 - i, "is_dead": False,
        "promoted": ["a"], "promoted_logits": [1.0], "suppressed": ["b"], "suppressed_logits": [-1.0],
        "histogram": [5] * 20, "top_tokens": [f"top{i}"], "top_token_shares": [1.0],
    }  # fmt: skip
