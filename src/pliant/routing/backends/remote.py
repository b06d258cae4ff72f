"""Asking a model behind a URL: any server that speaks OpenAI's chat protocol.

What may pass by itself (408, 429, 5xx, a time-out, a lost connection) is tried again; what will not
(a wrong key, no such model) ends at once. The key is read from an environment variable when it is
sent, and stands in no file, message or error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput
from pliant.routing.backends.costs import Used
from pliant.routing.backends.protocol import Answers, Asked, BackendError, Settings, key_from
from pliant.routing.backends.retry import Retry
from pliant.routing.backends.several import several
from pliant.routing.prompts import Prompt, messages

if TYPE_CHECKING:
    import httpx

KEY = "OPENAI_API_KEY"
_CONNECT = 5.0  # seconds: who does not even take a call is down, however long answers may take
_FRAME = 8  # tokens that a chat template adds to a message, about
_BYTES_A_TOKEN = 3  # rather few, so that an estimate is rather too high


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
    ) -> None:
        if concurrency < 1 or timeout <= 0:
            raise InvalidInput(f"concurrency={concurrency}, timeout={timeout}: above 0 are due")
        self.name, self.url, self._model = name, url, model
        self._key_env, self._concurrency, self._timeout = key_env, concurrency, timeout
        self._retry = retry or Retry()
        self._context = context_tokens
        self._client: httpx.Client | None = None
        self._opening = threading.Lock()
        self._limit_name = "max_tokens"  # until the server says that it wants the newer name
        self._one_at_a_time = False  # until the server says that it gives one sample a call

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Asked]:
        """Several at a time; whoever stops listening stops the calls that have not begun."""
        stop = threading.Event()
        try:
            yield from several(
                lambda prompt: self._answered(prompt, settings, stop), prompts, self._concurrency
            )
        finally:
            stop.set()  # nobody waits to try again for somebody who has gone

    def count(self, prompt: Prompt) -> int:
        return _estimated(messages(prompt))

    def context(self) -> int | None:
        return self._context

    def knows(self, unit: str) -> bool:
        return unit not in ("usd", "flops")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # --- one prompt ------------------------------------------------------------------------------

    def _answered(
        self, prompt: Prompt, settings: Settings, stop: threading.Event
    ) -> Answers | BackendError:
        try:
            conversation = messages(prompt)
        except InvalidInput as error:
            return BackendError(f"{self.name}: {error}", "prompt refused")
        texts: list[str] = []
        used, cut = Used(flops=None, usd=None), 0
        try:
            while len(texts) < settings.samples:  # a server may give fewer than are asked for
                wanted = settings.samples - len(texts)
                part = self._call(conversation, settings, wanted, len(texts), stop)
                texts += part.texts
                used, cut = used + part.used, cut + part.cut
        except BackendError as error:
            return error
        return Answers(tuple(texts), used, cut)

    def _call(
        self,
        conversation: list[dict[str, str]],
        settings: Settings,
        wanted: int,
        have: int,
        stop: threading.Event,
    ) -> Answers:
        """One call that was answered, after as many tries as it takes."""
        tried = 0
        while True:
            tried += 1
            asked = 1 if self._one_at_a_time else wanted
            failure, retry_after, worth = None, None, False
            begun = time.perf_counter()
            try:
                reply = self._post(self._body(conversation, settings, asked, have))
                failure, worth = self._failure(reply)
                retry_after = reply.headers.get("retry-after")
                if failure is None:
                    ms = (time.perf_counter() - begun) * 1000
                    return self._read(reply, conversation, wanted, ms)
                if self._adapts(reply, asked):
                    tried -= 1
                    continue
            except _unanswered() as error:
                failure, worth = self._unanswered(error), True
            except BackendError as error:  # an answer that is none
                failure, worth = error, True
            wait = self._retry.wait(tried, retry_after) if worth else None
            if wait is None or stop.wait(wait):
                after = f" (after {tried} tries)" if tried > 1 else ""
                raise BackendError(f"{failure}{after}", failure.kind, hopeless=failure.hopeless)

    def _body(
        self, conversation: list[dict[str, str]], settings: Settings, asked: int, have: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": conversation,
            self._limit_name: settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if asked > 1:
            body["n"] = asked
        if settings.temperature > 0:
            body["seed"] = settings.seed + have
        return body

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        import httpx

        with self._opening:
            if self._client is None:
                limits = httpx.Limits(max_connections=self._concurrency)
                patience = httpx.Timeout(self._timeout, connect=min(_CONNECT, self._timeout))
                self._client = httpx.Client(timeout=patience, limits=limits)
            client = self._client
        key = key_from(self._key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return client.post(f"{self.url}/chat/completions", json=body, headers=headers)

    def _adapts(self, reply: httpx.Response, asked: int) -> bool:
        """Whether the server refused only how it was asked, and is now asked otherwise."""
        if reply.status_code not in (400, 422):
            return False
        if self._limit_name == "max_tokens" and "max_completion_tokens" in reply.text:
            self._limit_name = "max_completion_tokens"
            return True
        if asked > 1 and not self._one_at_a_time:
            self._one_at_a_time = True
            return True
        return False

    # --- what came back --------------------------------------------------------------------------

    def _read(
        self, reply: httpx.Response, conversation: list[dict[str, str]], wanted: int, ms: float
    ) -> Answers:
        try:
            found = reply.json()
            choices = found["choices"][:wanted]
            texts = tuple(choice["message"]["content"] or "" for choice in choices)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError("no text")
            usage = found.get("usage") or {}
            asked = int(usage.get("prompt_tokens") or 0)
            said = int(usage.get("completion_tokens") or 0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise BackendError(
                f"{self.name}: the server's answer is no chat completion: "
                f"{self._gist(reply.text) or 'nothing'}",
                "broken reply",
            ) from error
        asked = asked or _estimated(conversation)  # a server that does not count
        said = said or sum(len(text.encode()) // _BYTES_A_TOKEN + 1 for text in texts)
        cut = sum(1 for choice in choices if choice.get("finish_reason") == "length")
        return Answers(texts, Used(len(texts), asked, said, ms, None, None), cut)

    def _failure(self, reply: httpx.Response) -> tuple[BackendError | None, bool]:
        """What a status says went wrong, and whether another try is worth it."""
        status = reply.status_code
        if 200 <= status < 300:
            return None, False
        said = f"{self.name}: the server says {status}: {self._gist(reply.text)}"
        if status == 429 and "insufficient_quota" not in reply.text:
            return BackendError(said, "busy"), True
        if status == 408:
            return BackendError(said, "timeout"), True
        if status >= 500:
            return BackendError(said, "server error"), True
        if status in (400, 413, 422):
            long = "context" in reply.text.lower() or status == 413
            return BackendError(said, "prompt too long" if long else "prompt refused"), False
        return BackendError(f"{said}{self._hint(status)}", "refused", hopeless=True), False

    def _hint(self, status: int) -> str:
        if status == 401 and key_from(self._key_env) is None:
            return f" (the environment variable {self._key_env} holds no key)"
        return ""

    def _unanswered(self, error: Exception) -> BackendError:
        import httpx

        why = self._gist(str(error)) or type(error).__name__
        if isinstance(error, httpx.ConnectTimeout):
            return BackendError(f"{self.name}: {self.url} does not take calls", "unreachable")
        if isinstance(error, httpx.TimeoutException):
            return BackendError(f"{self.name}: no answer in {self._timeout:g} s", "timeout")
        return BackendError(f"{self.name}: {self.url} was not reached: {why}", "unreachable")

    def _gist(self, text: str) -> str:
        """A server's words on one line, cut, and without the key, which some servers repeat."""
        key = key_from(self._key_env)
        line = " ".join((text.replace(key, "***") if key else text).split())
        return line if len(line) <= 200 else line[:197] + "..."


def _estimated(conversation: list[dict[str, str]]) -> int:
    octets = sum(len(m["content"].encode()) for m in conversation)
    return octets // _BYTES_A_TOKEN + 1 + _FRAME * len(conversation)


def _unanswered() -> tuple[type[Exception], ...]:
    import httpx

    return (httpx.TransportError,)
