"""A name without any language model: the tokens a feature fires on, and those it promotes."""

from collections.abc import Sequence

from sae_core.features import FeatureRow

WIDTH = 60
"""Characters of a lexical label, unless a single token is longer than its half."""
_FIRES, _PROMOTES = 3, 2
_COVERED = 0.9  # share of the listed firings after which no further token is named


def lexical_label(feature: FeatureRow) -> str:
    """Such as `fires on "planet", "Mars" · promotes "orbit"`; variants in case and spaces count as one token.

    Empty for a feature that never fires.
    """
    if feature.is_dead:
        return ""
    fires = _most_frequent(feature.top_tokens, feature.top_token_shares)
    promoted = list(_merged(feature.promoted, [1.0] * len(feature.promoted)))
    while True:
        text = " · ".join(filter(None, (_clause("fires on", fires), _clause("promotes", promoted[:_PROMOTES]))))
        if len(text) <= WIDTH or len(fires) + len(promoted) <= 2:
            return text
        promoted, fires = (promoted[:1], fires) if len(promoted) > 1 else (promoted, fires[:-1])


def _most_frequent(tokens: Sequence[str], shares: Sequence[float]) -> list[str]:
    """The few tokens that stand for most of the listed firings, most frequent first."""
    merged = _merged(tokens, shares)
    chosen: list[str] = []
    covered = 0.0
    for token in sorted(merged, key=lambda token: -merged[token]):
        if len(chosen) == _FIRES or covered >= _COVERED * sum(merged.values()):
            break
        chosen.append(token)
        covered += merged[token]
    return chosen


def _merged(tokens: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    """Shares added up over variants in case and spaces, under the first variant's text, in order of appearance."""
    shown: dict[str, str] = {}
    merged: dict[str, float] = {}
    for token, share in zip(tokens, shares, strict=True):
        text = token.strip() or token
        name = shown.setdefault(text.casefold(), text)
        merged[name] = merged.get(name, 0.0) + share
    return merged


def _clause(verb: str, tokens: Sequence[str]) -> str:
    return f"{verb} {', '.join(_quoted(token) for token in tokens)}" if tokens else ""


def _quoted(token: str) -> str:
    """The token between quotes, cut to half a label; `repr` makes visible what cannot be printed."""
    text = repr(token)[1:-1]
    return f'"{text}"' if len(text) <= WIDTH // 2 else f'"{text[: WIDTH // 2 - 1]}…"'
