"""Random weights as another library might have them, activations, and folders written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, D_SAE, K = 24, 80, 7
Weights = dict[str, Tensor]


@pytest.fixture
def weights() -> Weights:
    """Decoder rows of norms from 0.2 to 3, a b_dec that matters, thresholds of which some are below 0."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    W_dec = torch.nn.functional.normalize(draw(D_SAE, D_MODEL), dim=1) * torch.linspace(0.2, 3, D_SAE)[:, None]
    return {
        "W_enc": W_dec.T + 0.1 * draw(D_MODEL, D_SAE), "b_enc": draw(D_SAE), "W_dec": W_dec, "b_dec": 2 * draw(D_MODEL),
        "threshold": draw(D_SAE), "b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": 0.3 * draw(D_SAE),
    }  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(9)) + 1


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[dict[str, Any], dict[str, Tensor]], Path]:
    """Writes a folder of some library, as its code would lay it out, from the config and the tensors."""

    def write(config: dict[str, Any], tensors: dict[str, Tensor], *, weights: str) -> Path:
        (tmp_path / ("config.json" if weights == "ae.pt" else "cfg.json")).write_text(json.dumps(config))
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        torch.save(tensors, tmp_path / weights) if weights == "ae.pt" else save_file(tensors, tmp_path / weights)
        return tmp_path

    return write
