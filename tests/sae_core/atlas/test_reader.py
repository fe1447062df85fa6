import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sae_core.artifacts import ArtifactError, ArtifactStore, Recipe
from sae_core.atlas import Atlas, Filters, SearchError, write_views
from sae_core.dictionary import Dictionary
from sae_core.features.reader import FeatureError
from sae_core.language_model import LanguageModel
from sae_core.study import ModelSettings

SITE = "tiny-llama.resid_post.L01.mini"
SLUG = f"{SITE}.batch_top_k.w8.k2"
WORDS = ["bridge", "river", "def", "мост", "100%", "日本語の橋", "it's", "dead"]
LABELS = ["Golden Gate bridge", "rivers and streams", "", "bridges in Russian", "percent signs", "", "quotes", ""]


def write(folder: Path, name: str, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), folder / name)


def write_features(folder: Path) -> None:
    n = len(WORDS)
    write(folder, "features.parquet", {
        "feature": pa.array(range(n), pa.int32()), "n_fired": [10] * (n - 1) + [0],
        "density": [0.01 * i for i in range(n)],
        "max_act": [2.0] * n, "mean_act": [1.0] * n, "is_dead": [False] * (n - 1) + [True],
        "promoted": [[f" {w}", "x"] for w in WORDS], "promoted_logits": [[2.0, 1.0]] * n,
        "suppressed": [["z"]] * n, "suppressed_logits": [[-1.0]] * n, "histogram": [[1] * 20] * n,
        "top_tokens": [[w] for w in WORDS], "top_token_shares": [[1.0]] * n,
    })  # fmt: skip
    examples = [(i, w, j) for i, w in enumerate(WORDS[:-1]) for j in range(2)]
    write(folder, "examples.parquet", {
        "feature": pa.array([i for i, _, _ in examples], pa.int32()), "level": [5 - j for _, _, j in examples],
        "kind": ["top" if j == 0 else "level" for *_, j in examples], "act": [2.0 - j for *_, j in examples],
        "document": [0] * len(examples), "position": [3] * len(examples), "peak": [1] * len(examples),
        "tokens": [["the", f" {w}", f" over\n common {j}"] for _, w, j in examples],
        "acts": [[0.0, 2.0 - j, 0.0] for *_, j in examples],
    })  # fmt: skip


def write_labels(folder: Path) -> None:
    n = len(WORDS)
    write(folder, "labels.parquet", {
        "feature": range(n), "label": LABELS, "description": [f"fires on {w}" for w in WORDS],
        "lexical": [f"'{w}'" for w in WORDS], "confidence": [0.5] * n,
    })  # fmt: skip


def write_neighbors(folder: Path) -> None:
    write(folder, "neighbors.parquet", {
        "feature": [0, 0, 1], "rank": [2, 1, 1], "neighbor": [2, 3, 0], "cosine": [0.5, 0.9, 0.1],
    })  # fmt: skip


def write_map(folder: Path) -> None:
    write(folder, "map.parquet", {"feature": range(8), "x": [0.5] * 8, "y": [1.5] * 8, "cluster": [0] * 7 + [-1]})


def write_dictionary(folder: Path) -> None:
    W_dec = torch.nn.functional.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    Dictionary(
        W_dec.T.clone(), torch.zeros(8), W_dec, torch.zeros(32), torch.zeros(8), {"architecture": "batch_top_k", "k": 2}
    ).save(folder)
    write(folder, "metrics.parquet", {"step": [1, 2], "fvu": [0.5, 0.4]})


def write_corpus(folder: Path) -> None:
    write(folder, "documents.parquet", {"document": [0, 1], "text": ["a 'quoted' text", "two"]})


def write_activations(folder: Path) -> dict[str, float]:
    for split in ("train", "held_out"):
        save_file({
            "acts": torch.zeros(2, 32), "block": torch.zeros(2).int(), "token": torch.zeros(2).int(),
            "offset": torch.arange(2).int(), "is_sink": torch.zeros(2).bool(), "kept_sum": torch.zeros(32).double(),
            "kept_square_norm": torch.zeros(1).double(), "n_kept": torch.tensor([2]), "median_norm": torch.ones(1),
        }, folder / f"{split}-00000.safetensors")  # fmt: skip
    save_file({"mean": torch.zeros(32), "mean_square_norm": torch.full((1,), 1e6)}, folder / "statistics.safetensors")
    return {"median_norm": 1000.0}


STAGES = {
    "corpus": ("mini", write_corpus, {"block_tokens": 8}),
    "activations": (SITE, write_activations, {"sink_norm": 10.0}),
    "dictionary": (SLUG, write_dictionary, {}),
    "features": (SLUG, write_features, {}),
    "labels": (SLUG, write_labels, {}),
    "neighbors": (SLUG, write_neighbors, {}),
    "feature_map": (SLUG, write_map, {}),
}


def make(store: ArtifactStore, *stages: str) -> None:
    for stage in stages:
        slug, fill, settings = STAGES[stage]
        store.make(Recipe(stage, slug, 1, settings), lambda draft, fill=fill: fill(draft.folder) or {})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A finished atlas in a folder whose name is hard on SQL."""
    store = ArtifactStore(tmp_path / "it's 100% here")
    make(store, *STAGES)
    return store


@pytest.fixture
def atlas(store: ArtifactStore) -> Atlas:
    return Atlas.open(store, SLUG)


def features(atlas: Atlas, query: str, **options: Any) -> list[int]:
    return [hit.feature for hit in atlas.search(query, **options)]


def test_a_label_counts_more_than_an_example(atlas: Atlas) -> None:
    hits = atlas.search("bridge")
    assert [hit.feature for hit in hits] == [0, 3]  # "bridges" too: a word matches at its start
    assert hits[0].label == "Golden Gate bridge"
    assert hits[0].why == "label: Golden Gate bridge"
    assert hits[0].score > hits[1].score > 0


def test_several_words_rank_the_feature_that_has_them_all_first(atlas: Atlas) -> None:
    assert features(atlas, "RUSSIAN bridge")[0] == 3
    assert features(atlas, "golden gate")[0] == 0
    assert features(atlas, "gate golden")[0] == 0


def with_meaning(atlas: Atlas, near: list[tuple[float, int]]) -> Atlas:
    """The atlas with an index of meaning that finds the same, whatever is asked."""

    class Found:
        def find(self, query: str) -> tuple[np.ndarray, np.ndarray]:
            cosines, features = zip(*near, strict=True) if near else ((), ())
            return np.array(cosines, np.float32), np.array(features, np.int64)

    atlas.__dict__["_meaning"] = Found()
    return atlas


def test_what_words_and_meaning_find_comes_before_what_one_of_them_finds(atlas: Atlas) -> None:
    by_words = features(atlas, "bridge")
    assert by_words == [0, 3]
    hits = with_meaning(atlas, [(0.9, 1), (0.5, 3)]).search("bridge")
    assert [hit.feature for hit in hits] == [3, 0, 1]  # 1/62 + 1/62, then 1/61 twice, the lower number first
    assert [hit.meaning for hit in hits] == [pytest.approx(0.5), None, pytest.approx(0.9)]
    assert hits[0].why.startswith("label: ")
    assert hits[2].why == "meaning: cosine 0.90 with its name"
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_meaning_finds_where_words_find_nothing_and_filters_hold(atlas: Atlas) -> None:
    assert features(atlas, "viaduct") == []
    with_meaning(atlas, [(0.8, 7), (0.6, 0)])
    assert features(atlas, "viaduct") == [7, 0]
    assert features(atlas, "viaduct", filters=Filters(alive=True)) == [0]
    with pytest.raises(SearchError, match="no word"):
        atlas.search("  ")


def test_the_safety_list_has_the_best_feature_of_each_concept_that_was_told_apart(store: ArtifactStore) -> None:
    rows = [("weapons", "safety", "found", 1, 3, 0.91), ("weapons", "safety", "found", 2, 4, 0.9),
            ("self_harm", "safety", "stand-in", 1, 5, 0.99), ("deceit", "safety", "not found", 1, 6, 0.55),
            ("bias", "safety", "no claim", 1, 2, 1.0), ("arabic", "calibration", "found", 1, 1, 1.0),
            ("power", "safety", "partly", 1, 3, 0.7)]  # fmt: skip
    columns = dict(zip(("concept", "kind", "status", "rank", "feature", "auc"), zip(*rows, strict=True), strict=True))
    table = {name: list(values) for name, values in columns.items()}
    store.make(Recipe("safety", SLUG, 1, {}), lambda draft: write(draft.folder, "audit.parquet", table) or {})
    hits = Atlas.open(store, SLUG).safety()
    assert [hit.feature for hit in hits] == [3, 5]
    assert [hit.why for hit in hits] == [
        "weapons (found, AUC 0.91); power (partly, AUC 0.70)",
        "self harm (stand-in, AUC 0.99)",
    ]


def test_before_an_audit_there_is_no_safety_list(atlas: Atlas) -> None:
    assert atlas.safety() == []


def test_without_an_index_of_meaning_words_alone_are_searched(atlas: Atlas) -> None:
    assert [hit.meaning for hit in atlas.search("bridge")] == [None, None]
    before = [(hit.feature, hit.score) for hit in atlas.search("bridge")]
    assert [(hit.feature, hit.score) for hit in with_meaning(atlas, []).search("bridge")] == before


def test_a_word_is_found_in_any_script_case_and_field(atlas: Atlas) -> None:
    assert features(atlas, "МОСТ") == [3]
    assert features(atlas, "橋") == [5]
    assert features(atlas, "DEF") == [2]
    assert features(atlas, "fires quotes")[0] == 6
    (hit,) = atlas.search("streams")
    assert hit.why == "label: rivers and streams"


def test_a_word_inside_a_word_is_no_match(atlas: Atlas) -> None:
    assert features(atlas, "ridge") == []


@pytest.mark.parametrize(
    "query", ["%", "100%", "it's", "'; DROP TABLE texts; --", "[(", "\\", "a\0b", "\ud800", "_", '"', "?", "*" * 500]
)
def test_queries_that_are_hard_on_sql_and_patterns_are_plain_text(atlas: Atlas, query: str) -> None:
    try:
        found = features(atlas, query)
    except SearchError:
        assert query == "\ud800"
        return
    if query == "it's":
        assert found == [6]
    if query in ("%", "100%"):
        assert found == [4]
    if query in ("_", "\\", "[(", "?"):
        assert found == []


@pytest.mark.parametrize("query", ["", "  ", "\0", "\n\t"])
def test_a_query_without_words_is_refused(atlas: Atlas, query: str) -> None:
    with pytest.raises(SearchError, match="no word"):
        atlas.search(query)


def test_common_words_count_little_and_the_limit_holds(atlas: Atlas) -> None:
    common = atlas.search("common", limit=3)
    assert len(common) == 3
    assert common[0].score < atlas.search("streams")[0].score
    assert common[0].why == "example: the bridge over common 0"


def test_a_feature_card_has_everything(atlas: Atlas) -> None:
    card = atlas.feature(0)
    assert (card.row.promoted, card.row.is_dead) == ([" bridge", "x"], False)
    assert (card.name, card.label and card.label["confidence"]) == ("Golden Gate bridge", 0.5)
    assert [example.kind for example in card.examples] == ["top", "level"]
    assert [(n.feature, n.label, n.cosine) for n in card.neighbors] == [
        (3, "bridges in Russian", 0.9),
        (2, "'def'", 0.5),
    ]
    assert card.place is not None
    assert (card.place.x, card.place.y, card.place.cluster) == (0.5, 1.5, 0)
    told = json.loads(json.dumps(dataclasses.asdict(card)))
    assert told["examples"][0]["tokens"] == ["the", " bridge", " over\n common 0"]
    assert "dictionary" not in told["label"]


def test_a_feature_that_is_not_there_is_refused(atlas: Atlas) -> None:
    for feature in (-1, 8):
        with pytest.raises(FeatureError, match="features 0 to 7"):
            atlas.feature(feature)


def test_an_atlas_without_later_stages_can_be_read(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(ArtifactError, match="no atlas is made yet: `mind-atlas run`"):
        Atlas.open(store, SLUG)
    make(store, "features")
    atlas = Atlas.open(store, SLUG)
    card = atlas.feature(0)
    assert (card.label, card.name, card.neighbors, card.place) == (None, "", [], None)
    assert features(atlas, "bridge") == [0]


def test_documents_are_found_by_where_they_come_from(tmp_path: Path) -> None:
    def write_corpus(folder: Path) -> dict[str, Any]:
        about = {
            "source": ["wiki-fr", "made:dna", "wiki-fr"],
            "text": ["a", "b", "c"],
            "title": [""] * 3,
            "language": ["fr", "", "fr"],
        }
        write(folder, "documents.parquet", {"document": [0, 1, 2]} | about)
        return {}

    store = ArtifactStore(tmp_path)
    store.make(Recipe("corpus", "mini", 1, {}), lambda draft: write_corpus(draft.folder))
    make(store, "features")
    atlas = Atlas.open(store, SLUG)
    assert atlas.documents_of(["wiki-fr", "wiki-es"]) == [0, 2]
    assert atlas.documents_of([]) == []
    assert atlas.documents([1, 5]) == {1: {"source": "made:dna", "title": "", "language": ""}}


def test_without_a_name_the_dictionary_finished_last_is_meant(
    store: ArtifactStore, atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "datetime":
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr("sae_core.artifacts.datetime", Tomorrow)
    for other in (f"{SLUG}.a", f"{SLUG}.b"):
        if other.endswith("b"):
            monkeypatch.undo()
        store.make(Recipe("features", other, 1, {}), lambda draft: write_features(draft.folder) or {})
    assert Atlas.open(store).dictionary == f"{SLUG}.a"
    assert Atlas.open(store, SLUG).dictionary == SLUG
    with pytest.raises(ArtifactError, match=f"no finished dictionary nowhere: finished are {SLUG}, {SLUG}.a"):
        Atlas.open(store, "nowhere")


def test_searches_from_many_threads_agree(atlas: Atlas) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: features(atlas, "bridge"), range(32)))
    assert found == [[0, 3]] * 32


def test_explain_agrees_with_encoding_each_block_by_hand(store: ArtifactStore, atlas: Atlas, tiny_model: Path) -> None:
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    text = "The quick brown fox jumps over the lazy dog, and the bridge."
    explained = atlas.explain(lm, text, per_token=3)
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(token.token for token in explained) == text
    dictionary = Dictionary.load(store.get("dictionary", SLUG).folder)
    for start in range(0, len(ids), 8):
        block = torch.tensor([ids[start : start + 8]])
        for i, acts in enumerate(lm.capture("resid_post", 1, block)[0]):
            values = dictionary.encode(acts[None])[0]
            fired = explained[start + i].features
            expected = sorted(values[values > 0].tolist(), reverse=True)[:3]
            assert [f.value for f in fired] == pytest.approx(expected, rel=1e-4)
            assert all(f.label == atlas.name(f.feature) for f in fired)
            assert [values[f.feature].item() for f in fired] == pytest.approx(expected, rel=1e-4)


def test_attention_sinks_are_explained_by_no_feature(store: ArtifactStore, atlas: Atlas, tiny_model: Path) -> None:
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    assert atlas.sink_norm == 10_000  # the harvest's median norm, times its setting
    atlas.sink_norm = 1e-3
    assert all(token.features == [] for token in atlas.explain(lm, "The quick brown fox"))
    with pytest.raises(FeatureError, match="no token"):
        atlas.explain(lm, "")
    assert atlas.explain(lm, "\ud800 lone \0")


def test_the_database_file_answers_sql_over_all_dictionaries(store: ArtifactStore) -> None:
    other = f"{SLUG}.second"
    store.make(Recipe("dictionary", other, 1, {}), lambda draft: write_dictionary(draft.folder) or {})
    store.make(Recipe("features", other, 1, {}), lambda draft: write_features(draft.folder) or {})
    path = write_views(store)
    assert write_views(store) == path == store.root / "atlas.duckdb"
    with duckdb.connect(str(path), read_only=True) as database:

        def ask(sql: str) -> Any:
            return database.execute(sql).fetchall()

        assert ask("SELECT dictionary, count(*) FROM features GROUP BY ALL ORDER BY 1") == [(SLUG, 8), (other, 8)]
        assert ask("SELECT label FROM labels JOIN map USING (dictionary, feature) WHERE feature = 0") == [(LABELS[0],)]
        assert ask("SELECT corpus, text FROM documents WHERE document = 0") == [("mini", "a 'quoted' text")]
        assert ask("SELECT layer, d_sae FROM dictionaries WHERE dictionary = '" + SLUG + "'") == [(1, 8)]
        tables = {name for (name,) in ask("SELECT view_name FROM duckdb_views() WHERE NOT internal")}
    assert tables == {"features", "examples", "labels", "neighbors", "map", "training", "documents"}
    assert not list(store.root.glob("atlas.duckdb.*"))


def test_a_feature_tells_what_it_was_before_each_retraining(store: ArtifactStore) -> None:
    lines = [(2, 0, 5, "kept"), (2, 1, None, "born"), (3, 0, 0, "moved"), (3, 0, 1, "merged"), (3, 2, 0, "split")]
    names = ("generation", "feature", "previous", "fate")
    rows = [dict(zip(names, line, strict=True)) | {"cosine": 0.5, "correlation": 0.25} for line in lines]
    pq.write_table(pa.Table.from_pylist(rows), store.get("dictionary", SLUG).folder / "lineage.parquet")
    atlas = Atlas.open(store, SLUG)
    told = [(x.generation, x.fate, x.previous) for x in atlas.feature(0).history]
    assert told == [(3, "moved", 0), (3, "merged", 1), (2, "kept", 5)]
    assert [x.fate for x in atlas.history(2)] == ["split"]
    assert atlas.history(7) == []
    assert [(hit.feature, hit.why) for hit in atlas.newest()] == [(2, "split")]


def test_a_feature_is_sorted_by_what_is_known_of_it(atlas: Atlas) -> None:
    assert [hit.feature for hit in atlas.browse(3, sort="density")] == [7, 6, 5]
    assert [hit.feature for hit in atlas.browse(3, sort="rarity", offset=2)] == [2, 3, 4]
    assert [hit.feature for hit in atlas.browse(3, sort="strength")] == [0, 1, 2]  # all alike: by number
    some = Filters(min_density=0.015, written=True, alive=True, cluster=0)
    assert [hit.feature for hit in atlas.browse(filters=some)] == [3, 4, 6]
    with pytest.raises(SearchError, match="'name' is no order"):
        atlas.browse(sort="name")


def test_features_are_sorted_by_how_well_they_steer_and_those_not_measured_come_last(store: ArtifactStore) -> None:
    scores = [None, 0.25, None, -0.5, 0.5, 0.0, None, None]
    store.make(
        Recipe("steering", SLUG, 1, {}),
        lambda draft: write(draft.folder, "scores.parquet", {"feature": range(8), "output_score": scores}) or {},
    )
    found = [hit.feature for hit in Atlas.open(store, SLUG).browse(8, sort="output")]
    assert found == [4, 1, 5, 3, 0, 2, 6, 7]
    assert [hit.feature for hit in Atlas.open(store, SLUG).browse(2, sort="output", offset=1)] == [1, 5]


def test_without_scores_of_steering_that_order_is_by_number(atlas: Atlas) -> None:
    assert [hit.feature for hit in atlas.browse(3, sort="output")] == [0, 1, 2]


def test_an_empty_store_gives_an_empty_database(tmp_path: Path) -> None:
    with duckdb.connect(str(write_views(ArtifactStore(tmp_path / "new"))), read_only=True) as database:
        assert database.execute("SELECT count(*) FROM dictionaries").fetchone() == (0,)


def test_opening_an_atlas_loads_no_torch() -> None:
    code = "import sys; from sae_core.atlas import Atlas; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
