"""What tokens cost: from the study, or from the table of public prices that `genai-prices` brings."""

from typing import NamedTuple

from sae_core.study import LabelSettings

_MILLION = 1e6
_PRICED = 1000  # tokens that the table is asked the price of: below the sizes from which some models cost more


class Usage(NamedTuple):
    """The tokens that an answer took."""

    prompt_tokens: int
    completion_tokens: int
    prefix_tokens: int = 0
    """Those of the prompt that the server had read before, at the start of another; many charge less for them."""


NOTHING = Usage(0, 0)


class Prices(NamedTuple):
    """Dollars a token."""

    prompt: float
    completion: float
    prefix: float

    def dollars(self, usage: Usage) -> float:
        """What the tokens cost."""
        prefix = min(usage.prefix_tokens, usage.prompt_tokens)
        read = (usage.prompt_tokens - prefix) * self.prompt + prefix * self.prefix
        return read + usage.completion_tokens * self.completion


FREE = Prices(0.0, 0.0, 0.0)


def find_prices(settings: LabelSettings) -> Prices | None:
    """The prices of the study's label writer: none for a local model, the study's own, else the table's.

    None when nobody knows them: a server of one's own, or a model that is newer than the table.
    """
    if not settings.base_url:
        return FREE
    if settings.prompt_price is not None and settings.completion_price is not None:
        prompt, completion = settings.prompt_price / _MILLION, settings.completion_price / _MILLION
        return Prices(prompt, completion, prefix=prompt)
    return _listed(settings.base_url, settings.model)


def _listed(base_url: str, model: str) -> Prices | None:
    from genai_prices import Usage as Amount
    from genai_prices import calc_price

    def price(**amount: int) -> float:
        return float(calc_price(Amount(**amount), model, provider_api_url=base_url).total_price) / _PRICED

    try:
        prompt = price(input_tokens=_PRICED)
        return Prices(prompt, price(output_tokens=_PRICED), price(input_tokens=_PRICED, cache_read_tokens=_PRICED))
    except LookupError:
        return None
