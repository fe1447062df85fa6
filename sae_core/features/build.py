"""The features stage: one pass of the dictionary over the activations, then range by range of features.

The pass leaves sparse firings in scratch (see `firings`); a killed run keeps those. Everything after it is exact:
the maximum of a feature is known before its levels and its histogram are made.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sae_core.activations import Activations
from sae_core.artifacts import SCRATCH, require_space, write_atomically
from sae_core.by_feature import ROW_GROUP
from sae_core.corpus import Blocks, Corpus
from sae_core.dictionary import Dictionary
from sae_core.features.examples import Candidates, Pool, acts_in_windows, bins, text_in_windows
from sae_core.features.firings import FiringStore
from sae_core.features.logits import logit_effects
from sae_core.features.reader import EXAMPLES, FEATURES, FIRINGS, WINDOWS, FeatureError
from sae_core.features.statistics import Counts, Totals, summarize, totals
from sae_core.features.windows import SCHEMA, Sampled, firings_in, sample_windows
from sae_core.language_model import LanguageModel
from sae_core.progress import Report, silent
from sae_core.study import FeatureSettings, ModelSettings

_RANGE = 256  # features worked on at once, fewer where the vocabulary is large:
_COUNTERS = 2**24  # one counter for each feature of the range and each token

_STRINGS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.float32())
_FEATURES = pa.schema(
    [
        ("feature", pa.int32()), ("n_fired", pa.int64()), ("density", pa.float64()), ("max_act", pa.float32()),
        ("mean_act", pa.float32()), ("is_dead", pa.bool_()), ("promoted", _STRINGS), ("promoted_logits", _FLOATS),
        ("suppressed", _STRINGS), ("suppressed_logits", _FLOATS), ("histogram", pa.list_(pa.int64())),
        ("top_tokens", _STRINGS), ("top_token_shares", _FLOATS),
    ]
)  # fmt: skip
_EXAMPLES = pa.schema(
    [
        ("feature", pa.int32()), ("level", pa.int32()), ("kind", pa.string()), ("act", pa.float32()),
        ("document", pa.int32()), ("position", pa.int32()), ("peak", pa.int32()), ("tokens", _STRINGS),
        ("acts", _FLOATS),
    ]
)  # fmt: skip
_WINDOWS = pa.schema([("window", pa.int32()), ("document", pa.int32()), ("tokens", _STRINGS)])


BYTES_A_FIRING, BYTES_A_TOKEN = 8, 40
"""Scratch: row and value of a firing; token, place and its two windows of a token."""


def build_features(
    settings: FeatureSettings, model: ModelSettings, corpus: Path, activations: Path, dictionary: Path, folder: Path,
    device: str = "cpu", report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write `features.parquet`, `examples.parquet`, `windows.parquet` and `firings.parquet` into `folder`.

    All of it is from the training split. The last two are a sample of the text with every firing in it.

    Args:
        settings: what is kept.
        model: the language model, for its unembedding and its tokens' text.
        corpus: folder of the finished corpus.
        activations: folder of the finished activations.
        dictionary: folder of the finished dictionary.
        folder: where to write; a killed run's scratch in it is used again.
        device: where the dictionary is run.
        report: progress, in tokens and then in features.

    Returns:
        Numbers of features alive, dead and dense, the tokens seen (sinks left out), and the spread of densities.

    Raises:
        FeatureError: there are no activations.
    """
    sources = _open(model, corpus, activations, dictionary, device)
    if not sources.activations.n_kept:
        raise FeatureError(f"{activations} holds no activations to look at: give the corpus more text")
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    active = int(sources.dictionary.config.get("k", 1))
    require_space(folder, sources.activations.n_tokens * (BYTES_A_FIRING * active + BYTES_A_TOKEN))
    store = FiringStore(scratch, sum(1 for _ in sources.activations.shards()))
    store.fill(sources.activations, sources.corpus, sources.dictionary, settings.context_tokens, report)
    n_fired = _write(settings, sources, store, folder, report)
    return summarize(n_fired, sources.activations.n_kept)


class _Sources(NamedTuple):
    corpus: Blocks
    activations: Activations
    dictionary: Dictionary
    unembedding: Tensor
    strings: pa.Array
    """Display string of each token of the tokenizer; empty for ids beyond it."""
    shown: Tensor
    """Which tokens may be listed as promoted: no special ones, none beyond the tokenizer."""


def _open(model: ModelSettings, corpus: Path, activations: Path, dictionary: Path, device: str) -> _Sources:
    """Everything that the stage reads; of the language model only what is needed stays in memory."""
    lm = LanguageModel.load(model)
    unembedding = lm.unembedding()
    n_tokens, vocab = len(lm.tokenizer), unembedding.shape[1]
    shown = torch.zeros(vocab, dtype=torch.bool)
    shown[:n_tokens] = True
    shown[[i for i in lm.tokenizer.all_special_ids if i < vocab]] = False
    return _Sources(
        Corpus.open(corpus).train, Activations.open(activations, device=device), Dictionary.load(dictionary).to(device),
        unembedding, pa.array(lm.token_strings(range(vocab)), pa.string()), shown,
    )  # fmt: skip


def _write(
    settings: FeatureSettings, sources: _Sources, store: FiringStore, folder: Path, report: Report
) -> np.ndarray:
    """Write all tables, range by range of features; returns n_fired of every feature."""
    d_sae, n_fired = sources.dictionary.d_sae, []
    sampled = sample_windows(sources.corpus, settings)
    with write_atomically(folder / WINDOWS) as windows_path:
        pq.write_table(_window_table(sampled, sources), windows_path)
    width = max(1, min(_RANGE, _COUNTERS // len(sources.strings)))
    with (
        write_atomically(folder / FEATURES) as features_path, write_atomically(folder / EXAMPLES) as examples_path,
        write_atomically(folder / FIRINGS) as firings_path,
        pq.ParquetWriter(features_path, _FEATURES) as features_file,
        pq.ParquetWriter(examples_path, _EXAMPLES) as examples_file,
        pq.ParquetWriter(firings_path, SCHEMA) as firings_file,
    ):  # fmt: skip
        for start in range(0, d_sae, width):
            features = range(start, min(start + width, d_sae))
            found = totals(store.read(features), len(features))
            counts = Counts(found.maximum, len(sources.strings))
            pool = Pool(features, found.maximum, settings)
            for firings in store.read(features):
                counts.add(firings)
                pool.add(firings)
            features_file.write_table(_feature_table(features, found, counts, settings, sources))
            examples = _example_table(features, found, pool.choose(), settings, sources, store)
            examples_file.write_table(examples, row_group_size=ROW_GROUP)
            firings_file.write_table(firings_in(sampled, features, store.read(features)), row_group_size=32 * ROW_GROUP)
            n_fired.append(found.n_fired)
            report(features.stop, d_sae, "features")
    return np.concatenate(n_fired)


def _feature_table(
    features: range, found: Totals, counts: Counts, settings: FeatureSettings, sources: _Sources
) -> pa.Table:
    n = len(features)
    W_dec = sources.dictionary.W_dec[features.start : features.stop].float().cpu()
    effects = logit_effects(W_dec, sources.unembedding, sources.shown, settings.promoted_tokens)
    feature, token, count = counts.top_tokens(settings.promoted_tokens)
    per_feature = np.bincount(feature, minlength=n)
    rows = np.full(n, effects.promoted.shape[1])
    columns = {
        "feature": np.arange(features.start, features.stop),
        "n_fired": found.n_fired,
        "density": found.n_fired / sources.activations.n_kept,
        "max_act": found.maximum,
        "mean_act": found.mean,
        "is_dead": found.n_fired == 0,
        "promoted": _lists(rows, sources.strings.take(pa.array(effects.promoted.flatten().numpy()))),
        "promoted_logits": _lists(rows, effects.promoted_logits.flatten().numpy()),
        "suppressed": _lists(rows, sources.strings.take(pa.array(effects.suppressed.flatten().numpy()))),
        "suppressed_logits": _lists(rows, effects.suppressed_logits.flatten().numpy()),
        "histogram": _lists(np.full(n, counts.histogram.shape[1]), counts.histogram.ravel()),
        "top_tokens": _lists(per_feature, sources.strings.take(pa.array(token))),
        "top_token_shares": _lists(per_feature, (count / found.n_fired[feature]).astype(np.float32)),
    }
    return pa.table(columns, _FEATURES)


def _example_table(
    features: range, found: Totals, chosen: Candidates, settings: FeatureSettings, sources: _Sources,
    store: FiringStore,
) -> pa.Table:  # fmt: skip
    acts = acts_in_windows(chosen, store.read(features), settings.context_tokens)
    ids, inside = text_in_windows(chosen, sources.corpus, settings.context_tokens)
    place = chosen["block"], chosen["offset"]
    lengths = inside.sum(1)
    columns = {
        "feature": chosen["feature"] + features.start,
        "level": bins(chosen["value"], found.maximum[chosen["feature"]], settings.levels) + 1,
        "kind": np.where(chosen["group"] == 0, "top", "level"),
        "act": chosen["value"],
        "document": np.asarray(sources.corpus.documents[place]),
        "position": np.asarray(sources.corpus.positions[place]),
        "peak": chosen["offset"] - chosen["start"],
        "tokens": _lists(lengths, sources.strings.take(pa.array(ids[inside]))),
        "acts": _lists(lengths, acts[inside]),
    }
    return pa.table(columns, _EXAMPLES)


def _window_table(sampled: Sampled, sources: _Sources) -> pa.Table:
    lengths = sampled.stop - sampled.start
    place = sampled.start[:, None] + np.arange(lengths.max(initial=0))
    inside = place < sampled.stop[:, None]
    ids = np.asarray(sources.corpus.token_ids[sampled.block[:, None], np.where(inside, place, 0)])
    columns = {
        "window": np.arange(len(lengths)),
        "document": np.asarray(sources.corpus.documents[sampled.block, sampled.start]),
        "tokens": _lists(lengths, sources.strings.take(pa.array(ids[inside]))),
    }
    return pa.table(columns, _WINDOWS)


def _lists(lengths: np.ndarray, values: Any) -> pa.ListArray:
    """Lists of the given lengths, cut one after another out of `values`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values))
