"""Which tokens a feature's direction makes more or less likely, read straight off the weights.

`W_dec @ W_U`: the direction's effect on the logits when nothing after the site changes it (the logit lens; logit
weights in Bricken et al. 2023). The final norm's gain is in `unembedding`; its division by the norm only rescales.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class LogitEffects(NamedTuple):
    """The tokens that each feature raises most and lowers most, the strongest first."""

    promoted: Int[Tensor, "features n"]
    promoted_logits: Float[Tensor, "features n"]
    suppressed: Int[Tensor, "features n"]
    suppressed_logits: Float[Tensor, "features n"]


def logit_effects(
    W_dec: Float[Tensor, "features d_model"], unembedding: Float[Tensor, "d_model vocab"],
    allowed: Bool[Tensor, " vocab"], n: int,
) -> LogitEffects:  # fmt: skip
    """The `n` allowed tokens (fewer when fewer are allowed) with the largest and with the smallest logit effect."""
    ids = allowed.nonzero().squeeze(1)
    effects = W_dec @ unembedding[:, ids]
    up, promoted = effects.topk(min(n, len(ids)))
    down, suppressed = effects.topk(min(n, len(ids)), largest=False)
    return LogitEffects(ids[promoted], up, ids[suppressed], down)
