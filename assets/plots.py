"""Pictures for Dagster's pages.

Dagster draws Markdown of fewer than 1000 characters in place and puts longer Markdown behind a link. So a curve has two
forms: a small SVG that is seen at once, and a PNG that a click opens.
"""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import pyarrow.parquet as pq

from sae_core.frontier import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_core.science.scaling import Scaling

ACCENT = "#d9622b"
WIDTH, HEIGHT, POINTS = 240, 48, 40


def sparkline(values: Sequence[float], title: str) -> dg.MetadataValue:
    """The curve as an SVG of fewer than 1000 characters, with its first and last value in words."""
    if len(values) < 2:
        return dg.MetadataValue.text(title)
    picked = np.asarray(values, float)[np.linspace(0, len(values) - 1, min(POINTS, len(values))).astype(int)]
    y = HEIGHT - (picked - picked.min()) / (np.ptp(picked) or 1) * HEIGHT
    x = np.linspace(0, WIDTH, len(picked))
    path = " ".join(f"{a:.0f},{b:.0f}" for a, b in zip(x, y, strict=True))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">'
        f'<polyline points="{path}" fill="none" stroke="{ACCENT}"/></svg>'
    )
    data = base64.b64encode(svg.encode()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/svg+xml;base64,{data}) {values[0]:.3g} to {values[-1]:.3g}")


def training_curves(metrics: Path) -> dict[str, dg.MetadataValue]:
    """`metrics.parquet` of a dictionary: FVU in place, and FVU, L0, dead and learning rate as one picture.

    Nothing of a dictionary that was imported, which has no such file.
    """
    if not metrics.exists():
        return {}
    table = pq.read_table(metrics).to_pydict()
    panels = {name: (table["tokens"], table[name]) for name in ("fvu", "l0", "dead", "lr") if name in table}
    return {"fvu_curve": sparkline(table["fvu"], "fvu"), "training": _picture(panels)}


def frontier_figure(points: Sequence[Point]) -> "Figure":
    """FVU against L0: a line for each architecture and d_sae."""
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    for (architecture, d_sae), group in itertools.groupby(points, key=lambda point: (point.architecture, point.d_sae)):
        some = list(group)
        axes.plot([p.l0 for p in some], [p.fvu for p in some], marker="o", label=f"{architecture}, {d_sae:,} features")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("features active on a token (L0)")
    axes.set_ylabel("variance unexplained (FVU), held-out")
    axes.legend()
    return figure


def frontier_picture(points: Sequence[Point]) -> dict[str, dg.MetadataValue]:
    """The figure as metadata; nothing of a dictionary that stands alone."""
    return {"frontier": _png(frontier_figure(points))} if len(points) > 1 else {}


def scaling_figure(scaling: "Scaling") -> "Figure":
    """Loss against compute, with the law and the frontier; and loss against d_sae at equal compute."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.scatter([r.compute for r in scaling.grid], [r.fvu for r in scaling.grid], color="#999999", label="runs")
    left.scatter([r.compute for r in scaling.frontier], [r.fvu for r in scaling.frontier], color=ACCENT, label="best")
    compute = np.geomspace(scaling.grid[0].compute / 2, 16 * scaling.grid[-1].compute, 50)
    left.plot(compute, scaling.loss.law.at(compute), color=ACCENT, label="law")
    left.set(xlabel="compute: d_sae x steps", ylabel="variance unexplained (FVU), held-out", xscale="log", yscale="log")
    left.legend()
    for total in sorted({run.compute for run in scaling.grid}):
        profile = sorted(run for run in scaling.grid if run.compute == total)
        if len(profile) > 2:
            right.plot([r.d_sae for r in profile], [r.fvu for r in profile], marker="o", label=f"C = {total:,}")
    right.set(xlabel="d_sae, at equal compute", ylabel="FVU", xscale="log", yscale="log")
    right.minorticks_off()
    right.set_xticks(scaling.settings.d_sae, [f"{d_sae:,}" for d_sae in scaling.settings.d_sae])
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def scaling_pictures(folder: Path) -> dict[str, dg.MetadataValue]:
    """The figure of a finished sweep, as metadata."""
    from sae_core.science.scaling import REPORT, Scaling

    return {"scaling": _png(scaling_figure(Scaling.open(folder / REPORT)))}


def score_histograms(scores: Mapping[str, Mapping[str, Sequence[float | None]]]) -> dict[str, dg.MetadataValue]:
    """How many labels got which score, beside what another's label and the lexical one got; none without scores."""
    if not scores:
        return {}
    figure = _figure(4 * len(scores), 2.6)
    for axes, (scorer, found) in zip(np.atleast_1d(figure.subplots(1, len(scores))), scores.items(), strict=True):
        values = [[value for value in of if value is not None] for of in found.values()]
        everything = [0.0, 1.0, *itertools.chain(*values)]  # specificity goes up to 3, a correlation below 0
        bins = np.linspace(min(everything), max(everything), 21)
        axes.hist(values, bins, label=list(found), color=[ACCENT, "#999999", "#4c78a8"])
        axes.set_title(scorer)
        axes.set_xlabel("score")
        axes.legend(fontsize="small")
    return {"scores": _png(figure)}


def scatter(points: Path) -> dg.MetadataValue:
    """`map.parquet` as a picture: a point for each feature, colored by cluster."""
    table = pq.read_table(points).to_pydict()
    figure = _figure(6, 6)
    axes = figure.add_subplot()
    axes.scatter(table["x"], table["y"], c=table["cluster"], s=1, cmap="tab20")
    axes.set_axis_off()
    return _png(figure)


def _picture(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dg.MetadataValue:
    figure = _figure(3 * len(panels), 2.4)
    for axes, (name, (x, y)) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.plot(x, y, color=ACCENT)
        axes.set_title(name)
        axes.set_xlabel("tokens")
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # half a second, which only a step that draws should pay

    return Figure(figsize=(width, height), dpi=80, layout="tight")


def _png(figure: "Figure") -> dg.MetadataValue:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return dg.MetadataValue.md(f"![picture](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})")
