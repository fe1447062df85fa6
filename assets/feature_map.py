"""Feature map: a picture of all features in the plane, and their clusters."""

from typing import Any

from assets.dictionary import dictionary
from assets.per_dictionary import Task, per_dictionary
from assets.plots import scatter
from sae_core.artifacts import Made
from sae_core.study import FeatureMapSettings


def _picture(made: Made) -> dict[str, Any]:
    return {"map": scatter(made.folder / "map.parquet")}


@per_dictionary(FeatureMapSettings, [dictionary], "atlas", {"parquet"}, _picture)
def feature_map(task: Task) -> dict[str, Any]:
    """UMAP of the decoder rows, and HDBSCAN clusters: nearby features mean similar things."""
    from sae_core.feature_map import build_feature_map

    draft = task.draft
    return build_feature_map(task.study.feature_map, draft.parents["dictionary"].folder, draft.folder, task.report)
