"""Python commands in processes of their own that need not import torch first: forks of a process that has.

A fresh interpreter spends three times as long on imports as a fork, and most of a test's time (docs/experiments.md).
`run` and `Fork` take the arguments of the interpreter. This file, run as a script, is the process that forks. What it
imports reads no variable of Hugging Face, so that a command's environment counts as in a fresh interpreter. Who tests
what is imported, or gives flags to the interpreter, needs `subprocess`. Linux only.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import ExitStack, suppress

_starting = threading.Lock()  # one server, though tests ask from several threads
IMPORTED = ("torch", "torch._dynamo", "torchvision", "scipy.sparse", "sklearn.metrics", "pandas", "pyarrow.dataset")


class Fork:
    """A process that runs Python with these arguments (`-c code`, `-m module` or a script), as `subprocess.Popen`."""

    def __init__(self, arguments, env=None, cwd=None, stdin=subprocess.DEVNULL, stdout=None, stderr=None):
        request = {
            "arguments": [*map(str, arguments)],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
        }
        self.returncode = None
        self._answers, answer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answer, open(os.devnull, "rb") as nothing:
            inputs = (nothing if stdin == subprocess.DEVNULL else stdin).fileno()
            outputs = 1 if stdout is None else stdout.fileno()
            errors = outputs if stderr == subprocess.STDOUT else 2 if stderr is None else stderr.fileno()
            with _starting:
                server = _server()
            socket.send_fds(server, [json.dumps(request).encode()], [inputs, outputs, errors, answer.fileno()])
        self.pid = int(self._answers.recv(16))

    def wait(self, timeout=None):
        """The status, once it has ended: the negative signal if one ended it."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                status = self._answers.recv(16)
            except TimeoutError:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout) from None
            self.returncode = os.waitstatus_to_exitcode(int(status))
            self._answers.close()
        return self.returncode

    def poll(self):
        """The status if it has ended."""
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(*arguments, env=None, cwd=None, input=None, check=False, timeout=600):
    """Run Python with these arguments and wait; gives what `subprocess.run` gives, texts of both outputs included."""
    with ExitStack() as stack:
        given, *printed = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        given.write(input or "")
        given.seek(0)
        fork = Fork(arguments, env, cwd, given, *printed)
        try:
            status = fork.wait(timeout)
        finally:
            fork.kill()
        for file in printed:
            file.seek(0)
        texts = [file.read() for file in printed]
    done = subprocess.CompletedProcess([*arguments], status, *texts)
    assert not check or status == 0, done
    return done


@functools.cache
def _server():
    """The socket of the process that forks. It ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, __file__, str(theirs.fileno())]
    with theirs:
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return ours


def serve(requests):
    """Fork for every request. Returns in the forks, with the request that is theirs, and ends with the requests."""
    children = {}
    with selectors.DefaultSelector() as events:
        events.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is not requests:  # a child has ended
                    pid, answer = children.pop(key.fd)
                    events.unregister(key.fd)
                    os.close(key.fd)
                    status = os.waitpid(pid, 0)[1]
                    with suppress(OSError), answer:  # nobody may wait any more
                        answer.sendall(b"%d" % status)
                    continue
                message, files, _, _ = socket.recv_fds(requests, 1 << 20, 4)
                if not message:
                    sys.exit()
                if not (pid := os.fork()):
                    for number, file in enumerate(files[:3]):
                        os.dup2(file, number)
                    for file in [*files, *children, requests.detach()]:
                        os.close(file)
                    for _, answer in children.values():
                        answer.close()
                    return json.loads(message)
                for file in files[:3]:
                    os.close(file)
                answer = socket.socket(fileno=files[3])
                with suppress(OSError):
                    answer.sendall(b"%d" % pid)
                children[ended := os.pidfd_open(pid)] = pid, answer
                events.register(ended, selectors.EVENT_READ)


def become(arguments, environment, folder):
    """Do what `python *arguments` would do, in this process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    kind, *rest = arguments
    if kind == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0] = "-c"
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif kind == "-m":
        module, *sys.argv[1:] = rest
        sys.path.insert(0, folder)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    del sys.path[0]  # of this script
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is never freed is not copied
    become(**serve(channel))
