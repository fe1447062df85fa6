"""All dictionaries side by side."""

from pathlib import Path

from sae_core.artifacts import ArtifactStore, Recipe
from sae_core.frontier import Point, frontier
from sae_core.names import Site

HERE, THERE = Site("m", "resid_post", 3, "text"), Site("m", "resid_post", 4, "text")


def test_points_come_by_architecture_width_and_l0_and_only_of_the_site_asked_for(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for site, name, l0 in (
        (HERE, "top_k.w64.k8", 8.1), (HERE, "batch_top_k.w64.k8", 8.3), (HERE, "batch_top_k.w64.k4", 4.0),
        (HERE, "batch_top_k.w32.k4", 3.9), (THERE, "relu.w64.l5", 70.0),
    ):  # fmt: skip
        numbers = {"l0": l0, "fvu": 1 / l0, "dead": 0, "ce_recovered": 0.9}
        store.make(Recipe("dictionary", f"{site.slug}.{name}", 1, {}), lambda draft, numbers=numbers: numbers)
    here = frontier(store, HERE)
    assert [(p.architecture, p.d_sae, p.l0) for p in here] == [
        ("batch_top_k", 32, 3.9), ("batch_top_k", 64, 4.0), ("batch_top_k", 64, 8.3), ("top_k", 64, 8.1),
    ]  # fmt: skip
    assert here[0] == Point(f"{HERE.slug}.batch_top_k.w32.k4", "batch_top_k", 32, 3.9, 1 / 3.9, 0.0, 0.9)
    assert len(frontier(store)) == 5


def test_nothing_made_is_no_point(tmp_path: Path) -> None:
    assert frontier(ArtifactStore(tmp_path)) == []
