"""Scripts of this folder in processes of their own."""

import os
import socket
import sys
import time

from torch import distributed

from support import ROOT
from support.forks import Fork, run


def script(name, *arguments):
    """The arguments of the interpreter for a script, by name, and its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return [str(ROOT / "tests" / "support" / name), *map(str, arguments)], environment


def run_script(name, *arguments):
    """Run a script, by name, and wait."""
    command, environment = script(name, *arguments)
    return run(*command, env=environment)


def run_two(name, *arguments):
    """Run a script in two processes of a group, with the variables that torchrun sets. Both must succeed."""
    command, environment = script(name, *arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [Fork(command, {**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    try:
        end = time.monotonic() + 300
        while None in (statuses := [fork.poll() for fork in both]) and not any(statuses):
            assert time.monotonic() < end, statuses
            time.sleep(0.05)
        assert statuses == [0, 0], statuses
    finally:
        for fork in both:
            fork.kill()


def leave():
    """End a process of a group. If it exits by itself, threads of torch sometimes abort it ("terminate called …")."""
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
