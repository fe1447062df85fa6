"""Labels and texts as vectors: against the same model run by hand, and on what no sentence is."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from sae_core.catalog import find_embedder
from sae_core.labels.scoring.embedding import Embedder, joined
from sae_core.pretrained import ModelError

CACHE = os.environ.get("MIND_ATLAS_CACHE")  # before a fixture sets one that is empty
UGLY = [
    "",
    " ",
    "\x00\x7f",
    "\u202eabc",
    "\U0001f600",
    "word " * 2000,
]


@pytest.fixture
def real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    if CACHE:
        monkeypatch.setenv("MIND_ATLAS_CACHE", CACHE)
    else:
        monkeypatch.delenv("MIND_ATLAS_CACHE", raising=False)


def test_vectors_are_means_over_tokens_of_the_last_layer_and_of_length_one(real_cache):
    """As the model's makers have it, by its own files and no library for sentences."""
    folder = find_embedder("all-minilm-l6-v2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["days of the week", "closed every Sunday in winter", "Le pont traverse la rivière."]
    by_hand = []
    for text in texts:
        with torch.no_grad():
            by_hand.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy())
    expected = np.array(by_hand) / np.linalg.norm(by_hand, axis=1, keepdims=True)
    embedder = Embedder("all-minilm-l6-v2")
    np.testing.assert_allclose(embedder.texts(texts), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.names(texts), expected, atol=1e-5)
    assert expected[0] @ expected[1] > expected[0] @ expected[2] + 0.1


def test_what_is_no_sentence_has_a_vector_too(tiny_embedder):
    found = Embedder(str(tiny_embedder)).texts(UGLY)
    assert found.shape == (len(UGLY), 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_no_pickle_is_read(tiny_embedder: Path, tmp_path: Path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_embedder, folder)
    model = AutoModel.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"labels\.embedder = .*pickled' cannot be loaded"):
        Embedder(str(folder))


def test_modules_that_are_not_the_library_s_own_are_not_imported(tiny_embedder: Path, tmp_path: Path):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_embedder, folder)
    (folder / "evil.py").write_text("raise SystemExit('ran')", "utf-8")
    modules = (folder / "modules.json").read_text("utf-8").replace("sentence_transformers.", "evil.", 1)
    (folder / "modules.json").write_text(modules, "utf-8")
    with pytest.raises(ModelError, match=r"foreign' cannot be loaded .*references the module class 'evil\."):
        Embedder(str(folder))


@given(st.text())
@settings(max_examples=50)
def test_characters_in_several_tokens_are_put_together_again(text: str):
    escaped = "".join(c if c.isascii() else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in text)
    assert joined(list(escaped)) == text
    assert joined(["caf", "\\xc3"]) == "caf\\xc3"
