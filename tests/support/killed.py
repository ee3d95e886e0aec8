"""Run by test_checkpoints.py: trains until killed half-way through writing the optimizer of the second checkpoint."""

import os
import signal
import sys
from pathlib import Path

import torch

from support.training import checkpointed_trainer

save = torch.save


def half_a_save(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if str(file).endswith("checkpoint-4/optimizer.pt"):
        with open(file, "r+b") as half:
            half.truncate(Path(file).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.save = half_a_save
    checkpointed_trainer(sys.argv[1], sys.argv[2]).train()
