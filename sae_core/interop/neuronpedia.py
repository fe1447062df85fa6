"""Neuronpedia: the JSONL files that its bulk import reads, as SAEDashboard 0.8 writes them and its database names them.

    <model>/<source>/release.jsonl model.jsonl sourceset.jsonl source.jsonl       a line each
                     features/batch-N.jsonl.gz activations/ explanations/         1024 features a batch

Written only: Neuronpedia's own importer brings the files in. `UNFILLED` lists the fields that an atlas cannot fill.
Its tables (prisma schema of neuronpedia ebb8426) say the fields' names and what stands for nothing in each.
"""

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_core.artifacts import new_folder, write_atomically
from sae_core.atlas import Atlas
from sae_core.features import FeatureRow
from sae_core.interop.saelens import HOOKS
from sae_core.labels.reader import doubted
from sae_core.names import DictionarySpec

BATCH = 1024
"""Features in a file, as in Neuronpedia's own export."""
CREATOR = "clkht01d40000jv08hvalcvly"
"""Whom rows belong to: the user that Neuronpedia's import takes when none is named (SAEDashboard's fallback)."""

_CORRELATIONS = "needs pairwise statistics over the corpus, which no stage gathers"
_ATTENTION = "of attention heads only"
UNFILLED: dict[str, dict[str, str]] = {
    "features": {
        "vectorLabel": "for vectors that a user drew; labels are explanations",
        "neuron_alignment_indices": "compares with the basis of MLP neurons, which our sites do not have",
        "neuron_alignment_values": "as neuron_alignment_indices",
        "neuron_alignment_l1": "as neuron_alignment_indices",
        "correlated_neurons_indices": _CORRELATIONS, "correlated_neurons_pearson": _CORRELATIONS,
        "correlated_neurons_l1": _CORRELATIONS, "correlated_features_indices": _CORRELATIONS,
        "correlated_features_pearson": _CORRELATIONS, "correlated_features_l1": _CORRELATIONS,
        "logits_hist_data_bar_heights": "only the strongest logit effects are kept",
        "logits_hist_data_bar_values": "only the strongest logit effects are kept",
        "decoder_weights_dist": _ATTENTION,
    },
    "activations": {
        "dfaValues": _ATTENTION, "dfaTargetIndex": _ATTENTION, "dfaMaxValue": _ATTENTION,
        "lossValues": "needs a run of the model without the feature", "logitContributions": "as lossValues",
    },
    "explanations": {
        "embedding": "256 numbers of an embedding model of OpenAI",
        "typeName": "must name a type that the instance knows; `notes` says how the label was made",
        "explanationModelName": "must name a model that the instance knows; `notes` names ours",
    },
    "model": {
        "tlensId": "is of TransformerLens", "layers": "not kept with an atlas", "neuronsPerLayer": "not kept",
        "owner": "not known", "website": "not known", "inferenceEnabled": "no server is offered",
    },
    "source": {
        "saelensConfig": "`--format saelens` writes the dictionary", "saelensRelease": "not published there",
        "saelensSaeId": "not published there", "hfRepoId": "not published", "hfFolderId": "not published",
        "inferenceEnabled": "no server is offered", "notes": "nothing more to say",
    },
    "sourceset": {"urls": "not published", "creatorEmail": "nobody's", "showDfa": _ATTENTION,
                  "showCorrelated": "see features", "showHeadAttribution": _ATTENTION},
    "release": {"urls": "not published", "creatorEmail": "nobody's", "featured": "for the instance to say",
                "isNewUi": "for the instance to say"},
}  # fmt: skip
"""Fields that are written as Neuronpedia's default for nothing, and why, by table."""


def write(atlas: Atlas, folder: Path) -> Path:
    """Write an atlas for Neuronpedia's bulk import into a new or empty folder; returns the folder of the source.

    Raises:
        ArtifactError: the folder holds something or cannot be written to, or the dictionary is not there any more.
    """
    new_folder(folder)
    export = _Export(atlas)
    target = folder / export.model / export.source
    target.mkdir(parents=True)
    for name, row in export.heads().items():
        with write_atomically(target / f"{name}.jsonl") as path:
            path.write_text(json.dumps(row) + "\n", "utf-8")
    for batch, start in enumerate(range(0, export.n_features, BATCH)):
        features = range(start, min(start + BATCH, export.n_features))
        for name, rows in export.rows(features):
            (target / name).mkdir(exist_ok=True)
            _write_lines(target / name / f"batch-{batch}.jsonl.gz", rows)
    return target


class _Export:
    """One atlas as rows of Neuronpedia's tables."""

    def __init__(self, atlas: Atlas) -> None:
        self._atlas, self._spec = atlas, DictionarySpec.parse(atlas.dictionary)
        site = self._spec.site
        self._made = atlas.store.get("features", atlas.dictionary).manifest
        self._W_dec = atlas.load_dictionary().W_dec.float().cpu().numpy()
        self._table = atlas.features.table()
        self.n_features = self._table.num_rows
        self.model = site.model
        own = atlas.dictionary.removeprefix(f"{site.slug}.")
        self._set = "-".join(re.findall("[a-z0-9]+", f"{site.hook}-{site.corpus}-{own}".lower()))
        self.source = f"{site.layer}-{self._set}"
        self._tables = {name: _by_feature(atlas, *place) for name, place in _BESIDE.items()}

    def heads(self) -> dict[str, dict[str, Any]]:
        """The rows of what the features belong to, by file."""
        common = {"creatorId": CREATOR, "visibility": "PUBLIC", "createdAt": self._made.made_at}
        set_: dict[str, Any] = {
            "creatorName": "Mind Atlas",
            "urls": [],
            "creatorEmail": None,
            "description": self._atlas.dictionary,
        }
        umap = bool(self._tables["map"])
        corpus = self._atlas.store.manifest("corpus", self._spec.site.corpus)
        facts = corpus.summary if corpus else {}
        instruct = re.search(r"instruct|chat|-it$", self.model.lower()) is not None
        return {
            "release": common | set_ | {
                "name": f"mind-atlas-{self.model}", "isNewUi": False, "featured": False,
                "descriptionShort": self._set, "creatorNameShort": "Mind Atlas", "defaultSourceId": self.source,
                "defaultUmapSourceIds": [self.source] if umap else [],
            },
            "model": common | {
                "id": self.model, "instruct": instruct, "displayNameShort": self.model, "displayName": self.model,
                "tlensId": None, "dimension": self._W_dec.shape[1], "inferenceEnabled": False, "layers": 0,
                "neuronsPerLayer": 0, "updatedAt": self._made.made_at, "owner": "", "website": None,
            },
            "sourceset": common | set_ | {
                "modelId": self.model, "name": self._set, "hasDashboards": True, "type": self._spec.architecture,
                "releaseName": f"mind-atlas-{self.model}", "defaultRange": 1, "defaultShowBreaks": True,
                "showDfa": False, "showCorrelated": False, "showHeadAttribution": False, "showUmap": umap,
            },
            "source": common | {
                "id": self.source, "modelId": self.model, "setName": self._set, "hasDashboards": True,
                "inferenceEnabled": False, "saelensConfig": None, "saelensRelease": None, "saelensSaeId": None,
                "hfRepoId": None, "hfFolderId": None, "hasUmap": umap, "hasUmapLogSparsity": umap,
                "hasUmapClusters": umap, "num_prompts": facts.get("n_blocks"), "dataset": self._spec.site.corpus,
                "num_tokens_in_prompt": corpus.settings.get("block_tokens") if corpus else None, "notes": None,
            },
        }  # fmt: skip

    def rows(self, features: range) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The rows of a range of features, by folder."""
        rows = [FeatureRow(**row) for row in self._table.slice(features.start, len(features)).to_pylist()]
        examples = pq.read_table(
            self._atlas.features.examples_path,
            filters=(pc.field("feature") >= features.start) & (pc.field("feature") < features.stop),
        ).to_pylist()
        yield "features", [self._feature(row) for row in rows]
        yield "activations", [self._activation(rows[e["feature"] - features.start], e) for e in examples]
        yield "explanations", [self._explanation(row, told) for row in rows for told in self._labels(row.feature)]

    def _feature(self, row: FeatureRow) -> dict[str, Any]:
        site, near = self._spec.site, self._tables["neighbors"].get(row.feature, [])
        width = row.max_act / max(len(row.histogram), 1)
        return self._key(row.feature) | {
            "creatorId": CREATOR, "createdAt": self._made.made_at, "maxActApprox": _short(row.max_act),
            "hasVector": True, "vector": [_short(v) for v in self._W_dec[row.feature].tolist()], "vectorLabel": None,
            "vectorDefaultSteerStrength": _short(row.max_act),
            "hookName": f"blocks.{site.layer}.{HOOKS[site.hook]}" if site.hook in HOOKS else None,
            "topkCosSimIndices": [n["neighbor"] for n in near], "topkCosSimValues": [_short(n["cosine"]) for n in near],
            "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
            "correlated_neurons_indices": [], "correlated_neurons_pearson": [], "correlated_neurons_l1": [],
            "correlated_features_indices": [], "correlated_features_pearson": [], "correlated_features_l1": [],
            "neg_str": row.suppressed, "neg_values": [_short(v) for v in row.suppressed_logits],
            "pos_str": row.promoted, "pos_values": [_short(v) for v in row.promoted_logits],
            "frac_nonzero": row.density, "freq_hist_data_bar_heights": row.histogram,
            "freq_hist_data_bar_values": [_short(width * (i + 0.5)) for i in range(len(row.histogram))],
            "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [], "decoder_weights_dist": [],
            "sourceSetName": self._set,
        }  # fmt: skip

    def _activation(self, row: FeatureRow, example: dict[str, Any]) -> dict[str, Any]:
        values = [_short(value) for value in example["acts"]]
        low, high, share = (-1, _short(row.max_act), -1) if example["kind"] == "top" else self._bin(row, example)
        place = f"{example['document']}:{example['position']}"
        return self._key(row.feature) | {
            "id": _identity(self.model, self.source, row.feature, example["kind"], place),
            "tokens": example["tokens"], "values": values, "maxValue": max(values), "minValue": min(values),
            "maxValueTokenIndex": values.index(max(values)), "creatorId": CREATOR, "createdAt": self._made.made_at,
            "binMin": low, "binMax": high, "binContains": share, "qualifyingTokenIndex": example["peak"],
            "dataIndex": place, "dataSource": self._spec.site.corpus, "dfaValues": [], "dfaTargetIndex": None,
            "dfaMaxValue": None, "lossValues": [], "logitContributions": None,
        }  # fmt: skip

    def _bin(self, row: FeatureRow, example: dict[str, Any]) -> tuple[float, float, float]:
        """Ends of the example's level, and the share of the feature's firings that lies between them."""
        levels = self._made.settings["levels"]
        ends = np.array([example["level"] - 1, example["level"]]) / levels
        below = np.interp(ends * len(row.histogram), range(len(row.histogram) + 1), np.cumsum([0, *row.histogram]))
        share = float(below[1] - below[0]) / max(row.n_fired, 1)
        return _short(ends[0] * row.max_act), _short(ends[1] * row.max_act), round(share, 5)

    def _explanation(self, row: FeatureRow, label: dict[str, Any]) -> dict[str, Any]:
        place = next(iter(self._tables["map"].get(row.feature, [])), {})
        written_by = f"Mind Atlas, {label.get('model', '')}, prompt {label.get('prompt_version', '')}"
        return self._key(row.feature) | {
            "id": _identity(self.model, self.source, row.feature, label["label"]), "authorId": CREATOR,
            "description": label["label"], "embedding": None, "typeName": None, "explanationModelName": None,
            "notes": doubted(written_by, label.get("beats_control")),
            "umap_x": place.get("x", 0), "umap_y": place.get("y", 0), "umap_cluster": place.get("cluster", 0),
            "umap_log_feature_sparsity": _short(math.log10(row.density)) if row.density else -10.0,
        }  # fmt: skip

    def _labels(self, feature: int) -> list[dict[str, Any]]:
        """The feature's written labels; a lexical one repeats its tokens, and is no explanation."""
        return [row for row in self._tables["labels"].get(feature, []) if row["label"]]

    def _key(self, feature: int) -> dict[str, str]:
        return {"modelId": self.model, "layer": self.source, "index": str(feature)}


_BESIDE = {
    "neighbors": ("neighbors", "neighbors.parquet"), "labels": ("labels", "labels.parquet"),
    "map": ("feature_map", "map.parquet"),
}  # fmt: skip
"""Stage and file of what is known beside the features; a stage that is not made tells nothing."""


def _by_feature(atlas: Atlas, stage: str, file: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    if atlas.store.manifest(stage, atlas.dictionary):
        for row in pq.read_table(atlas.store.get(stage, atlas.dictionary).folder / file).to_pylist():
            found.setdefault(row["feature"], []).append(row)
    return found


def _identity(*parts: Any) -> str:
    """25 characters in the form of a cuid, the same for the same row in every export."""
    return "c" + hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).hexdigest()[:24]


def _short(value: float) -> float:
    """Five significant digits, as many as SAEDashboard keeps places."""
    return float(f"{value:.5g}")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with write_atomically(path) as temporary, temporary.open("wb") as raw, gzip.GzipFile("", "wb", 5, raw, 0) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
