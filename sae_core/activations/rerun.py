"""Activations that are not stored: the model computes a shard's again whenever it is read."""

import json
from functools import cached_property
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sae_core.activations.encoding import EVERY, Rows
from sae_core.activations.passes import load_model, parts_of, run_model
from sae_core.activations.shards import Split
from sae_core.language_model import LanguageModel
from sae_core.study import ActivationSettings, ModelSettings


class Rerun:
    """The model, loaded when the first shard is asked for, and the text that each shard of a split is made from."""

    def __init__(self, path: Path, split: Split, device: str) -> None:
        said = json.loads(path.read_text("utf-8"))
        self._settings = ActivationSettings.model_validate(said["settings"])
        self._model, self._device = ModelSettings.model_validate(said["model"]), device
        self._parts = list(parts_of(self._settings, split, path.parent / said["corpus"]))

    def acts(self, number: int, rows: Rows = EVERY, /) -> Float[Tensor, "tokens d_model"]:
        """The activations of a shard, bit for bit as the harvest computed them on this kind of device.

        Raises what loading the model and running it raise.
        """
        return run_model([self._settings], self._lm, self._parts[number])[0][0].acts[rows]

    @cached_property
    def _lm(self) -> LanguageModel:
        return load_model([self._settings], self._model, self._device)
