"""Corpus: documents, de-duplicated, tokenized, packed into blocks, split into train and held-out."""

from typing import Any

import dagster as dg

from assets.checks import specs
from assets.partitions import corpora
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Draft, Made
from sae_core.progress import Report
from sae_core.stages import VERSIONS
from sae_core.studies import Order
from sae_core.study import CorpusSettings

CorpusRun = launchpad(CorpusSettings, "name", "sources")


@dg.asset(
    partitions_def=corpora,
    group_name="corpus",
    kinds={"parquet", "huggingface"},
    code_version=str(VERSIONS["corpus"]),
    check_specs=specs("corpus"),
)
def corpus(context: dg.AssetExecutionContext, config: CorpusRun, workshop: Workshop) -> dg.MaterializeResult:
    """Text from the study's sources as documents and as blocks of tokens, each traceable to the other."""
    from sae_core.corpus import build_corpus
    from sae_core.door import require_batch, require_site

    def build(order: Order, draft: Draft, report: Report) -> dict[str, Any]:
        require_site(order.study, report)
        summary = build_corpus(order.study.corpus, order.study.model, draft.folder, report)
        require_batch(order.study, summary)
        return summary

    return workshop.make(context, "corpus", config, build, _sources)


def _sources(made: Made) -> dict[str, Any]:
    return {"sources": dg.MetadataValue.table([dg.TableRecord(row) for row in made.manifest.summary["sources"]])}
