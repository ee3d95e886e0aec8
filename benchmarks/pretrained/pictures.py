"""What a model sees: the tasks of the unified benchmark that have pictures, with drawings of three sizes.

    python -m benchmarks.pretrained.pictures runs/btok-135m
    python -m benchmarks.pretrained.pictures benchmarks/unified/models/btok-small

Queries and candidates are held out as `benchmarks/unified` holds them out. A model with named prompts is told what it
reads. Each model's ranks become one file of benchmarks/results/pretrained.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.pretrained.run import PICTURE, PRETRAINED, mrr
from benchmarks.pretrained.tasks import positions
from benchmarks.unified.tasks import UNSEEN, Task, chance, tasks
from btok_hf import BTokSentenceTransformer

SIZES = (56, 112, 224)  # pixels of a drawing; the first is that of benchmarks/unified
DRAWINGS = ("name → drawing", "drawing → name", "drawing → other artist's", UNSEEN)
OTHERS = ("name → video", "figure → caption", "caption → figure", "title → page", "question → page")
# The prompt of an input by what its task calls it.
PROMPTS = {"name": "term", "caption": "caption", "title": "title", "question": "question"}


def asked() -> dict[str, Task]:
    """The tasks by name; those of drawings at each size."""
    by_size = {f"{name}, {size} pixels": tasks(size)[name] for name in DRAWINGS for size in SIZES}
    return by_size | {name: tasks()[name] for name in OTHERS}


def ranks(model: BTokSentenceTransformer) -> dict[str, list[int]]:
    """Rank of the right answer of every query, by task."""
    known: dict[tuple[str | None, int | str], np.ndarray] = {}

    def encode(inputs: list, kind: str) -> np.ndarray:
        prompt = PROMPTS.get(kind.split()[0], PICTURE)
        prompt = prompt if prompt in model.prompts else None
        keys = [(prompt, item if isinstance(item, str) else id(item)) for item in inputs]
        new = {key: item for key, item in zip(keys, inputs) if key not in known}
        if new:
            given = [{"text": item} if isinstance(item, str) else item for item in new.values()]
            vectors = model.encode(given, prompt_name=prompt, batch_size=32, convert_to_tensor=True).float().cpu()
            known.update(zip(new, vectors.numpy()))
        return np.stack([known[key] for key in keys])

    found = {}
    for name, task in asked().items():
        kinds = name.split(",")[0].split(" → ")
        scores = encode(task.queries, kinds[0]) @ encode(task.candidates, kinds[1]).T
        found[name] = positions(scores, task.right)
        print(f"{name}: MRR {mrr({name: found[name]})[name]}, chance {chance(task):.1f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id")
    options = parser.parse_args()
    found = ranks(BTokSentenceTransformer(options.model, device="cpu"))
    command = "python -m benchmarks.pretrained.pictures " + " ".join(sys.argv[1:])
    target = PRETRAINED / f"pictures-{Path(options.model).name}.json"
    target.write_text(json.dumps({"command": command, "ranks": found}))


if __name__ == "__main__":
    main()
