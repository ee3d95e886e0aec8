"""The effect of masking false negatives on a label dataset: emoji drawings and the names of their categories.

A batch of 128 holds each of the few categories many times. Without the mask many of a query's "negatives" are its
right answer. The same small model is trained from scratch with and without the mask, and classifies held-out drawings.

    python -m benchmarks.false_negatives        # minutes on 2 CPU cores
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset

from benchmarks import ROOT
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.evaluator import retrieval_evaluator
from examples.prepare_emoji import build_base, draw


def pairs(rows, seed=None, copies=1):
    """Drawing and category name; augmented with a seed."""
    rng = random.Random(seed) if seed is not None else None
    return [
        {"query": draw(row["image"], rng), "positive": row["category"].replace("_", " ")}
        for _ in range(copies)
        for row in rows
    ]


def run(start, train, eval_file, masked, seed, steps, folder):
    """Accuracy on the unseen drawings."""
    args = CondensationConfig(
        output_dir=str(folder),
        mask_false_negatives=masked,
        condense="positive",
        condensation_weight=0.5,
        temperature=0.05,
        per_device_train_batch_size=128,
        mini_batch_size=128,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=seed,
    )
    model = BTokSentenceTransformer(start, device="cpu")
    CondensationTrainer(model=model, args=args, train_dataset=train).train()
    evaluator = retrieval_evaluator(eval_file)
    return evaluator(model)[f"{evaluator.name}_cosine_accuracy@1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    emoji = load_dataset(str(ROOT / "data" / "emoji")).filter(lambda name: name is not None, input_columns="category")
    categories = sorted({row["category"] for row in emoji["train"].remove_columns("image")})
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train = Dataset.from_list(pairs(emoji["train"], seed=0, copies=6))
        Dataset.from_list(pairs(emoji["unseen_drawings"])).to_parquet(folder / "labels.parquet")
        build_base(folder / "base", [name.replace("_", " ") for name in categories] * 50, seed=0)
        start = add_bottleneck_tokens(folder / "base", folder / "start", noise_std=0.5)
        accuracy = {
            masked: [
                run(start, train, folder / "labels.parquet", masked, seed, arguments.steps, folder / "run")
                for seed in range(arguments.seeds)
            ]
            for masked in (True, False)
        }
    labels = list(emoji["unseen_drawings"]["category"])
    majority = max(map(labels.count, categories)) / len(labels)
    print(f"{len(categories)} categories, {len(labels)} unseen drawings, {arguments.steps} steps")
    print(f"always the largest category: {majority:.3f}")
    for masked, values in accuracy.items():
        print(f"{'with' if masked else 'without'} the mask: {json.dumps([round(value, 3) for value in values])}")


if __name__ == "__main__":
    main()
