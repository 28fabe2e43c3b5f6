"""An OpenAI-style endpoint; the key comes from OPENAI_API_KEY and goes nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from dtrain.augmentation.budget import Spent
from dtrain.core.errors import UserError
from dtrain.data.conversations import Messages

RETRIES = 5  # of the client itself, with growing pauses or those that the server asks for
TIMEOUT_SECONDS = 300.0
# Hopeless for every row alike.
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


class Failed(Exception):
    """A request without a usable reply; the next may have one.

    Attributes:
        spent: what it cost all the same.
    """

    def __init__(self, what: str, spent: Spent) -> None:
        super().__init__(what)
        self.spent = spent


@dataclass(frozen=True)
class Reply:
    """What the model said, why it stopped, and what it cost."""

    text: str
    finish: str
    spent: Spent


class Endpoint:
    """One model behind one address."""

    def __init__(self, address: str, model: str, max_tokens: int, temperature: float) -> None:
        """Nothing is sent yet.

        Args:
            address: such as http://localhost:8000/v1.
            max_tokens: of a reply.

        Raises:
            UserError: the address is none, or holds a password or a key.
        """
        self.address, self.model = _checked(address), model
        self.max_tokens, self.temperature = max_tokens, temperature
        self._key = os.environ.get("OPENAI_API_KEY") or "none"  # a server of one's own wants none
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=address, max_retries=RETRIES, timeout=TIMEOUT_SECONDS
        )

    def most(self, messages: Messages) -> Spent:
        """The most that a request can cost: no token is shorter than a byte."""
        size = sum(len(message["content"].encode()) + 16 for message in messages)
        return Spent(1, size + 64, self.max_tokens)

    async def ask(self, messages: Messages, seed: int) -> Reply:
        """The model's reply.

        Raises:
            Failed: there is none after the client's retries, or it is malformed.
            UserError: key, model or address are refused.
        """
        asked: list[Any] = messages
        spent = self.most(messages)
        try:
            answer: Any = await self._client.chat.completions.create(
                model=self.model,
                messages=asked,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=seed,
            )
            spent = _counted(answer, spent)
            return _reply(answer, spent)
        except FATAL as error:
            fix = "set OPENAI_API_KEY, and look at --model and --endpoint"
            raise UserError(self._told(error), where=self.address, fix=fix) from None
        except openai.OpenAIError as error:
            raise Failed(self._told(error), Spent(1)) from None
        except ValueError as error:  # no JSON, or no message in it: the model may have worked
            raise Failed(self._told(error), spent) from None

    def _told(self, error: Exception) -> str:
        """The message without the key, which some servers repeat."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:300].replace(self._key, "[key]")

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.close()


def _reply(answer: Any, spent: Spent) -> Reply:
    """Servers of many makers: nothing of what they send is taken for granted."""
    try:
        choice = answer.choices[0]
        text, finish = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError("the reply holds no message") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the reply is empty (it ended with: {finish})")
    text = text.encode(errors="replace").decode().replace("\0", "")
    return Reply(text, str(finish), spent)


def _counted(answer: Any, most: Spent) -> Spent:
    """What the server says it cost; the most, if it says nothing of use."""
    used = getattr(answer, "usage", None)
    names = ("prompt_tokens", "completion_tokens")
    counts = [count for n in names if isinstance(count := getattr(used, n, None), int)]
    return Spent(1, *counts) if len(counts) == 2 and min(counts) >= 0 else most


def _checked(address: str) -> str:
    """The address, if it can be shown: it is written beside the rows.

    Raises:
        UserError: it is no http address, or holds more than a place.
    """
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    if not good:
        fix = "such as http://localhost:8000/v1"
        raise UserError("not an address of an endpoint", where="--endpoint", fix=fix)
    if parts.username or parts.password or parts.query or parts.fragment:
        what = "the address holds a name, a password or a query"
        raise UserError(what, where="--endpoint", fix="put the key into OPENAI_API_KEY alone")
    return address
