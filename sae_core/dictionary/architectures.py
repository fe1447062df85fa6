"""From the name of an architecture to what trains it: the one place that knows them all."""

from sae_core.dictionary.architecture import Architecture
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.study import DictionarySettings


def architecture(settings: DictionarySettings, variance: float) -> Architecture:
    """What the settings ask for, on inputs of the given (scaled) variance."""
    return BatchTopK(settings.k, settings.aux_coefficient, variance)
