import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_core.activations import Activations
from sae_core.artifacts import SCRATCH
from sae_core.corpus import Corpus
from sae_core.dictionary import Dictionary
from sae_core.features import Features, build, build_features
from sae_core.features.examples import draw
from sae_core.features.windows import sample_windows
from sae_core.language_model import LanguageModel
from sae_core.study import FeatureSettings

SETTINGS = FeatureSettings(levels=4, top_examples=3, level_examples=2, context_tokens=12, promoted_tokens=5)


@pytest.fixture(scope="session")
def made(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("features")
    summary = run(world, folder)
    return SimpleNamespace(folder=folder, summary=summary, features=Features.open(folder))


@pytest.fixture(scope="session")
def firings(world: SimpleNamespace) -> dict[int, list[SimpleNamespace]]:
    """Every firing of every feature, found with a dense encoder and a loop."""
    dictionary, blocks = Dictionary.load(world.dictionary), Corpus.open(world.corpus).train
    found: dict[int, list[SimpleNamespace]] = defaultdict(list)
    for shard in Activations.open(world.activations).shards():
        for row, values in enumerate(dictionary.encode(shard.acts)):
            if shard.is_sink[row]:
                continue
            block, offset = int(shard.block[row]), int(shard.offset[row])
            start, stop = window(np.asarray(blocks.documents)[block], offset)
            for feature in values.nonzero().flatten().tolist():
                found[feature].append(
                    SimpleNamespace(
                        value=float(values[feature]), block=block, offset=offset, token=int(shard.token[row]),
                        document=int(blocks.documents[block, offset]), start=start, stop=stop,
                        position=int(blocks.positions[block, offset]),
                        text=tuple(np.asarray(blocks.token_ids)[block, start:stop].tolist()),
                    )
                )  # fmt: skip
    return dict(found)


def run(world: SimpleNamespace, folder: Path, settings: FeatureSettings = SETTINGS, **options: Any) -> dict[str, Any]:
    return build_features(settings, world.model, world.corpus, world.activations, world.dictionary, folder, **options)


def window(documents: np.ndarray, offset: int) -> tuple[int, int]:
    """Grow and shift a window of 12 tokens around `offset` one token at a time."""
    start = stop = offset
    while stop - start < 12:
        wants_before = offset - start < 9 or stop == len(documents) or documents[stop] != documents[offset]
        if wants_before and start > 0 and documents[start - 1] == documents[offset]:
            start -= 1
        elif stop < len(documents) and documents[stop] == documents[offset]:
            stop += 1
        else:
            break
    return start, stop


def bin_of(value: float, maximum: float, n: int) -> int:
    return next(i for i in range(1, n + 1) if value <= maximum * i / n + 1e-6 * maximum)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.parquet")}


def test_statistics_agree_with_a_loop_over_every_firing(made: SimpleNamespace, firings: dict, world: Any) -> None:
    kept = Activations.open(world.activations).n_kept
    for feature in range(24):
        row, values = made.features.feature(feature), np.array([f.value for f in firings.get(feature, [])])
        assert row.n_fired == len(values)
        assert row.density == len(values) / kept
        assert row.is_dead == (len(values) == 0) == (feature == 5)
        if len(values):
            np.testing.assert_allclose([row.max_act, row.mean_act], [values.max(), values.mean()], rtol=1e-5)
            expected = Counter(bin_of(v, values.max(), 20) for v in values)
            assert row.histogram == [expected[i] for i in range(1, 21)]


def test_a_feature_s_histogram_tells_the_rank_of_an_activation_to_within_one_bin(made: Any, firings: dict) -> None:
    for feature, all_of_it in firings.items():
        row, values = made.features.feature(feature), np.array([f.value for f in all_of_it])
        for value in values[:20].tolist():
            off = row.share(0.0, value / row.max_act) - (values < value).mean()
            assert abs(off) <= (row.histogram[bin_of(value, values.max(), 20) - 1] + 1) / len(values)


def test_top_tokens_are_the_ones_it_fires_on_most(made: SimpleNamespace, firings: dict, world: Any) -> None:
    lm = LanguageModel.load(world.model)
    for feature in (0, 7, 23):
        row, tokens = made.features.feature(feature), Counter(f.token for f in firings[feature])
        expected = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))[:5]
        assert row.top_tokens == lm.token_strings([token for token, _ in expected])
        np.testing.assert_allclose(row.top_token_shares, [n / tokens.total() for _, n in expected], rtol=1e-6)


def test_promoted_tokens_agree_with_a_full_sort_and_are_never_special(made: SimpleNamespace, world: Any) -> None:
    lm, dictionary = LanguageModel.load(world.model), Dictionary.load(world.dictionary)
    effects = dictionary.W_dec.double() @ lm.unembedding().double()
    special = set(lm.tokenizer.all_special_ids)
    for feature in range(24):
        order = [i for i in effects[feature].argsort(descending=True).tolist() if i not in special]
        row = made.features.feature(feature)
        assert row.promoted == lm.token_strings(order[:5])
        assert row.suppressed == lm.token_strings(order[::-1][:5])
        np.testing.assert_allclose(row.promoted_logits, effects[feature][order[:5]], rtol=1e-4)


def test_top_examples_are_the_strongest_of_distinct_contexts_and_texts(made: SimpleNamespace, firings: dict) -> None:
    for feature, all_of_it in firings.items():
        strongest: dict[tuple[int, int], SimpleNamespace] = {}
        for firing in sorted(all_of_it, key=lambda f: -f.value):
            strongest.setdefault((firing.block, firing.document), firing)
        by_text: dict[tuple[int, ...], SimpleNamespace] = {}
        for firing in strongest.values():
            by_text.setdefault(firing.text, firing)
        expected = [f.value for f in by_text.values()][:3]
        found = [e.act for e in made.features.examples(feature) if e.kind == "top"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_level_examples_agree_with_a_loop_that_draws_from_every_firing(made: SimpleNamespace, firings: dict) -> None:
    for feature, all_of_it in firings.items():
        maximum = max(f.value for f in all_of_it)
        places = np.array([(feature, f.block, f.offset) for f in all_of_it])
        ordered = [all_of_it[i] for i in np.argsort(draw(0, *places.T))]
        top = [e for e in made.features.examples(feature) if e.kind == "top"]
        at = {(f.document, f.position): f for f in all_of_it}
        shown = [at[e.document, e.position] for e in top]
        for level in range(4, 0, -1):
            contexts: dict[tuple[int, int], SimpleNamespace] = {}
            for f in ordered:
                if bin_of(f.value, maximum, 4) == level:
                    contexts.setdefault((f.block, f.document), f)
            texts: dict[tuple[int, ...], SimpleNamespace] = {}
            for f in contexts.values():
                texts.setdefault(f.text, f)
            fresh = [
                f for f in texts.values()
                if all((f.block, f.document) != (g.block, g.document) and f.text != g.text for g in shown)
            ]  # fmt: skip
            shown += fresh[:2]
            found = [e.act for e in made.features.examples(feature) if e.kind == "level" and e.level == level]
            np.testing.assert_allclose(found, sorted((f.value for f in fresh[:2]), reverse=True), rtol=1e-5)


def test_examples_are_true_to_the_corpus_and_to_the_encoder(made: SimpleNamespace, firings: dict, world: Any) -> None:
    lm = LanguageModel.load(world.model)
    for feature, all_of_it in firings.items():
        at = {(f.document, f.position): f for f in all_of_it}
        value = {(f.block, f.offset): f.value for f in all_of_it}
        maximum = max(f.value for f in all_of_it)
        for example in made.features.examples(feature):
            firing = at[example.document, example.position]
            assert example.level == bin_of(example.act, maximum, 4)
            assert example.peak == firing.offset - firing.start
            assert example.tokens == lm.token_strings(list(firing.text))
            expected = [value.get((firing.block, i), 0) for i in range(firing.start, firing.stop)]
            np.testing.assert_allclose(example.acts, expected, rtol=1e-5)
            assert example.acts[example.peak] == example.act


def test_examples_are_sorted_and_no_context_or_text_is_shown_twice(made: SimpleNamespace) -> None:
    table = pq.read_table(made.folder / "examples.parquet").to_pylist()
    keys = [(row["feature"], -row["level"], -row["act"]) for row in table]
    assert keys == sorted(keys)
    texts = [(row["feature"], tuple(row["tokens"])) for row in table]
    assert len(texts) == len(set(texts))
    assert not any(row["feature"] == 5 for row in table)


def test_the_summary_counts_the_dead_and_spreads_the_densities(made: SimpleNamespace, world: Any) -> None:
    summary = made.summary
    assert (summary["n_features"], summary["n_alive"], summary["n_dead"]) == (24, 23, 1)
    assert summary["dead"] == pytest.approx(1 / 24)
    assert summary["tokens"] == Activations.open(world.activations).n_kept
    assert sum(summary["density_histogram"]["features"]) == 23


def test_a_second_run_and_other_ranges_of_features_give_the_same(
    made: SimpleNamespace, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, narrow = tmp_path / "again", tmp_path / "narrow"
    again.mkdir()
    narrow.mkdir()
    run(world, again)
    assert digests(again) == digests(made.folder)
    monkeypatch.setattr(build, "_RANGE", 5)
    run(world, narrow)
    assert pq.read_table(narrow / "examples.parquet").equals(pq.read_table(made.folder / "examples.parquet"))
    for feature in range(24):
        row, expected = Features.open(narrow).feature(feature), made.features.feature(feature)
        np.testing.assert_allclose(row.promoted_logits, expected.promoted_logits, rtol=1e-5)
        assert (row.histogram, row.top_tokens, row.promoted) == (
            expected.histogram, expected.top_tokens, expected.promoted,
        )  # fmt: skip


def test_another_seed_draws_other_level_examples_and_the_same_top(
    made: SimpleNamespace, world: Any, tmp_path: Path
) -> None:
    run(world, tmp_path, SETTINGS.model_copy(update={"seed": 1}))
    other = Features.open(tmp_path)

    def shown(features: Features, kind: str) -> list[tuple[int, int]]:
        return [(e.document, e.position) for i in range(24) for e in features.examples(i) if e.kind == kind]

    assert shown(other, "top") == shown(made.features, "top")
    assert shown(other, "level") != shown(made.features, "level")


def test_a_killed_run_goes_on_from_its_shards_and_gives_the_same_bytes(
    made: SimpleNamespace, world: Any, tmp_path: Path
) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from sae_core.features import build_features
from sae_core.study import FeatureSettings, ModelSettings

def report(done, total, unit, **values):
    os.kill(os.getpid(), signal.SIGKILL)

settings = FeatureSettings.model_validate_json({SETTINGS.model_dump_json()!r})
model = ModelSettings.model_validate_json({world.model.model_dump_json()!r})
paths = [Path(p) for p in {[str(world.corpus), str(world.activations), str(world.dictionary), str(tmp_path)]!r}]
build_features(settings, model, *paths, report=report)
"""
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / SCRATCH).iterdir()] == ["firings-00000.safetensors"]
    first = (tmp_path / SCRATCH / "firings-00000.safetensors").stat().st_mtime_ns
    run(world, tmp_path)
    assert (tmp_path / SCRATCH / "firings-00000.safetensors").stat().st_mtime_ns == first
    assert digests(tmp_path) == digests(made.folder)


def test_progress_ends_at_all_tokens_and_all_features(world: Any, tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    run(world, tmp_path, report=lambda done, total, unit, **_: told.update({unit: (done, total)}))
    assert told["tokens"] == (Activations.open(world.activations).n_tokens,) * 2
    assert told["features"] == (24, 24)


def test_a_dictionary_that_never_fires_gives_empty_examples(world: Any, tmp_path: Path) -> None:
    dictionary = Dictionary.load(world.dictionary)
    dictionary.threshold.fill_(1e9)
    (tmp_path / "dead").mkdir()
    (tmp_path / "features").mkdir()
    dictionary.save(tmp_path / "dead")
    summary = build_features(
        SETTINGS, world.model, world.corpus, world.activations, tmp_path / "dead", tmp_path / "features"
    )
    assert summary["n_dead"] == 24
    assert summary["median_density"] == 0
    assert Features.open(tmp_path / "features").examples(0) == []
    assert Features.open(tmp_path / "features").feature(0).histogram == [0] * 20


@pytest.mark.parametrize(
    "change", [{"level_examples": 0}, {"levels": 1}, {"context_tokens": 500}, {"top_examples": 500}]
)
def test_extreme_settings_work(world: Any, tmp_path: Path, change: dict[str, int]) -> None:
    run(world, tmp_path, SETTINGS.model_copy(update=change))
    examples = Features.open(tmp_path).examples(3)
    assert examples
    assert all(len(e.tokens) == len(e.acts) and e.acts[e.peak] == e.act for e in examples)
    if "level_examples" in change:
        assert {e.kind for e in examples} == {"top"}


def test_a_feature_that_is_not_there_is_refused_with_the_range(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="features 0 to 23"):
        made.features.feature(24)
    with pytest.raises(Exception, match=r"missing: make the features again"):
        Features.open(tmp_path)


def test_reading_features_loads_no_torch() -> None:
    code = "import sys; from sae_core.features import Features; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_sample_holds_whole_windows_of_one_document_and_every_firing_in_them(made, firings, world):
    blocks = Corpus.open(world.corpus).train
    sampled = sample_windows(blocks, SETTINGS)
    sample = made.features.sample()
    assert len(sample.tokens) == len(sampled.block) == len(set(sampled.block.tolist())) > 20
    documents = np.asarray(blocks.documents)
    for i, (block, start, stop) in enumerate(zip(*map(np.ndarray.tolist, sampled), strict=True)):
        assert set(documents[block, start:stop].tolist()) == {sample.documents[i]}
        assert len(sample.tokens[i]) == stop - start <= SETTINGS.context_tokens
    places = {block: (i, start, stop) for i, (block, start, stop) in enumerate(zip(*sampled, strict=True))}
    for feature in range(24):
        wanted: dict[int, list[float]] = {}
        for firing in firings.get(feature, []):
            i, start, stop = places.get(firing.block, (0, 0, 0))
            if start <= firing.offset < stop:
                wanted.setdefault(i, [0.0] * (stop - start))[firing.offset - start] = firing.value
        found = sample.acts(feature)
        assert found.keys() == wanted.keys()
        assert all(found[i] == pytest.approx(wanted[i], rel=1e-5) for i in wanted)


def test_a_smaller_sample_is_part_of_a_larger_one(world):
    blocks = Corpus.open(world.corpus).train
    small, large = (sample_windows(blocks, SETTINGS.model_copy(update={"windows": n})) for n in (5, 1000))
    assert set(small.block.tolist()) < set(large.block.tolist())
