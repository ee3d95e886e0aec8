"""Scripts of this folder in processes of their own."""

import os
import subprocess
import sys

from torch import distributed

from support import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


def run_script(name, *arguments, launcher=(), **options):
    """Run a script, by name.

    Args:
        launcher (`Sequence[str]`): Arguments of the interpreter before the script; `TORCHRUN`: two processes.
        options: Of `subprocess.run`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "support" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, timeout=300, **options)


def leave():
    """End a process of a group. If it exits by itself, threads of torch sometimes abort it ("terminate called …")."""
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
