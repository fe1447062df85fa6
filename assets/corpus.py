"""Corpus: documents, de-duplicated, tokenized, packed into blocks, split into train and held-out."""

from typing import Any

import dagster as dg

from assets.checks import specs
from assets.partitions import corpora
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made
from sae_core.stages import VERSIONS
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

    return workshop.make(
        context, "corpus", config,
        lambda order, draft, report: build_corpus(order.study.corpus, order.study.model, draft.folder, report),
        _sources,
    )  # fmt: skip


def _sources(made: Made) -> dict[str, Any]:
    return {"sources": dg.MetadataValue.table([dg.TableRecord(row) for row in made.manifest.summary["sources"]])}
