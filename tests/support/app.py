"""The page of a database in a process of its own, and a client of it."""

import os
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx
from gradio_client import Client

from support.forks import Fork


@contextmanager
def page(command, folder, **environment):
    """Start a page with a command (without the interpreter) on a free port, and give a client with its `process`.

    The page keeps its uploads in `folder`, and what it prints in `folder / "log"`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder), **environment}
    given["GRADIO_SERVER_PORT"] = str(port)
    words = [word.replace("PORT", str(port)) for word in map(str, command)]
    with open(folder / "log", "wb") as log:
        process = Fork(words, {**os.environ, **given}, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process, folder / "log")
        client = Client(url, verbose=False, analytics_enabled=False, download_files=False)
        client.process = process
        yield client
    finally:
        process.kill()
        process.wait()


def _wait_for(url, process, log):
    for _ in range(1200):
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError("the page did not start")
