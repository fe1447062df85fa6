"""Steering: change features of the activations while the model runs.

Exact and cheap: one encoder row and one decoder row a feature; what the dictionary does not explain stays as it is.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.steers import Method, Scope, Steer, SteeringError, cautions, check_steers

__all__ = ["Method", "Scope", "Steer", "Steering", "SteeringError", "cautions", "max_acts"]

_ROUNDING = 1e-6
"""Smaller changes, as a share of the feature's activation, are what float32 sums in another order differ by."""


class Steering:
    """An edit of a dictionary's site that changes features, in place with `applied` or `generation.generate`.

        x' = x + sum_i (t_i - f_i(x)) * W_dec[i]

    with t_i as `Steer` says. This is the reconstruction from the changed features, plus the reconstruction error of x,
    which stays as it is (Templeton et al. 2024, "Methodological details" of steering). All f_i are those of the
    unchanged x: the features are changed together, in no order. Computed in float32 and returned in the type of x;
    where every t_i = f_i, x comes back bit for bit.

    A transcoder's features are read at one site and act at another: f_i is of the x that it reads, and what is changed
    is the activation that it writes. At the site that it reads, its decoder rows mean nothing.

    Attributes:
        site: where the dictionary reads the model.
        steers: what is done.
        scope: at which positions, for `generation.generate`, which knows the tokens.
    """

    def __init__(
        self,
        site: Site,
        dictionary: Dictionary,
        steers: Sequence[Steer],
        max_acts: Float[Tensor, " d_sae"],
        *,
        sink_norm: float = math.inf,
        scope: Scope = "all",
        rows: Bool[Tensor, "batch steers"] | None = None,
        directions: Float[Tensor, "steers d_model"] | None = None,
    ) -> None:
        """Prepare the edit.

        Args:
            site: where the dictionary reads the model.
            dictionary: on the model's device.
            steers: what is done; none changes nothing.
            max_acts: maxima of all features.
            sink_norm: activations of a larger norm stay as they are: an attention sink, which no dictionary is
                trained on, would read as an absurd f_i, and undoing that ruins all that follows it.
            scope: which positions are steered.
            rows: which of `steers` apply to each row of a batch, when not all do.
            directions: what stands in for the decoder rows (for controls).

        Raises:
            SteeringError: a feature does not exist, never fires, or is named twice for the same rows; a strength is
                not finite, or negative with `min_clamp`; a method or scope is none; a transcoder does not say what it
                writes.
        """
        check_steers(steers, max_acts.cpu().numpy(), scope, repeats=rows is not None)
        self.site, self.steers, self.scope = site, tuple(steers), scope
        if dictionary.config["architecture"] == "transcoder" and dictionary.writes is None:
            raise SteeringError(
                f"the transcoder does not say which site it writes, and its features do nothing at {site.hook}, which "
                "it reads: train it with writes and writes_layer"
            )
        self._read = site.hook, site.layer
        self._written = dictionary.writes or self._read
        device = dictionary.device
        chosen = torch.tensor([steer.feature for steer in steers], dtype=torch.long)
        maxima = max_acts.cpu().double()[chosen].tolist()
        goals = [s.strength * m if s.method != "scale" else 0.0 for s, m in zip(steers, maxima, strict=True)]
        kept = [{"add": 1.0, "scale": s.strength}.get(s.method, 0.0) for s in steers]
        self._goal = torch.tensor(goals, device=device)
        self._kept = torch.tensor(kept, device=device) - 1
        self._least = torch.tensor([s.method == "min_clamp" for s in steers], dtype=torch.bool, device=device)
        self._encode = _Part(dictionary, chosen.to(device))
        self._directions = dictionary.W_dec[chosen.to(device)] if directions is None else directions.to(device)
        self._rows = None if rows is None else rows.to(device)
        self._sink_norm = sink_norm

    @classmethod
    def of(cls, atlas: Atlas, steers: Sequence[Steer], scope: Scope = "all", device: str = "cpu") -> "Steering":
        """With an atlas's dictionary, the maxima of its features and the bound of its sinks.

        Raises also ArtifactError, when the dictionary is not there any more.
        """
        dictionary = atlas.load_dictionary().to(device)
        return cls(atlas.site, dictionary, steers, max_acts(atlas), sink_norm=atlas.sink_norm, scope=scope)

    def applied(
        self, lm: LanguageModel, where: Bool[Tensor, "batch length"] | None = None
    ) -> AbstractContextManager[None]:
        """Inside the `with`, every forward pass is steered, at the positions `where` (default: all)."""
        return lm.edit_from(self._read, self._written, lambda read, x: self(x, where, read))

    def acts(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length steers"]:
        """What the features have at x, before anything is done to them; nothing on attention sinks."""
        plain = x.float()
        acts = self._encode(plain)
        acts[plain.norm(dim=-1) > self._sink_norm] = 0
        return acts

    def __call__(
        self,
        x: Float[Tensor, "batch length d_model"],
        where: Bool[Tensor, "batch length"] | None = None,
        read: Float[Tensor, "batch length d_model"] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """What becomes of `x`, where `where`, by the features of `read` (default: of `x`)."""
        if not self.steers:
            return x
        plain = x.float()
        seen = plain if read is None else read.float()
        acts = self._encode(seen)
        change = self._kept * acts + self._goal
        change = torch.where(self._least, change.clamp(min=0), change)
        change[change.abs() <= _ROUNDING * acts.abs()] = 0
        still = seen.norm(dim=-1) > self._sink_norm
        if where is not None:
            still = still | ~where
        change[still] = 0
        if self._rows is not None:
            change = change * self._rows[:, None]
        return (plain + change @ self._directions).to(x.dtype)


def max_acts(atlas: Atlas) -> Float[Tensor, " d_sae"]:
    """The largest activation of each feature over the corpus."""
    return torch.tensor(atlas.features.columns("max_act")["max_act"].to_numpy())


class _Part:
    """Computes a few features alone, except where each fires only if it is among the largest of all."""

    def __init__(self, dictionary: Dictionary, features: Tensor) -> None:
        self._whole, self._features = dictionary, features
        self._W_enc, self._b_enc = dictionary.W_enc[:, features].contiguous(), dictionary.b_enc[features]
        self._threshold = dictionary.threshold[features]

    def __call__(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length features"]:
        if self._whole.rank_scale is not None:
            acts = self._whole.encode(x.flatten(0, 1))[:, self._features]
            return acts.view(*x.shape[:-1], -1)
        z = x @ self._W_enc + self._b_enc
        return z * (z > self._threshold)
