"""`btok serve` in a process of its own, and requests to it."""

import base64
import io
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np

from support.forks import Fork


@contextmanager
def served(repo, *flags, key=None):
    """An HTTP client of a server of this repository. Its process is `client.process`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {} if key is None else {"BTOK_API_KEY": key}
    command = ["-m", "btok_hf", "serve", repo, "--name", "tiny", "--device", "cpu", "--port", port, *flags]
    process = Fork(command, environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.process, client.port = process, port
            _wait_for(client)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def _wait_for(client):
    for _ in range(1200):
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            assert client.process.poll() is None, "the server ended"
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def embed(client, **body):
    """The embeddings that a server answers."""
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    rows = [row["embedding"] for row in answer.json()["data"]]
    if body.get("encoding_format") == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    return np.array(rows)


def refusal(client, status, body, headers=None):
    """The message with which a server refuses a request."""
    given = {"content": body} if not isinstance(body, dict) else {"json": body}
    headers = {"Content-Type": "application/json", **(headers or {})}
    answer = client.post("/v1/embeddings", **given, headers=headers)
    assert answer.status_code == status, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == status
    return error["message"]


def png(image):
    """The base64 text of an image's PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def message(*parts):
    """A user message of texts (`str`), images, and videos (lists of images)."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, list):
            url = "data:video/jpeg;base64," + ",".join(map(png, part))
            content.append({"type": "video_url", "video_url": {"url": url}})
        else:
            content.append({"type": "image_url", "image_url": {"url": "data:image/png;base64," + png(part)}})
    return {"role": "user", "content": content}


class _Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *arguments):
        pass


@contextmanager
def web_server(content, port):
    """A web server on this machine that has one file. Yields the list of paths that it was asked for."""
    with ThreadingHTTPServer(("127.0.0.1", port), _Page) as server:
        server.content, server.asked = content, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.asked
        server.shutdown()
