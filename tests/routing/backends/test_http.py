"""Whatever a server does is a failure of that server, in time and in a bounded memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest
from tests.routing.chat_server import Drip, Scripted, chat_server

from pliant.errors import InvalidInput
from pliant.routing.backends import Answers, BackendError, Settings
from pliant.routing.backends.http import MOST_BYTES, Client, NoReply
from pliant.routing.backends.protocol import MODEL_FAULTS
from pliant.routing.backends.remote import OpenAIBackend, Retry, seconds_from

GOOD = b'{"choices": [{"message": {"content": "hello"}}], "usage": {"prompt_tokens": 3}}'
ONCE = Retry(tries=1)


def reply(content: bytes, *headers: bytes, length: int | None = None) -> bytes:
    size = b"Content-Length: %d" % (len(content) if length is None else length)
    start = (b"HTTP/1.1 200 OK", b"Connection: close", *headers, size)
    return b"\r\n".join([*start, b"", content])


def completion(content: str = '"hello"', usage: str = "{}") -> bytes:
    message = f'{{"message": {{"content": {content}}}, "finish_reason": null}}'
    return reply(f'{{"choices": [{message}], "usage": {usage}}}'.encode())


def encoded(content: bytes, name: bytes) -> bytes:
    return reply(content, b"Content-Encoding: " + name)


FAULTS: dict[str, Scripted] = {
    "nothing": b"",
    "no HTTP": b"hello there\r\n\r\n",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "less than promised": reply(GOOD, length=1000),
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no gzip": encoded(b"hello", b"gzip"),
    "no deflate": encoded(GOOD, b"deflate"),
    "half a gzip": encoded(gzip.compress(GOOD)[:-9], b"gzip"),
    "damaged gzip": encoded(gzip.compress(GOOD)[:20] + b"xxxx", b"gzip"),
    "a gzip bomb": encoded(gzip.compress(bytes(8 * MOST_BYTES), 1), b"gzip"),
    "another encoding": encoded(GOOD, b"br"),
    "a long body": reply(b" " * (MOST_BYTES + 1)),
    "a body that drips": Drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n{"),
    "headers that drip": Drip(b"HTTP/1.1 200 OK\r\nX: "),
    "no UTF-8": reply(b'{"choices": [{"message": {"content": "\xff"}}]}'),
    "deep JSON": reply(b"[" * 200_000),
    "deep objects": reply(b'{"a":' * 200_000),
    "a long number": completion(usage='{"prompt_tokens": %s}' % ("9" * 5000)),
    "infinity": completion(usage='{"prompt_tokens": Infinity}'),
    "minus infinity": completion(usage='{"completion_tokens": -Infinity}'),
    "not a number": completion(usage='{"prompt_tokens": NaN}'),
    "too large for a float": completion(usage='{"prompt_tokens": 1e999}'),
    "more than anybody has": completion(usage='{"prompt_tokens": 1e30}'),
    "fewer than none": completion(usage='{"prompt_tokens": -1}'),
    "text for a number": completion(usage='{"prompt_tokens": "3"}'),
    "true for a number": completion(usage='{"completion_tokens": true}'),
    "a list of usage": completion(usage="[1]"),
    "half an emoji": completion(r'"\ud83d"'),
    "a list of content": completion('[{"type": "text"}]'),
    "choices that are text": reply(b'{"choices": "abc"}'),
    "choices that are none": reply(b'{"choices": null}'),
    "a choice that is none": reply(b'{"choices": [null]}'),
    "nothing at all": b"HTTP/1.1 204 No Content\r\n\r\n",
}


def ask(server: Any, *prompts: str, **options: Any) -> list[Any]:
    """Other prompts than the first meet a server that is well."""
    options = {"retry": ONCE, "timeout": 0.5, "concurrency": 1, **options}
    backend = OpenAIBackend("far", "m", server.url, **options)
    try:
        return [result for _, result in backend.ask(prompts, Settings())]
    finally:
        backend.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_failure_of_that_server_alone(fault: str) -> None:
    with chat_server([FAULTS[fault]]) as server:
        failure, answer = ask(server, "a", "b", timeout=0.5 if "drip" in fault else 10.0)
    assert isinstance(failure, BackendError) and failure.kind in MODEL_FAULTS
    assert failure.kind == ("timeout" if "drip" in fault else failure.kind)
    assert str(failure).startswith("far: ") and str(failure).isprintable()
    assert len(str(failure)) < 400
    assert isinstance(answer, Answers) and answer.texts == ("B",)


@pytest.mark.parametrize(
    "kind",
    [b"gzip", b"x-gzip", b"GZIP", b"deflate", b"identity", b""],
)
def test_a_reply_may_be_compressed_unasked(kind: bytes) -> None:
    packed = zlib.compress(GOOD) if kind == b"deflate" else gzip.compress(GOOD)
    content = packed if b"zip" in kind.lower() or kind == b"deflate" else GOOD
    with chat_server([encoded(content, kind)]) as server:
        (answer,) = ask(server, "a", timeout=10.0)
    assert answer.texts == ("hello",) and answer.used.prompt_tokens == 3


def test_no_more_than_the_limit_is_ever_in_memory() -> None:
    bomb = encoded(gzip.compress(bytes(100_000_000), 1), b"gzip")
    with chat_server([bomb]) as server:
        client = Client(timeout=60, connections=1, most_bytes=1_000_000)
        tracemalloc.start()
        with pytest.raises(NoReply, match="longer than 1,000,000 bytes"):
            client.post(f"{server.url}/chat/completions", {"messages": [{"content": "a"}]}, {})
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        client.close()
    assert most < 10_000_000


def test_a_message_controls_no_terminal() -> None:
    with chat_server([(404, {}, "a\x1b[2Jb\u202ec\x00")]) as server:
        (failure,) = ask(server, "a", timeout=10.0)
    assert str(failure).endswith(": a [2Jb c")


@pytest.mark.parametrize("where", ["status 401", "status 500", "no JSON", "an answer"])
def test_a_key_that_a_server_repeats_is_masked(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = 'sk-proj-"quoted"/and+long'
    monkeypatch.setenv("MY_KEY", f" {key}\n")
    repeats = json.dumps({"error": f"bad key {key}"})
    answer = json.dumps({"choices": [{"message": {"content": f"Your key is {key}."}}]})
    script: dict[str, Scripted] = {
        "status 401": (401, {}, repeats),
        "status 500": (500, {}, repeats),
        "no JSON": f"<p>{key}",
        "an answer": answer,
    }
    with chat_server([script[where]]) as server:
        (result,) = ask(server, "a", timeout=10.0, key_env="MY_KEY")
        assert server.keys == [f"Bearer {key}"]
    shown = result.texts[0] if isinstance(result, Answers) else str(result)
    assert "***" in shown and "quoted" not in shown


def test_a_key_that_cannot_be_sent_fails_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-se\ncret")
    with chat_server() as server:
        (failure,) = ask(server, "a", key_env="MY_KEY")
        assert not server.bodies
        with pytest.raises(InvalidInput, match="is it the key itself") as caught:
            ask(server, "a", key_env="sk-secret")
    assert failure.fatal and "MY_KEY holds no API key" in str(failure)
    assert "cret" not in str(failure) + str(caught.value)


@pytest.mark.parametrize(
    "value", ["", "soon", "nan", "-1", "1e999", "Fri, 99 Foo", "Mon, 01 Jan 1"]
)
def test_a_strange_time_to_wait_is_none_or_a_number(value: str) -> None:
    seconds = seconds_from(value, now=0.0)
    assert seconds is None or seconds >= 0
    assert Retry().wait(1, value) is None or Retry().wait(1, value) > 0  # type: ignore[operator]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_call_takes_a_limited_time(timeout: float) -> None:
    with pytest.raises(InvalidInput, match=r"^timeout="):
        OpenAIBackend("far", "m", "http://127.0.0.1:1/v1", timeout=timeout)
