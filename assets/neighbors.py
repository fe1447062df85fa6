"""Neighbors: for each feature, those whose decoder rows point the same way."""

from typing import Any

from assets.dictionary import dictionary
from assets.per_dictionary import Task, per_dictionary
from sae_core.study import NeighborSettings


@per_dictionary(NeighborSettings, [dictionary], "atlas", {"faiss", "parquet"})
def neighbors(task: Task) -> dict[str, Any]:
    """A FAISS index over unit decoder rows, the nearest features of each, and the index's measured recall."""
    from sae_core.neighbors import build_neighbors

    draft = task.draft
    return build_neighbors(task.study.neighbors, draft.parents["dictionary"].folder, draft.folder, task.report)
