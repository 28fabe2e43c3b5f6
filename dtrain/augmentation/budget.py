"""How much may be spent, and how fast."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """Requests, and tokens in and out of the model."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.requests + other.requests,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    def __sub__(self, other: Spent) -> Spent:
        return self + Spent(-other.requests, -other.tokens_in, -other.tokens_out)


@dataclass(frozen=True)
class Limits:
    """Bounds on all that was ever asked for one output; None for no bound.

    Attributes:
        prices: of a million tokens in and out, in the currency of `cost`.
        per_minute: requests started in a minute.
    """

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    per_minute: float | None = None

    def price(self, spent: Spent) -> float:
        """What it costs."""
        return (spent.tokens_in * self.prices[0] + spent.tokens_out * self.prices[1]) / 1e6

    def allow(self, spent: Spent) -> bool:
        """Whether so much may be spent."""
        tokens = spent.tokens_in + spent.tokens_out
        return (
            (self.requests is None or spent.requests <= self.requests)
            and (self.tokens is None or tokens <= self.tokens)
            and (self.cost is None or self.price(spent) <= self.cost)
        )


class Budget:
    """What was spent, and the most that the requests under way may still spend.

    A request begins only if its worst case fits, so no limit is ever passed.
    """

    def __init__(self, limits: Limits, spent: Spent) -> None:
        self.limits, self.spent, self.held = limits, spent, Spent()
        self.exhausted = False
        self._changed = asyncio.Condition()
        self._next_start = 0.0

    async def take(self, most: Spent) -> bool:
        """Hold what a request may cost at most; False if it does not fit, and never will."""
        async with self._changed:
            while not self.limits.allow(self.spent + self.held + most):
                if self.exhausted or not self.held.requests:
                    self.exhausted = True
                    self._changed.notify_all()
                    return False
                await self._changed.wait()  # those under way may cost less than they could
            self.held += most
        await self._pace()
        return True

    async def settle(self, most: Spent, real: Spent) -> None:
        """A request ended and cost this."""
        async with self._changed:
            self.held, self.spent = self.held - most, self.spent + real
            self._changed.notify_all()

    async def _pace(self) -> None:
        if not self.limits.per_minute:
            return
        now = asyncio.get_running_loop().time()
        start = max(self._next_start, now)
        self._next_start = start + 60 / self.limits.per_minute
        await asyncio.sleep(start - now)
