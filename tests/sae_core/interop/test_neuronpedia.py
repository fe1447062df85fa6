"""Neuronpedia's import files, against its tables' columns and the atlas's own."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sae_core.artifacts import ArtifactError, ArtifactStore
from sae_core.atlas import Atlas
from sae_core.interop import neuronpedia

# Columns of Neuronpedia's tables that its export and SAEDashboard's write (see docs/neuronpedia.md).
COLUMNS = {
    "features": """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel
        vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices
        neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson
        correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1
        neg_str neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values
        logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist sourceSetName""",
    "activations": """id tokens values index layer modelId maxValue maxValueTokenIndex minValue binMin binMax
        binContains qualifyingTokenIndex dfaValues dfaTargetIndex dfaMaxValue lossValues logitContributions dataIndex
        dataSource creatorId createdAt""",
    "explanations": """id modelId layer index authorId description embedding typeName explanationModelName notes
        umap_x umap_y umap_cluster umap_log_feature_sparsity""",
    "model": """id displayNameShort displayName creatorId tlensId dimension visibility inferenceEnabled instruct layers
        neuronsPerLayer createdAt owner updatedAt website""",
    "source": """id modelId hasDashboards inferenceEnabled saelensConfig saelensRelease saelensSaeId hfRepoId hfFolderId
        visibility setName creatorId hasUmap hasUmapLogSparsity hasUmapClusters num_prompts num_tokens_in_prompt
        dataset notes createdAt""",
    "sourceset": """modelId name hasDashboards visibility description type creatorName urls creatorEmail creatorId
        releaseName defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt""",
    "release": """name visibility isNewUi featured description descriptionShort urls creatorEmail creatorName
        creatorNameShort creatorId defaultSourceId defaultUmapSourceIds createdAt""",
}
SAEDASHBOARD = """model_id layer sae_set sae_id_suffix feature_index neuron_alignment_indices neuron_alignment_values
    neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1
    correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values
    frac_nonzero freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_values
    logits_hist_data_bar_heights n_prompts_total n_tokens_in_prompt dataset decoder_weights_dist vector activations
    bin_min bin_max bin_contains tokens values qualifying_token_index dfa_values dfa_maxValue dfa_targetIndex
    log_sparsity skipped_indexes"""
"""Fields of SAEDashboard 0.8's `batch-N.json` and `skipped_indexes.json`."""
BATCHED = ("features", "activations", "explanations")
EMPTY = ([], None, False, 0, "")


@pytest.fixture(scope="module")
def atlas(tiny_atlas: Path) -> Atlas:
    return Atlas.open(ArtifactStore(tiny_atlas))


@pytest.fixture(scope="module")
def target(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return neuronpedia.write(atlas, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def rows(target: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows, by table."""
    found = {name: read(target / name / "batch-0.jsonl.gz") for name in BATCHED}
    return found | {name: read(target / f"{name}.jsonl") for name in COLUMNS if name not in BATCHED}


def read(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("table", [name for name in COLUMNS if name != "explanations"])
def test_rows_have_the_tables_columns_and_no_other(table: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    assert rows[table]
    for row in rows[table]:
        assert sorted(row) == sorted(COLUMNS[table].split())


@pytest.mark.parametrize("table", [name for name in COLUMNS if name != "explanations"])
def test_what_is_not_listed_as_unfilled_is_filled(table: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    unfilled = {name for name in rows[table][0] if all(row[name] in EMPTY for row in rows[table])}
    assert unfilled - {"instruct"} == set(neuronpedia.UNFILLED[table])  # the tiny model is no chat model


def test_the_page_on_it_tells_where_every_field_is_and_why_some_are_empty() -> None:
    page = (Path(__file__).parents[3] / "docs" / "neuronpedia.md").read_text("utf-8")
    fields, _, empty = page.partition("## What stays empty")
    assert [name for name in SAEDASHBOARD.split() if f"`{name}" not in fields] == []
    for table, reasons in neuronpedia.UNFILLED.items():
        rows = [line.split("|")[2] for line in empty.splitlines() if line.startswith(f"| {table} |")]
        assert {name for row in rows for name in re.findall("`(.+?)`", row)} == {*reasons}


def test_a_written_label_is_an_explanation(atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"feature": 3, "label": "bridges", "model": "some-model", "prompt_version": "1"}
    export = neuronpedia._Export(atlas)
    monkeypatch.setitem(export._tables, "labels", {3: [told], 4: [told | {"feature": 4, "label": ""}]})
    ((_, _), (_, _), (name, explanations)) = export.rows(range(2, 6))
    assert name == "explanations"
    (row,) = explanations
    assert sorted(row) == sorted(COLUMNS["explanations"].split())
    assert (row["index"], row["description"]) == ("3", "bridges")
    assert "some-model" in row["notes"]


def test_a_features_row_says_what_the_atlas_knows(atlas: Atlas, rows: dict[str, list[dict[str, Any]]]) -> None:
    W_dec = atlas.load_dictionary().W_dec
    for feature in (0, 17):
        row, known = rows["features"][feature], atlas.features.feature(feature)
        assert row["index"] == str(feature)
        assert row["vector"] == pytest.approx(W_dec[feature].tolist(), rel=1e-4)
        assert (row["pos_str"], row["neg_str"]) == (known.promoted, known.suppressed)
        assert row["topkCosSimIndices"] == [n.feature for n in atlas.feature(feature, 20).neighbors]
        assert sum(row["freq_hist_data_bar_heights"]) == known.n_fired
        assert row["hookName"] == "blocks.2.hook_resid_post"


def test_activations_lie_in_their_bins(atlas: Atlas, rows: dict[str, list[dict[str, Any]]]) -> None:
    activations = rows["activations"]
    assert len(activations) == sum(len(atlas.features.examples(feature)) for feature in range(64))
    assert len({row["id"] for row in activations}) == len(activations)
    assert all(len(row["id"]) == 25 and row["id"].startswith("c") for row in activations)
    for row in activations:
        peak = row["values"][row["qualifyingTokenIndex"]]
        assert len(row["tokens"]) == len(row["values"])
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        if row["binMin"] == -1:  # the strongest
            assert row["binContains"] == -1
        else:
            assert row["binMin"] * (1 - 1e-4) <= peak <= row["binMax"] * (1 + 1e-4)
            assert 0 < row["binContains"] <= 1


def test_a_features_levels_part_its_firings(atlas: Atlas) -> None:
    row, export = atlas.features.feature(5), neuronpedia._Export(atlas)
    lows, highs, shares = zip(*(export._bin(row, {"level": level}) for level in range(1, 6)), strict=True)
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert lows[1:] == highs[:-1]
    assert highs[-1] == pytest.approx(row.max_act, rel=1e-4)
    fourths = len(row.histogram) // 5 * 4
    assert shares[-1] == pytest.approx(sum(row.histogram[fourths:]) / row.n_fired, abs=1e-4)


def test_rows_belong_together(target: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    (model,), (source,), (set_,), (release,) = (rows[name] for name in ("model", "source", "sourceset", "release"))
    assert target.name == source["id"] == f"2-{set_['name']}"
    assert target.parent.name == model["id"] == source["modelId"]
    assert source["setName"] == set_["name"]
    assert set_["releaseName"] == release["name"]
    for name in ("features", "activations"):
        assert {(row["modelId"], row["layer"]) for row in rows[name]} == {(model["id"], source["id"])}


def test_two_exports_are_the_same_bytes(atlas: Atlas, target: Path, tmp_path: Path) -> None:
    again = neuronpedia.write(atlas, tmp_path / "again")
    files = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert all((again / file).read_bytes() == (target / file).read_bytes() for file in files)


def test_a_folder_that_holds_something_is_refused(atlas: Atlas, target: Path) -> None:
    with pytest.raises(ArtifactError, match="already: name a new or an empty folder"):
        neuronpedia.write(atlas, target)
