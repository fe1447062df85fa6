"""The tiny model, loaded; and dictionaries on disk with given decoder rows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.study import ModelSettings


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")


@pytest.fixture
def save_dictionary(tmp_path: Path) -> Callable[[torch.Tensor], Path]:
    """Saves a dictionary whose decoder rows point as the given ones do; returns its folder, always the same."""

    def save(rows: torch.Tensor) -> Path:
        folder = tmp_path / "dictionary"
        folder.mkdir(exist_ok=True)
        W_dec = torch.nn.functional.normalize(rows, dim=1)
        d_sae, d_model = rows.shape
        b_enc, threshold = torch.zeros(d_sae), torch.zeros(d_sae)
        config = {"architecture": "batch_top_k", "k": 1}
        Dictionary(W_dec.T.clone(), b_enc, W_dec, torch.zeros(d_model), threshold, config).save(folder)
        return folder

    return save
