"""From the name of an architecture to what trains it: the one place that knows them all."""

from sae_core.dictionary.architecture import Architecture
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.gated import Gated
from sae_core.dictionary.jump_relu import JumpReLU
from sae_core.dictionary.jump_relu_tanh import JumpReLUTanh
from sae_core.dictionary.matryoshka import MatryoshkaBatchTopK
from sae_core.dictionary.relu import ReLU
from sae_core.dictionary.top_k import TopK
from sae_core.dictionary.transcoder import Transcoder
from sae_core.study import DictionarySettings


def architecture(settings: DictionarySettings, variance: float) -> Architecture:
    """What the settings ask for, on inputs of the given (scaled) variance."""
    if settings.l1_coefficient is not None:
        with_penalty: dict[str, type[Gated | JumpReLUTanh | ReLU]] = {
            "jump_relu_tanh": JumpReLUTanh,
            "gated": Gated,
            "relu": ReLU,
        }
        return with_penalty[settings.architecture](settings.l1_coefficient, variance)
    assert settings.k is not None, "settings see to it"
    with_k: dict[str, type[BatchTopK] | type[JumpReLU]] = {
        "batch_top_k": BatchTopK, "top_k": TopK, "matryoshka_batch_top_k": MatryoshkaBatchTopK, "jump_relu": JumpReLU,
        "transcoder": Transcoder,
    }  # fmt: skip
    return with_k[settings.architecture](settings.k, settings.aux_coefficient, variance)
