"""A real HTTP server that speaks OpenAI's chat protocol, and fails as a test scripts it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Drip:
    """Sends these bytes, then one more at a time for as long as somebody reads."""

    start: bytes


Scripted = (
    int | tuple[int, dict[str, str]] | tuple[int, dict[str, str], str] | str | bytes | Drip | None
)


@dataclass
class ChatServer:
    """Answers the last message in capitals, after what the script has for the next calls.

    An entry of the script is a status (with headers, with a body), "hang up", "stall" (until the
    server ends), a text that is sent as it is with status 200, bytes that are all of a reply with
    its headers, or None for an ordinary answer.
    """

    script: list[Scripted] = field(default_factory=list)
    gives: int = 99
    """The most choices that one call gets."""
    usage: bool = True
    wants_key: str | None = None
    refuses: Callable[[dict[str, Any]], str | None] = lambda body: None
    """A reason to refuse a body with status 400."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def chat_server(script: list[Scripted] | None = None, **options: Any) -> Iterator[ChatServer]:
    state = ChatServer(script or [], **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(state: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            with state.lock:
                state.bodies.append(body)
                state.keys.append(key)
                step = state.script.pop(0) if state.script else None
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                self._answer(step, body, key)
            finally:
                with state.lock:
                    state.at_once -= 1

        def _answer(self, step: Scripted, body: dict[str, Any], key: str | None) -> None:
            if step == "hang up":
                self.close_connection = True
                self.connection.close()
            elif step == "stall":
                state.ended.wait()
                self.close_connection = True
            elif isinstance(step, (bytes, Drip)):
                self._send_raw(step)
            elif isinstance(step, str):
                self._send(200, {}, step)
            elif isinstance(step, int):
                self._send(step, {}, json.dumps({"error": {"message": f"scripted {step}"}}))
            elif isinstance(step, tuple):
                self._send(step[0], step[1], step[2] if len(step) > 2 else "{}")
            elif state.wants_key and key != f"Bearer {state.wants_key}":
                self._send(401, {}, json.dumps({"error": {"message": f"wrong key {key}"}}))
            elif reason := state.refuses(body):
                self._send(400, {}, json.dumps({"error": {"message": reason}}))
            else:
                self._send(200, {}, json.dumps(self._completion(body)))

        def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
            text = body["messages"][-1]["content"].upper()
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            count = min(body.get("n", 1), state.gives)
            usage = {"prompt_tokens": len(text), "completion_tokens": 2 * count}
            return {"choices": [choice] * count, **({"usage": usage} if state.usage else {})}

        def _send(self, status: int, headers: dict[str, str], text: str) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _send_raw(self, step: bytes | Drip) -> None:
            self.close_connection = True
            with suppress(OSError):  # the client has hung up
                self.wfile.write(step.start if isinstance(step, Drip) else step)
                while isinstance(step, Drip) and not state.ended.wait(0.01):
                    self.wfile.write(b"x")

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
