"""The saved dictionary: sparse equals dense, files that do not belong together are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_core.dictionary import Dictionary, DictionaryError, SparseActs

D_MODEL, D_SAE = 24, 80


def random_dictionary(seed: int = 0, scale: float = 30.0) -> Dictionary:
    """Random weights; activations of size `scale`, of which some coordinates dwarf the rest, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1)
    return Dictionary(
        W_enc=W_dec.T + 0.1 * torch.randn(D_MODEL, D_SAE, generator=generator),
        b_enc=scale * 0.1 * torch.randn(D_SAE, generator=generator),
        W_dec=W_dec,
        b_dec=scale * torch.randn(D_MODEL, generator=generator),
        threshold=scale * torch.rand(D_SAE, generator=generator),
        config={"architecture": "batch_top_k", "k": 8},
    )


def inputs(n: int = 64, scale: float = 30.0) -> torch.Tensor:
    x = scale * torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(9))
    x[:, 3] *= 20
    return x


def dense(acts: SparseActs) -> torch.Tensor:
    out = torch.zeros(acts.n_rows, D_SAE)
    out[acts.row, acts.feature] = acts.value
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_encoding_equals_dense_encoding(dtype: torch.dtype) -> None:
    dictionary, x = random_dictionary(), inputs().to(dtype)
    acts = dictionary.encode_sparse(x)
    torch.testing.assert_close(dense(acts), dictionary.encode(x), rtol=1e-5, atol=1e-3)
    assert torch.equal(dense(acts) > 0, dictionary.encode(x) > 0)


def test_encoding_is_the_formula_of_the_docstring() -> None:
    dictionary, x = random_dictionary(), inputs(3)
    for n in range(3):
        for i in range(D_SAE):
            z = float(x[n].double() @ dictionary.W_enc[:, i].double() + dictionary.b_enc[i])
            expected = z if z > float(dictionary.threshold[i]) else 0.0
            assert float(dictionary.encode(x)[n, i]) == pytest.approx(expected, abs=1e-3)


def test_sparse_activations_come_in_row_order() -> None:
    acts = random_dictionary().encode_sparse(inputs())
    place = acts.row * D_SAE + acts.feature
    assert torch.equal(place, place.unique())


def test_decoding_sparse_equals_decoding_dense() -> None:
    dictionary, x = random_dictionary(), inputs()
    torch.testing.assert_close(
        dictionary.decode(dictionary.encode_sparse(x)), dictionary.decode(dictionary.encode(x)), rtol=1e-4, atol=1e-2
    )


def test_decoding_does_not_ask_for_sorted_entries() -> None:
    dictionary, acts = random_dictionary(), random_dictionary().encode_sparse(inputs())
    order = torch.randperm(len(acts.row))
    shuffled = SparseActs(acts.row[order], acts.feature[order], acts.value[order], acts.n_rows)
    torch.testing.assert_close(dictionary.decode(shuffled), dictionary.decode(acts), rtol=1e-4, atol=1e-3)


def test_tokens_on_which_nothing_fires_decode_to_the_bias() -> None:
    dictionary = random_dictionary()
    none = torch.zeros(0, dtype=torch.int64)
    acts = SparseActs(none, none, torch.zeros(0), 5)
    assert torch.equal(dictionary.decode(acts), dictionary.b_dec.expand(5, D_MODEL))


def test_no_tokens_at_all() -> None:
    acts = random_dictionary().encode_sparse(torch.zeros(0, D_MODEL))
    assert (len(acts.row), acts.n_rows) == (0, 0)
    assert random_dictionary().decode(acts).shape == (0, D_MODEL)


def test_a_saved_dictionary_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = random_dictionary()
    saved.save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name)), name
    assert loaded.config == {"architecture": "batch_top_k", "k": 8, "d_model": D_MODEL, "d_sae": D_SAE}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "dictionary.safetensors"}


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def change_tensors(fn: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "dictionary.safetensors").items()}
        fn(tensors)
        save_file(tensors, folder / "dictionary.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (change_config(architecture="top_secret"), "'top_secret' is none of"),
        (change_config(architecture=None), "lacks architecture"),
        (change_config(d_sae=81), r"wants torch.float32 \(24, 81\)"),
        (change_tensors(lambda t: t.pop("threshold")), "expected .*threshold"),
        (change_tensors(lambda t: t.update(b_gate=torch.zeros(D_SAE))), "holds .*b_gate"),
        (change_tensors(lambda t: t.update(W_dec=t["W_dec"].T.contiguous())), "W_dec is"),
        (change_tensors(lambda t: t.update(b_dec=t["b_dec"].half())), "b_dec is torch.float16"),
        (change_tensors(lambda t: t["W_dec"].mul_(1.01)), "unit norm"),
        (change_tensors(lambda t: t["b_enc"].fill_(torch.nan)), "b_enc holds NaN"),
        (change_tensors(lambda t: t["threshold"].neg_()), "threshold is negative"),
        (lambda folder: (folder / "config.json").unlink(), "no dictionary can be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "no dictionary can be read"),
        (lambda folder: (folder / "dictionary.safetensors").write_bytes(b"nonsense"), "no dictionary can be read"),
    ],
)
def test_files_that_are_no_dictionary_are_refused(damage: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    random_dictionary().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DictionaryError, match=why):
        Dictionary.load(tmp_path)
