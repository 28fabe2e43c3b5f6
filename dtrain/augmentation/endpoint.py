"""Client of an OpenAI-compatible endpoint; OPENAI_API_KEY is never written to a file or message."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from dtrain.core.addresses import has_secret, secret_error
from dtrain.core.errors import UserError, first_line
from dtrain.data.conversations import Messages

MAX_RETRIES = 5  # by the client, with exponential backoff or the delay that the server asks for
TIMEOUT_SECONDS = 300.0
PROBE_SECONDS = 10.0
# Errors that every further request would get too.
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


@dataclass(frozen=True)
class TokenUsage:
    """Requests, prompt tokens and completion tokens."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.requests + other.requests,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    def __sub__(self, other: TokenUsage) -> TokenUsage:
        return self + TokenUsage(-other.requests, -other.tokens_in, -other.tokens_out)


class RequestError(Exception):
    """A request without a usable reply; later requests may succeed.

    Attributes:
        usage: what the failed request consumed.
    """

    def __init__(self, message: str, usage: TokenUsage) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class Reply:
    """A completion: its text, the finish reason, and what it consumed."""

    text: str
    finish: str
    usage: TokenUsage


class Endpoint:
    """A model behind a URL."""

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int,
        temperature: float,
        where: str = "--endpoint",
    ) -> None:
        """Create the client without connecting.

        Args:
            url: such as http://localhost:8000/v1.
            model: its name on the server.
            max_tokens: of a completion.
            temperature: of the sampling.
            where: what names the URL, for messages.

        Raises:
            UserError: the URL is invalid, or contains credentials.
        """
        self.url, self.model = _check_url(url, where), model
        self.max_tokens, self.temperature = max_tokens, temperature
        self._key = os.environ.get("OPENAI_API_KEY") or "none"  # a private server may need no key
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=url, max_retries=MAX_RETRIES, timeout=TIMEOUT_SECONDS
        )

    def max_usage(self, messages: Messages) -> TokenUsage:
        """The most that a request can consume: no token is shorter than a byte."""
        size = sum(len(message["content"].encode()) + 16 for message in messages)
        return TokenUsage(1, size + 64, self.max_tokens)

    async def complete(self, messages: Messages, seed: int) -> Reply:
        """Request a completion.

        Raises:
            RequestError: no reply after the client's retries, or a malformed one.
            UserError: the server rejects the key, the model or the URL.
        """
        prompt: list[Any] = messages
        usage = self.max_usage(messages)
        try:
            response: Any = await self._client.chat.completions.create(
                model=self.model,
                messages=prompt,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=seed,
            )
            usage = _reported_usage(response, usage)
            return _parse_reply(response, usage)
        except FATAL as error:
            fix = "check OPENAI_API_KEY, the model's name and the URL"
            raise UserError(self._error_message(error), where=self.url, fix=fix) from None
        except openai.OpenAIError as error:
            raise RequestError(self._error_message(error), TokenUsage(1)) from None
        except ValueError as error:  # no JSON, or no message in it; tokens may have been consumed
            raise RequestError(self._error_message(error), usage) from None

    def _error_message(self, error: Exception) -> str:
        """The first line of an error without the key, which some servers repeat."""
        return first_line(error)[:300].replace(self._key, "[key]")

    def problem(self) -> str:
        """Why the server cannot be used now; empty if it answers a request for its models."""
        client = openai.OpenAI(
            api_key=self._key, base_url=self.url, max_retries=0, timeout=PROBE_SECONDS
        )
        try:
            with client:
                client.models.list()
        except (
            openai.APIConnectionError,
            openai.AuthenticationError,
            openai.PermissionDeniedError,
        ) as error:
            return self._error_message(error)
        except (openai.OpenAIError, ValueError):  # it answers, but lists no models
            pass
        return ""

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _parse_reply(response: Any, usage: TokenUsage) -> Reply:
    """Servers differ in what they send, so every field is checked."""
    try:
        choice = response.choices[0]
        text, finish = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError("the reply contains no message") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the reply is empty (finish reason: {finish})")
    text = text.encode(errors="replace").decode().replace("\0", "")
    return Reply(text, str(finish), usage)


def _reported_usage(response: Any, max_usage: TokenUsage) -> TokenUsage:
    """The usage that the server reports; the maximum if it reports none."""
    reported = getattr(response, "usage", None)
    names = ("prompt_tokens", "completion_tokens")
    counts = [count for n in names if isinstance(count := getattr(reported, n, None), int)]
    return TokenUsage(1, *counts) if len(counts) == 2 and min(counts) >= 0 else max_usage


def _check_url(url: str, where: str) -> str:
    """The URL, if it is safe to write next to the rows.

    Raises:
        UserError: it is not an http URL, or contains credentials.
    """
    try:
        parsed = urlsplit(url)
        valid = parsed.scheme in ("http", "https") and bool(parsed.hostname)
    except ValueError:
        valid = False
    if not valid:
        fix = "use a URL such as http://localhost:8000/v1"
        raise UserError("not the URL of an endpoint", where=where, fix=fix)
    if has_secret(url):
        raise secret_error(where)
    return url
