"""Downloads: bounds of size and time, and errors that name the address."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from support.pictures import MEDIA

from btok_hf import BTokSentenceTransformer, download


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/head.png":
            self.drip(b"HTTP/1.1 200 OK\r\n")
            return
        self.send_response(200)
        if self.path.startswith("/clip.mp4"):
            content = (MEDIA / "upright.mp4").read_bytes()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif self.path == "/cut.png":
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        else:
            self.end_headers()
            self.drip(b"", *((1000, 0) if self.path == "/endless.png" else ()))

    def drip(self, first, size=1, seconds=0.05):
        """Bytes without an end."""
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            while True:
                self.wfile.write(b"x" * size)
                time.sleep(seconds)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_video_is_the_same_by_address(address, model):
    expected = model.encode([{"video": MEDIA / "upright.mp4"}])
    for item in (f"{address}/clip.mp4", f"{address}/clip.mp4?x=1", {"video": f"{address}/clip.mp4"}):
        np.testing.assert_array_equal(model.encode([item]), expected)


def test_a_handshake_that_never_ends_is_ended():
    """TLS, whose records come byte by byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")  # the head of a record of 16 KiB
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(ValueError, match=r"it takes longer than 0.5 seconds"):
            download.download(f"https://127.0.0.1:{server.getsockname()[1]}/a.png", most_seconds=0.5)


def test_a_download_that_never_ends_is_ended(address):
    with pytest.raises(ValueError, match=r"endless.png' cannot be downloaded \(it holds more than 1000000 bytes\)"):
        download.download(f"{address}/endless.png", most_bytes=10**6)
    for name in ("slow.png", "head.png"):  # the timeout of a socket begins anew with each byte
        start = time.monotonic()
        with pytest.raises(ValueError, match=rf"{name}' cannot be downloaded \(it takes longer than 0.3 seconds"):
            download.download(f"{address}/{name}", most_seconds=0.3)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "name, reason",
    [("cut.png", "ended 990 bytes too early"), ("\u2603.png", "ascii"), (" b.png", "control characters")],
)
def test_what_cannot_be_downloaded_is_named(address, name, reason):
    with pytest.raises(ValueError, match=f"cannot be downloaded .*{reason}.*download the file yourself"):
        download.download(f"{address}/{name}")


@pytest.mark.parametrize("item", ["http://127.0.0.1:9/v.mp4", "http://127.0.0.1:9999999/a.png", "http://a b/c.png"])
def test_errors_of_addresses_name_the_input(repo, item):
    key = "video" if item.endswith("mp4") else "image"
    with pytest.raises(ValueError, match=r"^Input 1 .*cannot be downloaded"):
        BTokSentenceTransformer(repo, device="cpu").encode(["a", {key: item}])
