"""The backend of a model behind a URL: any server that speaks OpenAI's chat protocol.

Temporary failures (408, 429, 5xx, a time-out, a lost connection) are retried; permanent ones (a
wrong key, no such model) fail at once. Whatever a server does is a failure of its model alone. The
key is read from an environment variable when it is sent, and never appears in a file, message or
error.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pliant.credentials import api_key, check_variable, masked
from pliant.errors import InvalidInput
from pliant.routing.backends.http import Client, NoReply, Reply
from pliant.routing.backends.protocol import (
    Answers,
    BackendError,
    PromptFormat,
    Result,
    Settings,
    Used,
)
from pliant.routing.prompts import Prompt

Item = TypeVar("Item")
Done = TypeVar("Done")

KEY = "OPENAI_API_KEY"
_LONGEST = 86_400.0  # seconds of a call
_MOST_TOKENS = 10**9  # of an answer: a server that counts more is broken
_LONG_KEY = 20  # letters: in an answer, a shorter one may be a word
_TEMPLATE_TOKENS = 8  # about what a chat template adds to a message
_BYTES_A_TOKEN = 3  # rather few, so that estimates are rather too high


class OpenAIBackend:
    """One model of one server."""

    def __init__(
        self,
        name: str,
        model: str,
        url: str,
        *,
        key_env: str = KEY,
        concurrency: int = 8,
        timeout: float = 120.0,
        retry: Retry | None = None,
        context_tokens: int | None = None,
        prompt_format: PromptFormat | None = None,
    ) -> None:
        if concurrency < 1:
            raise InvalidInput(f"concurrency={concurrency}: give 1 or more")
        if not 0 < timeout <= _LONGEST:
            raise InvalidInput(f"timeout={timeout:g}: give more than 0 and at most {_LONGEST:g} s")
        check_variable(key_env)
        self.name, self.url, self._model = name, url, model
        self._key_env, self._concurrency = key_env, concurrency
        self._retry = retry or Retry()
        self._context, self._format = context_tokens, prompt_format or PromptFormat()
        self._client = Client(timeout=timeout, connections=concurrency)
        self._limit_name = "max_tokens"  # until the server asks for the newer name
        self._single_samples = False  # until the server refuses several samples a call

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Result]:
        """Several calls at a time; closing the generator stops those that have not started."""
        stop = threading.Event()
        try:
            yield from in_parallel(
                lambda prompt: self._answer(prompt, settings, stop), prompts, self._concurrency
            )
        finally:
            stop.set()  # so that no call waits for another try

    def count(self, prompt: Prompt) -> int:
        return _estimate_tokens(self._format.messages(prompt))

    def context(self) -> int | None:
        return self._context

    def knows(self, unit: str) -> bool:
        return unit not in ("usd", "flops")

    def close(self) -> None:
        self._client.close()

    # --- one prompt ------------------------------------------------------------------------------

    def _answer(
        self, prompt: Prompt, settings: Settings, stop: threading.Event
    ) -> Answers | BackendError:
        try:
            conversation = self._format.messages(prompt)
        except InvalidInput as error:
            return BackendError(f"{self.name}: {error}", "prompt refused")
        texts: list[str] = []
        used, truncated = Used(flops=None, usd=None), 0
        try:
            while len(texts) < settings.samples:  # a server may return fewer
                missing = settings.samples - len(texts)
                part = self._call(conversation, settings, missing, len(texts), stop)
                texts += part.texts
                used, truncated = used + part.used, truncated + part.truncated
        except BackendError as error:
            return error
        return Answers(tuple(texts), used, truncated)

    def _call(
        self,
        conversation: list[dict[str, str]],
        settings: Settings,
        samples: int,
        seed_offset: int,
        stop: threading.Event,
    ) -> Answers:
        """The answers of one call, after as many tries as it needs."""
        key, tried = self._key(), 0
        while True:
            tried += 1
            requested = 1 if self._single_samples else samples
            failure, retry_after, retry = None, None, False
            begun = time.perf_counter()
            try:
                body = self._body(conversation, settings, requested, seed_offset)
                reply = self._post(body, key)
                failure, retry = self._failure(reply, key)
                retry_after = reply.headers.get("retry-after")
                if failure is None:
                    ms = (time.perf_counter() - begun) * 1000
                    return self._read(reply, conversation, samples, ms, key)
                if self._adapts(reply, requested):
                    tried -= 1
                    continue
            except NoReply as error:
                reason = self._summary(str(error), key)
                failure, retry = BackendError(f"{self.name}: {reason}", error.kind), True
            except BackendError as error:  # no chat completion
                failure, retry = error, True
            wait = self._retry.wait(tried, retry_after) if retry else None
            if wait is None or stop.wait(wait):
                after = f" (after {tried} tries)" if tried > 1 else ""
                raise BackendError(f"{failure}{after}", failure.kind, fatal=failure.fatal)

    def _body(
        self, conversation: list[dict[str, str]], settings: Settings, samples: int, seed_offset: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": conversation,
            self._limit_name: settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if self._format.stop:
            body["stop"] = list(self._format.stop)
        if samples > 1:
            body["n"] = samples
        if settings.temperature > 0:
            body["seed"] = settings.seed + seed_offset
        return body

    def _post(self, body: dict[str, Any], key: str | None) -> Reply:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self._client.post(f"{self.url}/chat/completions", body, headers)

    def _adapts(self, reply: Reply, samples: int) -> bool:
        """Whether the server refused only the form of the request, which is now changed."""
        if reply.status not in (400, 422):
            return False
        if self._limit_name == "max_tokens" and "max_completion_tokens" in reply.excerpt:
            self._limit_name = "max_completion_tokens"
            return True
        if samples > 1 and not self._single_samples:
            self._single_samples = True
            return True
        return False

    # --- the reply -------------------------------------------------------------------------------

    def _read(
        self,
        reply: Reply,
        conversation: list[dict[str, str]],
        samples: int,
        ms: float,
        key: str | None,
    ) -> Answers:
        try:
            content = reply.json()
            choices = content["choices"][:samples]
            texts = tuple(_text(choice["message"]["content"], key) for choice in choices)
            if not texts:
                raise TypeError("no text")
            usage = content.get("usage") or {}
            prompt_tokens = _count(usage.get("prompt_tokens"))
            answer_tokens = _count(usage.get("completion_tokens"))
            truncated = sum(1 for choice in choices if choice.get("finish_reason") == "length")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            shown = self._summary(reply.excerpt, key) or "nothing"
            raise BackendError(
                f"{self.name}: the server's answer is no chat completion: {shown}", "broken reply"
            ) from None
        if not prompt_tokens:  # some servers do not count
            prompt_tokens = _estimate_tokens(conversation)
        if not answer_tokens:
            answer_tokens = sum(len(text.encode()) // _BYTES_A_TOKEN + 1 for text in texts)
        used = Used(len(texts), prompt_tokens, answer_tokens, ms, None, None)
        return Answers(texts, used, truncated)

    def _failure(self, reply: Reply, key: str | None) -> tuple[BackendError | None, bool]:
        """The error that a status stands for, and whether another try may succeed."""
        status, text = reply.status, reply.excerpt
        if 200 <= status < 300:
            return None, False
        message = f"{self.name}: the server says {status}: {self._summary(text, key)}"
        if status == 429 and "insufficient_quota" not in text:
            return BackendError(message, "busy"), True
        if status == 408:
            return BackendError(message, "timeout"), True
        if status >= 500:
            return BackendError(message, "server error"), True
        if status in (400, 413, 422):
            too_long = "context" in text.lower() or status == 413
            return BackendError(message, "prompt too long" if too_long else "prompt refused"), False
        if status == 401 and key is None:
            message += f" (the environment variable {self._key_env} holds no key)"
        return BackendError(message, "refused", fatal=True), False

    def _key(self) -> str | None:
        """The key, read when it is used and never stored."""
        try:
            return api_key(self._key_env)
        except InvalidInput as error:
            raise BackendError(f"{self.name}: {error}", "refused", fatal=True) from None

    def _summary(self, text: str, key: str | None) -> str:
        """The server's text on one short line, without the key, which some servers repeat, and
        without letters that control a terminal."""
        hidden = masked(text, key)
        line = " ".join("".join(c if c.isprintable() else " " for c in hidden).split())
        return line if len(line) <= 200 else line[:197] + "..."


def _text(content: Any, key: str | None) -> str:
    """An answer that can be written to a file; a server may repeat the key in it."""
    text = content or ""
    if not isinstance(text, str):
        raise TypeError("no text")
    text.encode()  # a lone surrogate is no text: ValueError
    return masked(text, key) if key and len(key) >= _LONG_KEY else text


def _count(tokens: Any) -> int:
    """A number of tokens; 0 if the server does not count."""
    if tokens is None:
        return 0
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)):
        raise TypeError("no number")
    if not 0 <= tokens <= _MOST_TOKENS:  # nor infinite, nor NaN
        raise ValueError("no number of tokens")
    return int(tokens)


def _estimate_tokens(conversation: list[dict[str, str]]) -> int:
    octets = sum(len(m["content"].encode()) for m in conversation)
    return octets // _BYTES_A_TOKEN + 1 + _TEMPLATE_TOKENS * len(conversation)


# --- several calls at a time, and when to try one again -------------------------------------------


def in_parallel(
    work: Callable[[Item], Done], items: Sequence[Item], at_once: int
) -> Generator[tuple[int, Done], None, None]:
    """Each item's index and result, in the order in which they finish.

    Closing the generator returns at once: no further item starts, and running ones (a call to a
    server that stalls) finish on their own, or end with the process.
    """
    waiting = iter(range(len(items)))
    next_lock = threading.Lock()
    done: queue.SimpleQueue[tuple[int, Done | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def worker() -> None:
        while not stopped.is_set():
            with next_lock:
                i = next(waiting, None)
            if i is None:
                return
            try:
                done.put((i, work(items[i]), None))
            except BaseException as error:
                done.put((i, None, error))

    for _ in range(min(at_once, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        for _ in items:
            i, result, error = done.get()
            if error is not None:
                raise error
            yield i, result  # type: ignore[misc]
    finally:
        stopped.set()


@dataclass(frozen=True)
class Retry:
    """Waits that double from `first` to `most` seconds, each drawn at random from its upper half.

    The random draw keeps many callers from retrying at the same time. A wait is at least as long as
    the server's Retry-After; if that is longer than `patience`, there is no further try.
    """

    tries: int = 6
    first: float = 0.5
    most: float = 30.0
    patience: float = 300.0
    draw: Callable[[], float] = field(default=random.random, repr=False)
    now: Callable[[], float] = field(default=time.time, repr=False)

    def __post_init__(self) -> None:
        if self.tries < 1 or self.first < 0 or self.most < self.first:
            raise InvalidInput(f"{self}: needs at least one try, and waits that do not shrink")

    def wait(self, tried: int, retry_after: str | None = None) -> float | None:
        """Seconds to wait after `tried` tries; None: do not try again."""
        if tried >= self.tries:
            return None
        longest = min(self.most, self.first * 2 ** (tried - 1))
        own = longest / 2 + self.draw() * longest / 2
        requested = seconds_from(retry_after, self.now())
        if requested is None:
            return own
        return None if requested > self.patience else max(own, requested)


def seconds_from(retry_after: str | None, now: float) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None if it is neither."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now)
    except (ValueError, OverflowError):
        return None
