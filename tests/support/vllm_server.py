"""vLLM on the CPU of this machine, in an environment of its own, and requests to it."""

import base64
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np

from . import ROOT

# Made by `make test-vllm`, or `make test-vllm-next`.
PYTHON = ROOT / os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")
START = 900  # seconds that a server may take to start, on a busy machine
# The largest difference to golden vectors. Measured: 5e-7, and 6e-3 or, on a CPU without bf16 instructions, 1e-2.
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}


def environment(**changes):
    """Small, quiet and offline. One thread: several servers' idle threads would keep the cores busy.

    On any core: vLLM would bind each server to the first, whatever else runs there.
    """
    fixed = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    fixed |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **fixed, **changes}


class VllmServer:
    """`with VllmServer(repo, log) as server`. The command `vllm serve` fails in vllm-cpu; the module does the same."""

    def __init__(self, repo, log, *options, dtype="float32", **changes):
        self.close = CLOSE[dtype]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", repo, "--served-model-name", "btok"]
        command += ["--host", "127.0.0.1", "--port", self.port, "--runner", "pooling", "--dtype", dtype]
        command += ["--enforce-eager", *options]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(**changes),
                start_new_session=True,
            )

    def has_started(self):
        """Wait until the server answers, or has ended."""
        end = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < end:
            if self.is_alive():
                return True
            time.sleep(0.5)
        return False

    def is_alive(self):
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=10).status == 200
        except OSError:
            return False

    def __enter__(self):
        if not self.has_started():
            self.stop()
            raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")
        return self

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:  # on a busy machine; its workers are in the group
            os.killpg(self.process.pid, signal.SIGKILL)

    def __exit__(self, *error):
        self.stop()

    def post(self, path="/v1/embeddings", **body):
        """The status, and the answer or the error message."""
        data = json.dumps({"model": "btok", **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]

    def metric(self, name):
        """A number of `/metrics`, summed over its labels."""
        lines = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def vectors(self, path="/v1/embeddings", **body):
        """The vectors of a request that must succeed."""
        status, answer = self.post(path, **body)
        assert status == 200, answer
        found = [row.get("embedding", row.get("data")) for row in answer["data"]]
        return np.array([np.frombuffer(base64.b64decode(x), "<f4") if isinstance(x, str) else x for x in found], "f4")
