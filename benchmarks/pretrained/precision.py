"""What 16 bits are worth on this CPU: speed, vectors and ranks of a model in bf16 against fp32.

    make model
    python -m benchmarks.pretrained.precision runs/btok-135m    # ten minutes of one core

It writes benchmarks/results/pretrained/precision.json.
"""

import argparse
import json
from functools import partial

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.bench import compare, machine, matrix_rate, show, summary
from benchmarks.pretrained.tasks import encoder, ranks, tasks
from btok_hf import BTokSentenceTransformer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASK = "term → definition"
COUNTS = {"term": 256, "definition": 128, "text": 16}  # half a minute each in fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each precision")
    options = parser.parse_args()
    models = {
        name: BTokSentenceTransformer(options.model, device="cpu", model_kwargs={"dtype": dtype})
        for name, dtype in PRECISIONS.items()
    }
    asked = tasks()
    inputs = {
        "term": asked[TASK].queries,
        "definition": asked[TASK].candidates,
        "text": asked["title → text"].candidates,
    }
    rows = []
    for kind, count in COUNTS.items():
        texts = inputs[kind][:count]
        calls = {name: partial(encoder(model), texts, kind) for name, model in models.items()}
        found = summary(compare(calls, options.rounds), "fp32")
        exact, rounded = (call() for call in calls.values())
        rows.append(
            show(
                {
                    "inputs": f"{count} of {kind}",
                    "tokens": sum(len(ids) for ids in models["fp32"].tokenizer(texts)["input_ids"]),
                    **{f"{name}_s": found[name]["median_s"] for name in models},
                    "speed_ratio": found["bf16"]["speed_ratio"],
                    "quartiles": found["bf16"]["ratio_quartiles"],
                    "least_cosine": round(float((exact * rounded).sum(1).min()), 4),
                }
            )
        )
    scores = {
        name: float(np.mean(100 / np.array(ranks(encoder(model), {TASK: asked[TASK]})[TASK])))
        for name, model in models.items()
    }
    show({"task": TASK, **{name: round(score, 2) for name, score in scores.items()}})
    result = {
        "machine": machine(),
        "matrix_gflop_per_s": {name: round(matrix_rate(dtype)) for name, dtype in PRECISIONS.items()},
        "versions": {"torch": torch.__version__},
        "speed": rows,
        "mrr": {TASK: scores},
    }
    (RESULTS / "pretrained" / "precision.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
