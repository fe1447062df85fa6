"""The stage `steering_report`."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.artifacts import write_atomically
from sae_core.corpus import Corpus
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.progress import Report, silent
from sae_core.steering_levers import levers
from sae_core.steering_report.measuring import measure
from sae_core.steering_report.rows import REPORT, SCHEMA, raised
from sae_core.steering_report.writing import markdown
from sae_core.steering_texts import Subject
from sae_core.study import ModelSettings, Packing, SteeringReportSettings

LEVERS, MARKDOWN = "levers.parquet", "report.md"
_LEVERS_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("change", pa.string()), ("rise", pa.float32()), ("low", pa.float32()),
        ("high", pa.float32()), ("n_windows", pa.int32()),
    ]
)  # fmt: skip


def build_steering_report(
    settings: SteeringReportSettings, model: ModelSettings, site: Site, sink_norm: float, dictionary: Path,
    features: Path, scores: Path, corpus: Path, packing: Packing, folder: Path, device: str = "cpu",
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write `steering_report.parquet` (columns as in `Row`), `levers.parquet` and `report.md` into `folder`.

    Args:
        settings: how much is measured.
        model: the language model, run in float32.
        site: where the dictionary reads it.
        sink_norm: norm above which an activation is an attention sink.
        dictionary: folder of the finished dictionary.
        features: folder of its features.
        scores: folder of their output scores.
        corpus: folder of the finished corpus: its words say which are rare, its held-out text is for the levers test.
        packing: whether attention restarts at each document of it.
        folder: where to write.
        device: where to compute.
        report: progress, in texts.

    Returns:
        Features measured; how many raise their concept tenfold within the perplexity bound, on the reporting half;
        mean concept rates of all conditions.
    """
    subject = Subject.open(
        LanguageModel.load(model, device, precision="float32"), site, dictionary, features, sink_norm
    )
    rates = subject.word_rates(Corpus.open(corpus).train.token_ids)
    rows = measure(subject, scores, rates, settings, report)
    chosen = list(dict.fromkeys(row.feature for row in rows))
    pulled = levers(subject, chosen, corpus, packing, settings.lever_tokens, settings.seed, report)
    with write_atomically(folder / REPORT) as path:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], SCHEMA), path)
    with write_atomically(folder / MARKDOWN) as path:
        path.write_text(markdown(rows, pulled, settings.perplexity_ratio_max), "utf-8")
    with write_atomically(folder / LEVERS) as path:
        pq.write_table(pa.Table.from_pylist([lever._asdict() for lever in pulled], _LEVERS_SCHEMA), path)
    reported = [row for row in rows if row.half == "report"]
    kinds = sorted({row.condition for row in reported})
    means = {
        f"rate_{kind}": float(np.mean([r.concept_rate for r in reported if r.condition == kind])) for kind in kinds
    }
    return {"n_features": len(chosen), "n_raised": len(raised(rows, settings.perplexity_ratio_max)), **means}
