"""The dictionary stage, on the real activations of a tiny model."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_core import interop, training
from sae_core.activations import Activations, harvest
from sae_core.artifacts import SCRATCH
from sae_core.corpus import build_corpus
from sae_core.dictionary import Dictionary
from sae_core.dictionary.trainer import Training, TrainingError
from sae_core.study import ActivationSettings, CorpusSettings, DictionarySettings, ModelSettings
from sae_core.training import build_dictionary, calibrate

SITE = ActivationSettings(layer=1, precision="float32", shard_tokens=1024)
SETTINGS = DictionarySettings(d_sae=96, k=6, tokens=12_000, batch_tokens=256, evaluation_tokens=256)
SHORT = {"d_sae": 96, "tokens": 4096, "batch_tokens": 256, "evaluation_tokens": 256}
FILES = {"dictionary.safetensors", "config.json", "metrics.parquet"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Arrays this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parents(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings and folders of everything that the stage stands on."""
    folder = tmp_path_factory.mktemp("parents")
    corpus, activations = folder / "corpus", folder / "activations"
    corpus.mkdir()
    activations.mkdir()
    model = ModelSettings(source=str(tiny_model))
    text = CorpusSettings.model_validate(
        {"name": "t", "sources": [str(text_folder)], "tokens": 20_000, "block_tokens": 32, "held_out": 0.2}
    )
    build_corpus(text, model, corpus)
    harvest(SITE, model, corpus, activations)
    return {"site": SITE, "model": model, "corpus": corpus, "activations": activations}


@pytest.fixture(scope="module")
def built(parents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished dictionary and its summary."""
    folder = tmp_path_factory.mktemp("dictionary")
    return folder, build_dictionary(SETTINGS, folder=folder, **parents)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_summary_is_json_with_numbers_in_their_ranges(built: tuple[Path, dict[str, Any]]) -> None:
    summary = json.loads(json.dumps(built[1], allow_nan=False))
    assert 0 < summary["fvu"] < 1
    assert summary["l0"] == pytest.approx(SETTINGS.k, rel=0.2)  # a corpus this small differs between its splits
    assert summary["train_l0"] == pytest.approx(SETTINGS.k, rel=0.05)
    assert summary["n_dead"] == round(summary["dead"] * SETTINGS.d_sae)
    assert summary["ce_clean"] <= summary["ce_spliced"] <= summary["ce_zero_ablated"] + 1
    assert summary["delta_ce"] == pytest.approx(summary["ce_spliced"] - summary["ce_clean"])
    assert summary["steps"] == 12_000 // 256
    assert summary["tokens_per_second"] > 0


def test_files_are_complete_and_the_dictionary_loads(built: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = built
    assert {path.name for path in folder.iterdir()} == FILES | {SCRATCH}
    dictionary = Dictionary.load(folder)
    assert (dictionary.d_sae, dictionary.config["k"]) == (SETTINGS.d_sae, SETTINGS.k)
    assert float(dictionary.threshold[0]) == summary["threshold"]
    metrics = pq.read_table(folder / "metrics.parquet")
    assert metrics.num_rows == summary["steps"]
    assert {"step", "tokens", "fvu", "l0", "aux", "dead", "lr", "grad_norm"} <= set(metrics.column_names)


@pytest.mark.parametrize("architecture", ["top_k", "matryoshka_batch_top_k"])
def test_thresholds_that_stand_for_ranks_give_k_features_a_token(
    architecture: str, parents: dict[str, Any], tmp_path: Path
) -> None:
    settings = DictionarySettings.model_validate({**SHORT, "architecture": architecture, "k": 6})
    summary = build_dictionary(settings, folder=tmp_path, **parents)
    assert summary["train_l0"] == pytest.approx(6, rel=0.05)


@pytest.mark.parametrize("architecture", ["relu", "jump_relu"])
def test_thresholds_that_come_from_no_rank_are_saved_as_trained(
    architecture: str, parents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "calibrate", None)
    settings = DictionarySettings.model_validate({**SHORT, "architecture": architecture})
    summary = json.loads(json.dumps(build_dictionary(settings, folder=tmp_path, **parents), allow_nan=False))
    dictionary = Dictionary.load(tmp_path)
    assert dictionary.config["architecture"] == architecture
    assert summary["threshold"] == float(dictionary.threshold.median())
    assert bool(dictionary.threshold.any()) == (architecture == "jump_relu")
    assert 0 < summary["fvu"] < 1


def test_progress_is_told_in_tokens_to_the_end_of_each_step(parents: dict[str, Any], tmp_path: Path) -> None:
    told: dict[tuple[int, str], tuple[int, dict[str, float]]] = {}

    def report(done: int, total: int, unit: str, **values: float) -> None:
        told[total, unit] = done, values

    build_dictionary(SETTINGS, folder=tmp_path, report=report, **parents)
    assert all(done == total for (total, _), (done, _) in told.items())
    units = [unit for _, unit in told]
    assert units == ["tokens", "tokens measured", "tokens measured", "tokens spliced"]
    kept = [Activations.open(parents["activations"], split).n_kept for split in ("train", "held_out")]
    assert [total for total, _ in told][:3] == [46 * 256, *kept]
    assert set(told[46 * 256, "tokens"][1]) == {"fvu", "l0", "dead"}


def test_threshold_gives_k_features_a_token_exactly(
    built: tuple[Path, dict[str, Any]], parents: dict[str, Any]
) -> None:
    dictionary, source = Dictionary.load(built[0]), Activations.open(parents["activations"])
    x = next(source.batches(512, 1, seed=3))
    dictionary.threshold.mul_(1.1)  # only about right
    calibrated = calibrate(dictionary, iter(x.split(100)), SETTINGS.k)
    assert len(calibrated.encode_sparse(x).value) == SETTINGS.k * 512


@pytest.mark.parametrize(
    ("sent", "checkpoint_seconds"), [(signal.SIGKILL, 0), (signal.SIGTERM, 1e9), (signal.SIGINT, 1e9)]
)
def test_a_run_stopped_in_training_goes_on_to_the_same_bytes(
    sent: signal.Signals, checkpoint_seconds: float, built: tuple[Path, dict[str, Any]], parents: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """In a process of its own: SIGKILL after a checkpoint; the other signals write one first."""
    arguments = {
        "settings": SETTINGS.model_dump_json(), "site": SITE.model_dump_json(), "folder": str(tmp_path),
        "model": parents["model"].model_dump_json(),
        "corpus": str(parents["corpus"]), "activations": str(parents["activations"]), "seconds": checkpoint_seconds,
    }  # fmt: skip
    script = (
        "import json, sys, time, torch\n"
        "from pathlib import Path\n"
        "from sae_core import training\n"
        "from sae_core.study import *\n"
        "torch.set_num_threads(1)\n"
        "a = json.loads(sys.argv[1])\n"
        "training.CHECKPOINT_SECONDS = a['seconds']\n"
        "training.build_dictionary(DictionarySettings.model_validate_json(a['settings']),\n"
        "    ActivationSettings.model_validate_json(a['site']), ModelSettings.model_validate_json(a['model']),\n"
        "    Path(a['corpus']), Path(a['activations']), Path(a['folder']),\n"
        "    report=lambda done, *_, **__: (print(done, flush=True), time.sleep(0.1 if done > 3000 else 0)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(arguments)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 4000:
        pass
    process.send_signal(sent)
    assert process.wait() != 0
    assert (tmp_path / SCRATCH / "checkpoint.safetensors").exists()
    assert not (tmp_path / "dictionary.safetensors").exists()
    build_dictionary(SETTINGS, folder=tmp_path, **parents)
    assert content(tmp_path) == content(built[0])


def test_a_run_killed_while_it_judges_goes_on_to_the_same_bytes(
    built: tuple[Path, dict[str, Any]], parents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "measure", killed)
        build_dictionary(SETTINGS, folder=tmp_path, **parents)
    build_dictionary(SETTINGS, folder=tmp_path, **parents)
    assert content(tmp_path) == content(built[0])


def test_dictionaries_trained_from_one_read_are_those_trained_alone(
    built: tuple[Path, dict[str, Any]], parents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another architecture and width, one that stops earlier; and one that reads otherwise is left out."""
    wider = SETTINGS.model_copy(update={"architecture": "top_k", "d_sae": 128})
    shorter = SETTINGS.model_copy(update={"tokens": 4096})
    otherwise = SETTINGS.model_copy(update={"seed": 1})
    others = {tmp_path / name: s for name, s in (("wider", wider), ("shorter", shorter), ("otherwise", otherwise))}
    (tmp_path / "first").mkdir()
    build_dictionary(SETTINGS, folder=tmp_path / "first", others=others, **parents)
    assert content(tmp_path / "first") == content(built[0])
    assert not (tmp_path / "otherwise").exists()
    for folder, settings in list(others.items())[:2]:
        (alone := tmp_path / f"{folder.name}-alone").mkdir()
        build_dictionary(settings, folder=alone, **parents)
        with monkeypatch.context() as patch:
            patch.setattr(Training, "learn", None)  # it has nothing left to learn
            summary = build_dictionary(settings, folder=folder, **parents)
        assert content(folder) == content(alone)
        assert summary["tokens_per_second"] > 0


def test_no_more_dictionaries_are_trained_from_one_read_than_memory_holds(
    parents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d_model = Activations.open(parents["activations"]).d_model
    monkeypatch.setattr(training, "TOGETHER_BYTES", 2 * training.IN_TRAINING * 96 * d_model)
    short = DictionarySettings.model_validate({**SHORT, "k": 6})
    others = {tmp_path / str(k): short.model_copy(update={"k": k}) for k in (3, 4)}
    build_dictionary(short, folder=tmp_path, others=others, **parents)
    assert [folder.exists() for folder in others] == [True, False]


def test_a_dictionary_does_not_depend_on_whether_activations_are_stored(
    built: tuple[Path, dict[str, Any]], parents: dict[str, Any], tmp_path: Path
) -> None:
    site = SITE.model_copy(update={"stored": False})
    (again := tmp_path / "activations").mkdir()
    harvest(site, parents["model"], parents["corpus"], again)
    summary = build_dictionary(SETTINGS, folder=tmp_path, **{**parents, "site": site, "activations": again})
    assert content(tmp_path) == content(built[0])
    assert summary["fvu"] == built[1]["fvu"]
    stored = sum(path.stat().st_size for path in parents["activations"].iterdir())
    assert sum(path.stat().st_size for path in again.iterdir()) < stored / 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_named_by_shard_and_row(
    value: float, parents: dict[str, Any], tmp_path: Path
) -> None:
    (broken := tmp_path / "activations").mkdir()
    for path in parents["activations"].iterdir():
        tensors = load_file(path)
        if path.name == "train-00002.safetensors":
            tensors["acts"][17, 3] = value
            tensors["is_sink"][17] = False
        save_file(tensors, broken / path.name)
    with pytest.raises(TrainingError, match=r"train-00002.safetensors, row 17 is NaN or infinite.*step \d+"):
        build_dictionary(SETTINGS, folder=tmp_path, **{**parents, "activations": broken})


@pytest.fixture(scope="module")
def theirs(built: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished dictionary in a folder of SAELens."""
    folder = tmp_path_factory.mktemp("saelens")
    interop.write(Dictionary.load(built[0]), folder, "saelens")
    return folder


def test_an_imported_dictionary_is_judged_as_the_one_that_was_trained(
    built: tuple[Path, dict[str, Any]], theirs: Path, parents: dict[str, Any], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"source": str(theirs)})
    summary = build_dictionary(settings, folder=tmp_path, **parents)
    assert summary == pytest.approx({key: built[1][key] for key in summary}, rel=1e-4)
    assert built[1].keys() - summary.keys() == {"steps", "tokens_per_second"}
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"metrics.parquet"}
    assert (tmp_path / "dictionary.safetensors").read_bytes() == (built[0] / "dictionary.safetensors").read_bytes()
    imported = Dictionary.load(tmp_path)
    assert imported.config["imported"]["format"] == "saelens"


def test_an_imported_top_k_keeps_its_k_largest_and_is_not_calibrated(
    built: tuple[Path, dict[str, Any]], parents: dict[str, Any], tmp_path: Path
) -> None:
    d = Dictionary.load(built[0])
    ranked = Dictionary(
        d.W_enc, d.b_enc, d.W_dec, d.b_dec, torch.zeros(d.d_sae), {"architecture": "top_k", "k": 6}, torch.ones(d.d_sae)
    )
    interop.write(ranked, tmp_path / "theirs", "sparsify")
    settings = SETTINGS.model_copy(update={"source": str(tmp_path / "theirs"), "architecture": "top_k"})
    (tmp_path / "ours").mkdir()
    summary = build_dictionary(settings, folder=tmp_path / "ours", **parents)
    assert summary["l0"] == pytest.approx(6, rel=1e-3)
    assert 0 < summary["fvu"] < 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architecture": "top_k"}, "has architecture = batch_top_k, the study says top_k: set architecture"),
        ({"d_sae": 64}, "has d_sae = 96, the study says 64"),
        ({"k": 7}, "has k = 6, the study says 7"),
        ({"source": "/nowhere"}, "/nowhere holds no dictionary that is known"),
    ],
)
def test_a_folder_that_is_not_what_the_study_says_is_refused_with_both(
    changes: dict[str, Any], why: str, theirs: Path, parents: dict[str, Any], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"source": str(theirs), **changes})
    with pytest.raises(interop.InteropError, match=why):
        build_dictionary(settings, folder=tmp_path, **parents)
    assert not list(tmp_path.iterdir())


def test_a_dictionary_of_another_width_is_refused(parents: dict[str, Any], tmp_path: Path) -> None:
    wide = Dictionary(
        torch.randn(40, 96), torch.zeros(96), torch.eye(40).repeat(3, 1)[:96], torch.zeros(40), torch.ones(96),
        {"architecture": "batch_top_k", "k": 6},
    )  # fmt: skip
    interop.write(wide, tmp_path / "theirs", "dictionary_learning")
    settings = SETTINGS.model_copy(update={"source": str(tmp_path / "theirs")})
    with pytest.raises(interop.InteropError, match="has d_model = 40, the activations have 32: read another site"):
        build_dictionary(settings, folder=tmp_path, **parents)


def test_a_batch_larger_than_the_activations_is_refused(parents: dict[str, Any], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"batch_tokens": 1_000_000})
    with pytest.raises(TrainingError, match="fewer than one batch of 1000000"):
        build_dictionary(settings, folder=tmp_path, **parents)
