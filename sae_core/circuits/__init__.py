"""How features are used: what a prediction owes to each of them, and what becomes of it without them."""

from sae_core.circuits.attribution import Attribution, AttributionError, Change, Choice, Trace, compared

__all__ = ["Attribution", "AttributionError", "Change", "Choice", "Trace", "compared"]
