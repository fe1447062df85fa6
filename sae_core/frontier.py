"""All dictionaries that were made, side by side: what each costs in active features, and what it explains with them."""

from typing import NamedTuple

from sae_core.artifacts import ArtifactStore
from sae_core.names import DictionarySpec, Site


class Point(NamedTuple):
    """One dictionary; numbers are those of `sae_core.metrics`, on held-out documents."""

    name: str
    architecture: str
    d_sae: int
    l0: float
    fvu: float
    dead: float
    ce_recovered: float
    """Against mean ablation."""


def frontier(store: ArtifactStore, site: Site | None = None) -> list[Point]:
    """Every finished dictionary, or those of a site; by architecture, d_sae and L0. Raises ArtifactError on damage."""
    points = []
    for slug in store.slugs("dictionary"):
        spec, summary = DictionarySpec.parse(slug), store.get("dictionary", slug).manifest.summary
        if site in (None, spec.site):
            numbers = (float(summary[key]) for key in ("l0", "fvu", "dead", "ce_recovered"))
            points.append(Point(slug, spec.architecture, spec.d_sae, *numbers))
    return sorted(points, key=lambda point: point[1:])
