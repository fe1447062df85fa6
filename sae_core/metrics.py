"""How good a dictionary is: each number defined once, over raw activations that were not trained on.

    fvu        sum |x - x_hat|^2 / sum |x - mean|^2, the mean over the same tokens: predicting the mean scores 1.0
    l0         active features a token
    cosine     mean cosine of x and x_hat
    shrinkage  E|x_hat|^2 / E(x . x_hat), relative reconstruction bias (Rajamanoharan et al. 2024): 1 is unbiased,
               less means that reconstructions are too short
    dead       share of features that never fired on the counted tokens
    dense      share of features that fired on more than a tenth of them

and, with x_hat put in place of x inside the language model, what its next-token predictions lose (`Spliced`).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from sae_core.corpus.packing import kept_apart
from sae_core.dictionary import Dictionary
from sae_core.dictionary.transcoder import sides
from sae_core.language_model import EditFrom, LanguageModel
from sae_core.names import Hook
from sae_core.progress import Report, silent
from sae_core.study import Packing

DENSE = 0.1
"""A feature that fires on a larger share of the tokens than this counts as dense."""
PASS_TOKENS = 1024
"""Tokens a forward pass of the spliced evaluation: bounds the memory that logits take."""


class Quality(NamedTuple):
    """How well activations are reconstructed; see the module for each definition."""

    fvu: float
    l0: float
    cosine: float
    shrinkage: float
    n_tokens: int
    """Activations that were counted."""
    n_fired: Int64[Tensor, " d_sae"]
    """On how many of them each feature fired."""

    @property
    def n_dead(self) -> int:
        """Features that never fired."""
        return int((self.n_fired == 0).sum())

    @property
    def dead(self) -> float:
        """Share of the features that never fired."""
        return self.n_dead / len(self.n_fired)

    @property
    def dense(self) -> float:
        """Share of the features that fired on more than a tenth of the tokens."""
        return float((self.n_fired > DENSE * self.n_tokens).double().mean())


class _Sums:
    """Running sums over tokens, in float64: a variance is the small difference of large ones."""

    def __init__(self, d_model: int) -> None:
        self.n = self.active = 0
        self.x: Float64[Tensor, " d_model"] = torch.zeros(d_model, dtype=torch.float64)
        self.x_x = self.x_hat_x_hat = self.x_x_hat = self.error = self.cosine = 0.0

    def add(self, x: Float[Tensor, "batch d_model"], x_hat: Float[Tensor, "batch d_model"], active: int) -> None:
        x, x_hat = x.double(), x_hat.double()
        self.n, self.active = self.n + len(x), self.active + active
        self.x += x.sum(0).cpu()
        self.x_x += float(x.square().sum())
        self.x_hat_x_hat += float(x_hat.square().sum())
        self.x_x_hat += float((x * x_hat).sum())
        self.error += float((x - x_hat).square().sum())
        self.cosine += float(cosine_similarity(x, x_hat).sum())

    @property
    def fvu(self) -> float:
        variance = self.x_x - float(self.x.square().sum()) / self.n
        return self.error / variance if variance else torch.nan


def measure(dictionary: Dictionary, batches: Iterable[Float[Tensor, "_ *site d_model"]]) -> Quality:
    """Reconstruct every activation of `batches` and compare; of pairs, the written ones from those that are read.

    Raises:
        ValueError: there is no activation at all.
    """
    sums = _Sums(dictionary.d_model)
    n_fired = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    for x in batches:
        read, wanted = sides(x.to(dictionary.device))
        acts = dictionary.encode_sparse(read)
        sums.add(wanted, dictionary.decode(acts), len(acts.value))
        n_fired += torch.bincount(acts.feature, minlength=dictionary.d_sae).cpu()
    if not sums.n:
        raise ValueError("no activations to measure on")
    shrinkage = sums.x_hat_x_hat / sums.x_x_hat if sums.x_x_hat else torch.nan
    return Quality(sums.fvu, sums.active / sums.n, sums.cosine / sums.n, shrinkage, sums.n, n_fired)


class Spliced(NamedTuple):
    """Cross-entropy in nats a token of the model with its activations at one site replaced."""

    ce_clean: float
    """Nothing replaced."""
    ce_spliced: float
    """By the dictionary's reconstructions."""
    ce_mean_ablated: float
    """By the mean activation: the baseline that an empty dictionary reaches."""
    ce_zero_ablated: float
    """By zeros: the usual baseline, and the more flattering one."""
    kl: float
    """Mean KL divergence of the spliced model's predictions from the clean model's, in nats."""
    n_tokens: int
    """Predictions that were counted."""

    @property
    def delta_ce(self) -> float:
        """What splicing costs."""
        return self.ce_spliced - self.ce_clean

    @property
    def ce_recovered(self) -> float:
        """Share of the cross-entropy lost by mean ablation that the dictionary keeps."""
        return (self.ce_mean_ablated - self.ce_spliced) / (self.ce_mean_ablated - self.ce_clean)

    @property
    def ce_recovered_zero(self) -> float:
        """The same against zero ablation."""
        return (self.ce_zero_ablated - self.ce_spliced) / (self.ce_zero_ablated - self.ce_clean)


@torch.no_grad()
def splice(
    model: LanguageModel,
    hook: Hook,
    layer: int,
    dictionary: Dictionary,
    mean: Float[Tensor, " d_model"],
    token_ids: Int[Tensor, "blocks length"],
    documents: Int[Tensor, "blocks length"],
    is_sink: Bool[Tensor, "blocks length"],
    packing: Packing = "documents",
    report: Report = silent,
) -> Spliced:
    """Run the model clean, spliced, mean-ablated and zero-ablated on the same text.

    What is replaced is what the dictionary gives: of a transcoder, the activations that it writes, from those that it
    reads in the same pass.

    Attention sinks and padding keep their own activations and are not counted: the dictionary never saw them, and
    one replaced sink ruins every prediction after it, which would say nothing about the dictionary. A prediction
    counts when its token was replaced and the next token belongs to the same document.

    Args:
        model: the model the activations come from.
        hook: kind of the site that is read.
        layer: layer of that site.
        dictionary: what is judged.
        mean: the mean of the training activations that are replaced.
        token_ids: blocks of text.
        documents: document of each token, -1 for padding.
        is_sink: the tokens that were left out of training as sinks.
        packing: whether attention restarts at each document.
        report: progress, in tokens.
    """
    edits: dict[str, EditFrom] = {
        "spliced": lambda x, _: dictionary.decode(dictionary.encode_sparse(x)),
        "mean_ablated": lambda _, y: mean.expand_as(y),
        "zero_ablated": lambda _, y: torch.zeros_like(y),
    }
    read = hook, layer
    sums: dict[str, float] = dict.fromkeys(["clean", "kl", *edits], 0.0)
    n = done = 0
    for ids, document, replaced in _passes(token_ids, documents, ~is_sink & (documents >= 0)):
        segments = kept_apart(document, packing)
        counted = replaced[:, :-1] & (document[:, 1:] == document[:, :-1])
        targets = ids[:, 1:][counted].long()
        n += len(targets)
        clean = _predictions(model, ids, segments, counted)
        sums["clean"] += float(cross_entropy(clean, targets, reduction="sum"))
        for name, edit in edits.items():
            with model.edit_from(read, dictionary.writes or read, _only(replaced, edit)):
                edited = _predictions(model, ids, segments, counted)
            sums[name] += float(cross_entropy(edited, targets, reduction="sum"))
            if name == "spliced":
                sums["kl"] += float(_kl(clean, edited))
        report(done := done + ids.numel(), token_ids.numel(), "tokens spliced")
    if not n:
        raise ValueError("no held-out prediction to measure on")
    ce = {f"ce_{name}": sums[name] / n for name in ("clean", *edits)}
    return Spliced(**ce, kl=sums["kl"] / n, n_tokens=n)


def _passes(*arrays: Int[Tensor, "blocks length"] | Bool[Tensor, "blocks length"]) -> Iterator[list[Tensor]]:
    """The arrays together, a few blocks at a time."""
    blocks = max(1, PASS_TOKENS // arrays[0].shape[1])
    return (list(parts) for parts in zip(*(array.split(blocks) for array in arrays), strict=True))


def _predictions(
    model: LanguageModel, ids: Tensor, segments: Tensor | None, counted: Tensor
) -> Float[Tensor, "n vocab"]:
    """Logits for the next token where that counts."""
    return model.logits(ids, segments)[:, :-1][counted].float()


def _only(replaced: Bool[Tensor, "batch length"], edit: EditFrom) -> EditFrom:
    """The edit of the replaced positions alone."""

    def apply(
        x: Float[Tensor, "batch length d_model"], y: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        edited = y.clone()
        edited[replaced] = edit(x[replaced], y[replaced]).to(y.dtype)
        return edited

    return apply


def _kl(clean: Float[Tensor, "n vocab"], edited: Float[Tensor, "n vocab"]) -> Tensor:
    """Sum over tokens of KL(clean || edited)."""
    return kl_div(edited.log_softmax(-1), clean.log_softmax(-1), reduction="sum", log_target=True)
