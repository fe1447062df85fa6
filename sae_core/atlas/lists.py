"""Features worth a look, which no search finds."""

import numpy as np

from sae_core.atlas.choosing import Found
from sae_core.atlas.tables import Tables


def multilingual(tables: Tables, n_features: int) -> Found:
    """Features whose strongest examples lie in several languages; the more evenly (by entropy), the more relevant.

    None where the languages of documents are not known.
    """
    if "language" not in tables.columns("documents"):
        return _found({}, {}, n_features)
    rows = tables.query("""
        SELECT feature, -sum(n / total * ln(n / total)),
            'languages: ' || string_agg(language, ', ' ORDER BY n DESC, language)
        FROM (SELECT feature, language, count(*) AS n, sum(count(*)) OVER (PARTITION BY feature) AS total
              FROM examples JOIN documents USING (document) WHERE language <> '' AND examples.kind = 'top'
              GROUP BY feature, language)
        GROUP BY feature HAVING count(*) > 1""")
    return _found({i: entropy for i, entropy, _ in rows}, {i: told for i, _, told in rows}, n_features)


def newest(tables: Tables, n_features: int) -> Found:
    """Features that the last retraining brought; none where there was none."""
    if "lineage" not in tables:
        return _found({}, {}, n_features)
    last = "generation = (SELECT max(generation) FROM lineage)"
    fates = dict(tables.query(f"SELECT feature, fate FROM lineage WHERE fate IN ('born', 'split') AND {last}"))
    return _found(dict.fromkeys(fates, 0.0), fates, n_features)


def safety(tables: Tables, n_features: int) -> Found:
    """The best feature for each concept of the safety audit that it was told apart by; none before the audit is made.

    Those that were found come before those that are in part, or stand for something else.
    """
    if not {"concept", "kind", "status", "rank", "auc"} <= tables.columns("audit"):
        return _found({}, {}, n_features)
    rows = tables.query("""
        SELECT feature, max(auc + if(status = 'found', 1, 0)), string_agg(
            format('{} ({}, AUC {:.2f})', replace(concept, '_', ' '), status, auc), '; ' ORDER BY auc DESC, concept)
        FROM audit WHERE kind = 'safety' AND rank = 1 AND status IN ('found', 'partly', 'stand-in') GROUP BY feature""")
    return _found({i: auc for i, auc, _ in rows}, {i: told for i, _, told in rows}, n_features)


def _found(relevance: dict[int, float], why: dict[int, str], n_features: int) -> Found:
    total = np.zeros(n_features)
    total[list(relevance)] = [*relevance.values()]
    return Found(np.array(sorted(relevance), np.int64), total, lambda feature: why[feature])
