"""The finished atlas, read: search by words, one feature with everything about it, which features fire on a text.

    reader      `Atlas`: one dictionary's features
    shapes      what it answers with
    words       features found by the words of a query
    fused       these together with those found by its meaning
    counter     text in which what is said of a feature would mislead
    choosing    how found features are filtered and sorted
    lists       features worth a look
    tables      the stages' files as tables of DuckDB; `write_views` gives a person the same in one file

Every answer is a query on the Parquet files that the stages made. Light until `Atlas.explain`, which needs the language
model and therefore torch.
"""

from sae_core.atlas.choosing import SORTS, Filters, SearchError
from sae_core.atlas.reader import Atlas, sink_norm
from sae_core.atlas.shapes import Ancestor, ExplainedToken, FeatureCard, Fired, Hit, Neighbor, Place
from sae_core.atlas.tables import write_views

__all__ = [
    "SORTS", "Ancestor", "Atlas", "ExplainedToken", "FeatureCard", "Filters", "Fired", "Hit", "Neighbor", "Place",
    "SearchError", "sink_norm", "write_views",
]  # fmt: skip
