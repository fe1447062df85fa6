"""A finished dictionary: raw activations in, raw reconstruction out, unit decoder rows, one threshold a feature.

Whatever trained it, and however inputs were scaled meanwhile, is folded into the weights, so that all of them are
read, compared and steered with alike, and a feature's activation is the length of what it adds to the activation.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Float32, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.artifacts import write_atomically
from sae_core.dictionary.sparse import (
    Groups,
    Pairs,
    SparseActs,
    dots,
    group_sums,
    low_precision,
    propose,
)
from sae_core.errors import MindAtlasError
from sae_core.names import Hook
from sae_core.study import Architecture

WEIGHTS = "dictionary.safetensors"
CONFIG = "config.json"
UNIT_TOLERANCE = 1e-4
"""How far a decoder row's norm may be from 1."""
MARGIN = 1 / 16
"""How far below its threshold a feature is still proposed, as a share of |W_enc_i| times the inputs' root mean square.

The bfloat16 product errs by about 1/350 of that; proposals are then computed again in float32.
"""


class DictionaryError(MindAtlasError):
    """A dictionary's files are missing, damaged, or not what they say."""


class Dictionary:
    """Features of activations x:

        z = x @ W_enc + b_enc
        feature_acts = z * (z > threshold)
        x_hat = feature_acts @ W_dec + b_dec

    With `rank_scale`, which only imported dictionaries have, of each token's feature_acts the `config["k"]` largest,
    as feature_acts * rank_scale ranks them, are kept: a TopK whose selection no threshold stands for.

    Attributes (float32):
        W_enc: [d_model, d_sae].
        b_enc: [d_sae].
        W_dec: [d_sae, d_model], unit rows.
        b_dec: [d_model].
        threshold: [d_sae], in the units of the activations, never negative.
        rank_scale: [d_sae], positive; or None.
        config: `architecture`, `d_model`, `d_sae`, and what the architecture was trained with (`k`); a transcoder's
            says which site it writes, whose activations then are x_hat.
    """

    def __init__(
        self,
        W_enc: Float32[Tensor, "d_model d_sae"],
        b_enc: Float32[Tensor, " d_sae"],
        W_dec: Float32[Tensor, "d_sae d_model"],
        b_dec: Float32[Tensor, " d_model"],
        threshold: Float32[Tensor, " d_sae"],
        config: dict[str, Any],
        rank_scale: Float32[Tensor, " d_sae"] | None = None,
    ) -> None:
        self._directions = W_enc.T.contiguous()  # features as rows: what the kernels read
        self.b_enc, self.W_dec, self.b_dec, self.threshold = b_enc, W_dec, b_dec, threshold
        self.rank_scale = rank_scale
        self.config = config | {"d_model": self.d_model, "d_sae": self.d_sae}

    @property
    def W_enc(self) -> Float32[Tensor, "d_model d_sae"]:
        """Encoder directions as columns."""
        return self._directions.T

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def writes(self) -> tuple[Hook, int] | None:
        """Kind and layer of the site that x_hat belongs to, where that is another than x's (a transcoder's)."""
        layer = self.config.get("writes_layer")
        return None if layer is None else (self.config["writes"], layer)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and inputs must be."""
        return self.W_dec.device

    def pre_acts(self, x: Float[Tensor, "batch d_model"]) -> Float32[Tensor, "batch d_sae"]:
        """z, before the threshold: dense, so for small batches."""
        return x.float() @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float32[Tensor, "batch d_sae"]:
        """Feature activations as a dense array: for small batches."""
        z = self.pre_acts(x)
        acts = z * (z > self.threshold)
        if self.rank_scale is None:
            return acts
        largest = (acts * self.rank_scale).topk(self.config["k"], dim=1).indices
        return torch.zeros_like(acts).scatter_(1, largest, acts.gather(1, largest))

    def encode_sparse(self, x: Float[Tensor, "batch d_model"]) -> SparseActs:
        """Feature activations that are not zero, in row order; memory is bounded by `sparse.BLOCK_BYTES` and by L0.

        The values are float32; the bfloat16 product only proposes where to look.
        """
        if self.rank_scale is not None:
            pairs, value = self._ranked(x.float(), self.rank_scale)
        else:
            pairs, value = self.candidates(x, self.threshold)
        fires = (value > self.threshold[pairs.feature]).nonzero().squeeze(1)
        row, feature = pairs.at(fires)
        return SparseActs(row.long(), feature.long(), value[fires], len(x))

    def _ranked(
        self, x: Float32[Tensor, "batch d_model"], rank_scale: Float32[Tensor, " d_sae"]
    ) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
        """Pairs that are among the k largest of their row in rank, and their z."""
        k, bias = self.config["k"], low_precision((self.b_enc + self._slack(x)) * rank_scale)
        pairs = propose(low_precision(x), self._low_by_rank, bias, k)
        z = self._exact(x, pairs)
        largest = pairs.largest(z * rank_scale[pairs.feature], len(x), k)
        return pairs.at(largest), z[largest]

    def candidates(
        self, x: Float[Tensor, "batch d_model"], limit: Float32[Tensor, " d_sae"]
    ) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
        """Pairs whose z may exceed `limit`, and their z: all that do, and some a little below."""
        x = x.float()
        pairs = propose(low_precision(x), self._low, low_precision(self.b_enc - limit + self._slack(x)))
        return pairs, self._exact(x, pairs)

    def _slack(self, x: Float32[Tensor, "batch d_model"]) -> Float32[Tensor, " d_sae"]:
        """How much a z of low precision may fall short."""
        return MARGIN * x.square().mean().sqrt() * self._norms

    def _exact(self, x: Float32[Tensor, "batch d_model"], pairs: Pairs) -> Float32[Tensor, " nnz"]:
        """z of the pairs in float32."""
        return dots(self._directions, pairs.feature, x, pairs.row) + self.b_enc[pairs.feature]

    def decode(self, acts: SparseActs | Float[Tensor, "batch d_sae"]) -> Float32[Tensor, "batch d_model"]:
        """The reconstruction x_hat of sparse or dense feature activations."""
        if isinstance(acts, Tensor):
            return acts.float() @ self.W_dec + self.b_dec
        out = self.W_dec.new_empty(acts.n_rows, self.d_model)
        return group_sums(self.W_dec, acts.feature, acts.value, Groups.by(acts.row, acts.n_rows), out) + self.b_dec

    def to(self, device: torch.device | str) -> "Dictionary":
        """The same dictionary on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return Dictionary(**tensors, config=self.config)

    def reordered(self, order: Int64[Tensor, " d_sae"]) -> "Dictionary":
        """The same features in another order: the one at place i is the `order[i]`-th of these."""
        rank_scale = None if self.rank_scale is None else self.rank_scale[order]
        return Dictionary(
            self.W_enc[:, order], self.b_enc[order], self.W_dec[order], self.b_dec, self.threshold[order],
            self.config, rank_scale,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write `dictionary.safetensors` and `config.json`. Raises ArtifactError when the disk does not take them."""
        with write_atomically(folder / WEIGHTS) as path:
            save_file({name: tensor.contiguous().cpu() for name, tensor in self._tensors().items()}, path)
        with write_atomically(folder / CONFIG) as path:
            path.write_text(json.dumps(self.config, indent=1, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Dictionary":
        """The dictionary saved in a folder.

        Raises:
            DictionaryError: a file is missing or damaged, or weights and config do not belong together.
        """
        try:
            config = json.loads((folder / CONFIG).read_text("utf-8"))
            tensors = load_file(folder / WEIGHTS, device=str(device))
        except (OSError, ValueError, SafetensorError) as error:
            raise DictionaryError(f"no dictionary can be read from {folder} ({error}): train it again") from None
        _verify(folder, config, tensors)
        return cls(**tensors, config=config)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec,
            "threshold": self.threshold,
        }  # fmt: skip
        return tensors if self.rank_scale is None else tensors | {"rank_scale": self.rank_scale}

    @cached_property
    def _low(self) -> Float[Tensor, "d_sae d_model"]:
        return low_precision(self._directions)

    @cached_property
    def _low_by_rank(self) -> Float[Tensor, "d_sae d_model"]:
        assert self.rank_scale is not None, "only such a dictionary has ranks"
        return low_precision(self._directions * self.rank_scale[:, None])

    @cached_property
    def _norms(self) -> Float32[Tensor, " d_sae"]:
        return torch.linalg.vector_norm(self._directions, dim=1)


def _verify(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise DictionaryError unless config and tensors make one folded dictionary."""

    def refuse(why: str) -> DictionaryError:
        return DictionaryError(f"the dictionary in {folder} is refused: {why}")

    missing = {"architecture", "d_model", "d_sae"} - config.keys()
    if missing:
        raise refuse(f"{CONFIG} lacks {', '.join(sorted(missing))}")
    if config["architecture"] not in get_args(Architecture):
        raise refuse(f"architecture {config['architecture']!r} is none of {', '.join(get_args(Architecture))}")
    hook, layer = config.get("writes"), config.get("writes_layer", 0)
    if hook not in (None, *get_args(Hook)) or not isinstance(layer, int) or layer < 0:
        raise refuse(f"it writes {hook!r} of layer {layer!r}, which is no site")
    d_model, d_sae = config["d_model"], config["d_sae"]
    shapes = {
        "W_enc": (d_model, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,),
        "threshold": (d_sae,),
    }  # fmt: skip
    if "rank_scale" in tensors:
        shapes["rank_scale"] = (d_sae,)
        if not isinstance(k := config.get("k"), int) or not 1 <= k <= d_sae:
            raise refuse(f"k = {k!r}; with rank_scale it must be a whole number from 1 to d_sae = {d_sae}")
    if tensors.keys() != shapes.keys():
        raise refuse(f"{WEIGHTS} holds {', '.join(sorted(tensors))}, expected {', '.join(sorted(shapes))}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise refuse(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, {CONFIG} wants torch.float32 {shape}")
        if not tensor.isfinite().all():
            raise refuse(f"{name} holds NaN or an infinity")
    if (torch.linalg.vector_norm(tensors["W_dec"], dim=1) - 1).abs().max() > UNIT_TOLERANCE:
        raise refuse("W_dec has rows that are not of unit norm")
    if tensors["threshold"].min() < 0:
        raise refuse("threshold is negative somewhere")
    if "rank_scale" in tensors and tensors["rank_scale"].min() <= 0:
        raise refuse("rank_scale is not positive everywhere")
