"""A chat-completion server for tests of what sends requests."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A chat-completion server; `answer(body, n)` returns the response to the n-th request.

    The response is (status, body, headers), or the text of a good reply.
    """

    def __init__(self, answer) -> None:
        self.answer, self.bodies, self.keys = answer, [], set()
        self.lock, self.pending, self.max_pending = threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            def do_GET(self) -> None:
                self.send_error(404)  # it lists no models

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        with self.lock:
            self.bodies.append(body)
            number = len(self.bodies)
            self.keys.add(request.headers["authorization"])
            self.pending += 1
            self.max_pending = max(self.max_pending, self.pending)
        try:
            response = self.answer(body, number)
        finally:
            with self.lock:
                self.pending -= 1
        status, content, headers = (
            response if isinstance(response, tuple) else (200, reply(response), {})
        )
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            request.send_header(name, value)
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def reply(text, finish="stop", usage=(10, 5)):
    choice = {"index": 0, "finish_reason": finish}
    choice["message"] = {"role": "assistant", "content": text}
    out = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    if usage:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        out["usage"] = {**counts, "total_tokens": sum(usage)}
    return out
