"""What labels may cost: set aside before it is spent, so that a budget is never overrun."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sae_core.labels.prices import Prices, Usage
from sae_core.labels.prompts import Message
from sae_core.labels.reader import LabelError
from sae_core.study import LabelSettings

_FRAME = 16  # tokens, at most, that a chat template puts around a message


class BudgetReached(LabelError):
    """The next request might cost more than is left; nothing was sent."""


class Budget:
    """Counts dollars and requests, and refuses the request that might go beyond what is allowed.

    An answer that comes from the cache counts as what it took when it was bought, so that a run that was killed and
    goes on spends no more than one that was not; it is never refused.

    Args:
        settings: `max_dollars` and `max_requests`.
        prices: of the label writer; None when they are not known.

    Raises:
        LabelError: there is a limit in dollars, but no price.
    """

    def __init__(self, settings: LabelSettings, prices: Prices | None) -> None:
        if settings.max_dollars is not None and prices is None:
            raise LabelError(
                f"labels.max_dollars = {settings.max_dollars:g} cannot be kept: the price of {settings.model!r} at "
                f"{settings.base_url} is in no table. Say it in labels.prompt_price and labels.completion_price "
                "(dollars a million tokens), or limit labels.max_requests instead"
            )
        self.max_dollars, self.max_requests = settings.max_dollars, settings.max_requests
        self.prices = prices
        self.dollars = 0.0
        """Spent; 0 where no price is known."""
        self.requests = 0
        """Sent, with all that were sent again after a fault."""
        self._set_aside = 0.0

    @property
    def is_limited(self) -> bool:
        return self.max_dollars is not None or self.max_requests is not None

    @property
    def share(self) -> float:
        """How much of the budget is spent, in dollars or in requests, whichever is nearer to its limit; 0 without."""
        limits = ((self.dollars, self.max_dollars), (self.requests, self.max_requests))
        return max(
            (spent / limit if limit else float(spent > 0) for spent, limit in limits if limit is not None), default=0.0
        )

    def price(self, usage: Usage) -> float | None:
        """Dollars; None where no price is known."""
        return self.prices.dollars(usage) if self.prices else None

    def charge(self, usage: Usage, requests: int = 0) -> None:
        """Count tokens that were bought, and requests that `count_request` was not told of."""
        self.dollars += self.price(usage) or 0.0
        self.requests += requests

    def count_request(self) -> None:
        """Count a request that is about to be sent. Raises BudgetReached when it must not be."""
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise BudgetReached(f"labels.max_requests = {self.max_requests} are used up")
        self.requests += 1

    @contextmanager
    def set_aside(self, messages: Sequence[Message], max_tokens: int) -> Iterator[None]:
        """Keep back, as long as a request is under way, the most that it may cost.

        A prompt has no more tokens than bytes, with a few for each message around them.

        Raises:
            BudgetReached: that is more than is left.
        """
        prompt = sum(len(message["content"].encode()) + _FRAME for message in messages)
        most = self.price(Usage(prompt, max_tokens)) or 0.0
        if self.max_dollars is not None and self.dollars + self._set_aside + most > self.max_dollars:
            raise BudgetReached(
                f"labels.max_dollars = {self.max_dollars:g} is used up: {self.dollars:.4f} are spent, "
                f"and the next request may cost {most:.4f}"
            )
        self._set_aside += most
        try:
            yield
        finally:
            self._set_aside -= most
