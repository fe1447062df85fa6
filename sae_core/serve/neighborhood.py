"""A feature and its nearest ones as a picture (Templeton et al. 2024, feature neighborhoods), laid out on the server.

The distance from the center is the angle between decoder rows. Around the center, features whose rows leave the
center's in similar directions stand side by side: their order is that of the two main axes of what the rows have
beside the center's part, evenly spread so that labels can be read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from sae_core.labels.reader import doubted
from sae_core.neighbor_index import NeighborIndex

COUNT = 40
"""Features around the center."""
WIDTH, HEIGHT = 1100, 760
"""Units of the picture."""

_INNER, _OUTER = 0.24, 0.94  # where the nearest and the farthest lie, as shares of the half axes
_CHARACTER, _LINE = 6.6, 17  # room that a character and a line of a label take
_LONGEST = 30  # characters of a label


@dataclass(frozen=True, slots=True)
class Point:
    """A feature in the picture."""

    feature: int
    name: str
    cosine: float
    x: float
    y: float
    label: str
    """What is written beside it; empty where there is no room."""
    left: bool
    """The label ends at the point, rather than beginning there."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Where features of one similarity lie."""

    cosine: float
    rx: float
    ry: float


@dataclass(frozen=True, slots=True)
class Neighborhood:
    """The picture: the points, nearest first, and the rings behind them, about the middle of WIDTH x HEIGHT."""

    feature: int
    points: list[Point]
    rings: list[Ring]


def neighborhood(
    index: NeighborIndex, feature: int, name: Callable[[int], str], count: int = COUNT,
    beats: Callable[[int], bool | None] = lambda feature: None,
) -> Neighborhood:  # fmt: skip
    """The picture of a feature, and its neighbors' labels: `beats` says whether they beat their control.

    Raises NeighborError for an unknown feature.
    """
    cosines, found = index.near(feature, count)
    if not len(found):
        return Neighborhood(feature, [], [])
    center, *_ = index.rows(np.array([feature]))
    turn = _order(index.rows(found) - cosines[:, None] * center)
    away = _radius(cosines, cosines)
    x = WIDTH / 2 * (1 + away * np.cos(turn) * 0.72)  # room for labels at both sides
    y = HEIGHT / 2 * (1 + away * np.sin(turn))
    doubts = [" (doubtful)" if beats(int(i)) is False else "" for i in found]
    labels = [(_short(name(int(i))) or str(i)) + doubt for i, doubt in zip(found, doubts, strict=True)]
    shown = _with_room(x, y, labels)
    points = [
        Point(int(i), doubted(name(int(i)), beats(int(i))), float(c), round(float(px), 1), round(float(py), 1),
              label if room else "", bool(px < WIDTH / 2))
        for i, c, px, py, label, room in zip(found, cosines, x, y, labels, shown, strict=True)
    ]  # fmt: skip
    return Neighborhood(feature, points, _rings(cosines))


def _order(rest: Float32[np.ndarray, "n d_model"]) -> Float64[np.ndarray, " n"]:
    """An angle for each neighbor: evenly spread, in the order of the angles on the rests' two main axes."""
    flat = rest / np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
    u, s, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    axes = np.pad(u * s, ((0, 0), (0, 2)))[:, :2]
    rank = np.argsort(np.argsort(np.arctan2(axes[:, 1], axes[:, 0]), kind="stable"), kind="stable")
    return (rank + 0.5) / len(rank) * math.tau


def _radius(cosines: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Share of the half axes at which each cosine in `of` lies, when the picture spans `cosines`."""
    angles, span = np.arccos(of), np.arccos([cosines.max(), cosines.min()])
    return _INNER + (_OUTER - _INNER) * (angles - span[0]) / max(span[1] - span[0], 1e-6)


def _rings(cosines: Float32[np.ndarray, " n"]) -> list[Ring]:
    """Rings at round cosines within the picture."""
    low, high = math.ceil(float(cosines.min()) * 20), math.floor(float(cosines.max()) * 20)
    step = max(1, (high - low) // 3)
    at = np.arange(low, high + 1, step) / 20
    return [
        Ring(float(c), round(WIDTH / 2 * 0.72 * float(r), 1), round(HEIGHT / 2 * float(r), 1))
        for c, r in zip(at, _radius(cosines, at), strict=True)
    ]


def _short(name: str) -> str:
    name = " ".join(name.removeprefix("fires on ").partition(" · promotes")[0].split())  # of a lexical label
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _with_room(x: np.ndarray, y: np.ndarray, labels: list[str]) -> list[bool]:
    """Which labels can be written without covering one of a nearer feature, or the center's own."""
    taken = [(WIDTH / 2 - 120, HEIGHT / 2 - 14, WIDTH / 2 + 120, HEIGHT / 2 + 40)]
    shown = []
    for px, py, label in zip(x, y, labels, strict=True):
        long = len(label) * _CHARACTER + 10
        box = (px - long if px < WIDTH / 2 else px, py - _LINE / 2, px if px < WIDTH / 2 else px + long, py + _LINE / 2)
        free = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
        taken += [box] if free else []
        shown.append(free)
    return shown
