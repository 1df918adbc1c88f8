"""An OpenAI-compatible endpoint on this machine, whose model says what a function of the request says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_dlm.config.reward import RewardConfig


class Model:
    """What the server does, and what it has seen.

    Attributes:
        answer: from the request's body to the text of the reply; or to (HTTP code, body of the reply).
        seen: bodies and headers of all requests, in order of arrival.
        most: most requests that were inside at the same time.
    """

    def __init__(self, answer: Callable[[dict], str | tuple[int, str]]) -> None:
        self.answer, self.seen, self.headers = answer, [], []
        self.inside = self.most = 0
        self.lock = threading.Lock()


@contextmanager
def judging(
    answer: Callable[[dict], str | tuple[int, str]], **settings: object
) -> Iterator[tuple[Model, RewardConfig]]:
    """The model, and the settings that point to it."""
    model = Model(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                model.seen.append(body)
                model.headers.append(dict(self.headers) | {"path": self.path})
                model.inside += 1
                model.most = max(model.most, model.inside)
            said = model.answer(body)
            time.sleep(0.005)
            with model.lock:
                model.inside -= 1
            code, text = (
                (200, json.dumps({"choices": [{"message": {"content": said}}]}))
                if not isinstance(said, tuple)
                else said
            )
            self.send_response(code)
            if 300 <= code < 400:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    try:
        yield model, RewardConfig(judge_url=url, judge_model="judge-1", **settings)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
