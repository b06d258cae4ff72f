"""One call of a server, limited in time and in bytes whatever the server does.

    with closing(Client(timeout=120, connections=8)) as client:
        reply = client.post("https://host/v1/chat/completions", {"model": "m"}, {})

`NoReply` is everything that can go wrong: no connection, no answer in time, a reply that cannot be
decoded or is too long.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

MOST_BYTES = 16 * 2**20  # of a reply; the longest answers have a few hundred thousand
_CONNECT = 5.0  # seconds: a server that accepts no connection is down, however slow its answers
_GRACE = 0.5  # seconds in which a call that is late ends by itself
_EXCERPT = 20_000  # bytes of a reply that are searched for what went wrong
_ZLIB_OR_GZIP = 47  # zlib's `wbits`: either header


class NoReply(Exception):
    """A call without a reply that can be read."""

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind
        """As of a BackendError: unreachable, timeout or broken reply."""


@dataclass(frozen=True)
class Reply:
    """What a server answered, decoded."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def excerpt(self) -> str:
        """The beginning of the content, as text."""
        return self.content[:_EXCERPT].decode("utf-8", "replace")

    def json(self) -> Any:
        """The content; ValueError if it is no JSON, or nested too deeply to be read."""
        try:
            return json.loads(self.content)
        except RecursionError:
            raise ValueError("nested too deeply") from None


class Client:
    """Posts JSON to servers, from several threads at a time; their calls share connections."""

    def __init__(self, *, timeout: float, connections: int, most_bytes: int = MOST_BYTES) -> None:
        self._timeout, self._connections, self._most_bytes = timeout, connections, most_bytes
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None

    def post(self, url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """The server's reply, whatever its status; NoReply if none came in time."""
        client, content = self._opened(), json.dumps(body).encode()
        deadline = time.monotonic() + self._timeout
        outcome: Future[Reply] = Future()

        def call() -> None:
            try:
                outcome.set_result(self._reply(client, url, content, headers, deadline))
            except BaseException as error:
                outcome.set_exception(error)

        # httpx limits the time of each read, and a server may send its headers byte by byte.
        threading.Thread(target=call, daemon=True).start()
        try:
            return outcome.result(self._timeout + _GRACE)
        except NotDone:
            self._abandon(client)
            raise self._late() from None

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _opened(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._client is None:
                limits = httpx.Limits(max_connections=self._connections)
                timeout = httpx.Timeout(self._timeout, connect=min(_CONNECT, self._timeout))
                self._client = httpx.Client(timeout=timeout, limits=limits)
            return self._client

    def _abandon(self, client: httpx.Client) -> None:
        """Later calls get connections of their own: one of this client's is taken for good."""
        with self._lock:
            if self._client is client:
                self._client = None

    def _reply(
        self,
        client: httpx.Client,
        url: str,
        content: bytes,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Reply:
        import httpx

        fixed = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        try:
            with client.stream("POST", url, content=content, headers={**fixed, **headers}) as reply:
                return Reply(reply.status_code, reply.headers, self._content(reply, deadline))
        except httpx.ConnectTimeout:
            raise NoReply(f"{url} accepts no connection", "unreachable") from None
        except httpx.TimeoutException:
            raise self._late() from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise NoReply(f"{url} cannot be reached: {reason}", "unreachable") from None

    def _content(self, reply: httpx.Response, deadline: float) -> bytes:
        """The decoded content, of which no more than the limit is ever in memory."""
        encoding = reply.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise NoReply(f"the reply is encoded as {encoding[:40]!r}", "broken reply")
        plain = encoding in ("", "identity")
        decoder = None if plain else zlib.decompressobj(_ZLIB_OR_GZIP)
        content = bytearray()
        for chunk in reply.iter_raw():
            room = self._most_bytes + 1 - len(content)
            try:
                content += chunk if decoder is None else decoder.decompress(chunk, room)
            except zlib.error as error:
                raise NoReply(f"the reply is no {encoding} ({error})", "broken reply") from None
            if len(content) > self._most_bytes:
                most = f"{self._most_bytes:,} bytes"
                raise NoReply(f"the reply is longer than {most}", "broken reply")
            if time.monotonic() > deadline:
                raise self._late()
        if decoder is not None and not decoder.eof:
            raise NoReply(f"the reply is no {encoding} (it ends early)", "broken reply")
        return bytes(content)

    def _late(self) -> NoReply:
        return NoReply(f"no answer in {self._timeout:g} s", "timeout")
