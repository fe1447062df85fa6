"""Steering: change features of the activations while the model runs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.errors import MindAtlasError
from sae_core.language_model import Edit, LanguageModel, Message
from sae_core.names import Site


class SteeringError(MindAtlasError):
    """A feature or a strength that one cannot steer with."""


class Clamp(NamedTuple):
    """A feature, held at `strength` times its own maximum over the corpus; 0 takes it away, less than 0 opposes it."""

    feature: int
    strength: float


class Answers(NamedTuple):
    """What a model says to a prompt by itself, and what it says when it is steered."""

    default: str
    steered: str


def clamp_edit(
    dictionary: Dictionary, clamps: Sequence[Clamp], max_acts: Float[Tensor, " d_sae"], sink_norm: float = math.inf
) -> Callable[[Float[Tensor, "batch length d_model"]], Float[Tensor, "batch length d_model"]]:
    """An edit of the dictionary's site, for `LanguageModel.edit`, that clamps features at every position.

        x' = x + sum_i (c_i - f_i(x)) * W_dec[i]        with c_i = strength_i * max_acts[i]

    This is the reconstruction with the features clamped, plus the reconstruction error of x, which stays as it is
    (Templeton et al. 2024, "Methodological details" of steering). All f_i are those of the unchanged x. Computed in
    float32 and returned in the type of x; where f_i = c_i already, x comes back bit for bit. `dictionary`
    and `max_acts` lie on the model's device. Rows whose norm exceeds `sink_norm` stay as they are: an attention sink,
    which no dictionary is trained on, would read as an absurd f_i, and undoing that ruins all that follows it.

    Raises:
        SteeringError: a feature does not exist, never fires, or is named twice; or a strength is not finite.
    """
    _check(clamps, max_acts)
    if not clamps:
        return lambda x: x
    chosen = torch.tensor([clamp.feature for clamp in clamps], device=max_acts.device)
    target = torch.tensor([clamp.strength for clamp in clamps], device=max_acts.device) * max_acts[chosen].float()
    W_dec, encode = dictionary.W_dec[chosen], _encoder(dictionary, chosen)

    def edit(x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        rows = x.reshape(-1, x.shape[-1]).float()
        change = (target - encode(rows)) @ W_dec
        change[rows.norm(dim=1) > sink_norm] = 0
        return (rows + change).to(x.dtype).view_as(x)

    return edit


def atlas_edit(
    atlas: Atlas, clamps: Sequence[Clamp]
) -> Callable[[Float[Tensor, "batch length d_model"]], Float[Tensor, "batch length d_model"]]:
    """As `clamp_edit`, of an atlas's dictionary, with the maxima of its features and the bound of its sinks.

    Raises also ArtifactError, when the dictionary is not there any more.
    """
    max_acts = torch.tensor(atlas.features.table()["max_act"].to_numpy())
    return clamp_edit(atlas.load_dictionary(), clamps, max_acts, atlas.sink_norm)


def default_and_steered(
    lm: LanguageModel,
    site: Site,
    edit: Edit,
    prompt: str | Sequence[Message],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answers:
    """The model's answer as it is, and with the edit at the site; arguments and errors as in `LanguageModel.generate`.

    Both draw with the same seed.
    """

    def answer() -> str:
        return "".join(lm.generate(prompt, max_tokens, temperature, seed))

    default = answer()
    with lm.edit(site.hook, site.layer, edit):
        return Answers(default, answer())


def _check(clamps: Sequence[Clamp], max_acts: Float[Tensor, " d_sae"]) -> None:
    for feature, strength in clamps:
        if not 0 <= feature < len(max_acts):
            raise SteeringError(f"feature {feature} does not exist: the dictionary has 0 to {len(max_acts) - 1}")
        if not math.isfinite(strength):
            raise SteeringError(f"feature {feature}: strength {strength} is no number: try 5, 10 or -2")
        if not max_acts[feature] > 0:
            raise SteeringError(f"feature {feature} never fires on the corpus, so it has no strength: choose another")
    if len({clamp.feature for clamp in clamps}) < len(clamps):
        raise SteeringError("a feature is clamped twice: give each feature one strength")


def _encoder(dictionary: Dictionary, features: Tensor) -> Callable[[Tensor], Tensor]:
    """Computes these features alone, except where each fires only if it is among the largest of all."""
    if dictionary.rank_scale is not None:
        return lambda rows: dictionary.encode(rows)[:, features]
    part = Dictionary(
        dictionary.W_enc[:, features],
        dictionary.b_enc[features],
        dictionary.W_dec[features],
        dictionary.b_dec,
        dictionary.threshold[features],
        dictionary.config,
    )
    return part.encode
