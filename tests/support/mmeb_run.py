"""Run by test_mmeb.py, alone or in two processes: `btok mmeb` with a function as the model.

Arguments: root, output, datasets, and which write of embeddings is cut off by a kill (0: none). Every process writes
how many inputs it encoded, the exit status, and whether the process group is still there.
"""

import json
import os
import signal
import sys

import torch

from btok_hf import cli
from btok_hf.evaluation import embeddings, models
from support.mmeb_tree import looks

seen = []
writes = 0
replace = os.replace


def counted(inputs):
    seen.extend(inputs)
    return looks(inputs)


def replace_or_die(draft, path, kill):
    global writes
    writes += str(path).endswith(".embeddings")
    if writes == kill:
        os.truncate(draft, os.path.getsize(draft) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(draft, path)


def main(root, output, datasets, kill):
    if int(kill):
        embeddings.ROWS_PER_FILE = 2
        os.replace = lambda draft, path: replace_or_die(draft, path, int(kill))
    models.load_model = lambda *arguments, **options: counted
    status = cli.main(["mmeb", "--model", "looks", "--data", root, "--output", output, "--datasets", datasets])
    with open(f"{output}.{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump([len(seen), status, torch.distributed.is_initialized()], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
