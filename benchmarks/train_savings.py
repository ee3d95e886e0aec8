"""What training saves by not computing things twice. Times are compared, and loss and gradients must be equal.

    python -m benchmarks.train_savings    # 3 minutes on one CPU core with --rounds 5

It writes benchmarks/results/train_savings.json.

- one pass: a batch that fits one mini-batch, against GradCache's two passes in two mini-batches.
- copies: 32 queries with 4 labels, against encoding every label.
- frozen vision: GradCache over figures with the vision tower frozen and its outputs kept, against running it again.
"""

from unittest.mock import patch

import torch

from benchmarks.bench import DEVICE, arguments, compare, images, names, record, repository, show, summary, texts
from btok_hf import BTokSentenceTransformer
from btok_hf.training import CondensationConfig, CondensationLoss
from btok_hf.training.condensation_collator import CondensationCollator


def step(model, rows, mini_batch, deduplicate=True):
    """A callable that takes a training step over rows of query and positive and returns loss and gradients."""
    args = CondensationConfig(output_dir="unused", report_to="none", condense="positive", use_cpu=DEVICE == "cpu")
    collate = CondensationCollator(
        preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args, deduplicate=deduplicate
    )
    batch = collate([dict(zip(("query", "positive"), row)) for row in rows])
    features = [
        {
            key[len(side) :]: x.to(DEVICE) if torch.is_tensor(x) else x
            for key, x in batch.items()
            if key.startswith(side)
        }
        for side in ("query_", "positive_")
    ]
    loss = CondensationLoss(model, temperature=0.05, mini_batch_size=mini_batch)

    def call():
        value = loss([dict(feature) for feature in features])
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return loss.infonce, loss.condensation, gradients

    return call


def contenders(size):
    """By saving: (with it, without it)."""
    model = BTokSentenceTransformer(repository(size, 4)).train()
    short = list(zip(names()[:64:2], names()[1:64:2]))
    yield "one pass", step(model, short, 32), step(model, short, 16)
    labels = texts()[1][:4]
    labelled = [(text, labels[i % 4]) for i, text in enumerate(names()[:32])]
    yield "copies", step(model, labelled, 8), step(model, labelled, 8, deduplicate=False)
    model[0].model.visual.requires_grad_(False)
    pictures = [({"image": picture}, f"figure {i}") for i, picture in enumerate(images()[1][:16])]
    kept = step(model, pictures, 4)

    def again():
        with patch.object(CondensationLoss, "_vision_is_frozen", lambda self: False):
            return kept()

    yield "frozen vision", kept, again


def main():
    options = arguments(__doc__)
    rows = []
    for name, with_it, without in contenders(options.size):
        (*losses, ours), (*others, theirs) = with_it(), without()
        scale = max(gradient.abs().max() for gradient in theirs.values())
        error = max(((ours[key] - theirs[key]).abs().max() / scale).item() for key in theirs)
        error = max(error, *((a - b).abs().item() for a, b in zip(losses, others)))
        if not error <= (1e-4 if DEVICE == "cpu" else 0.1):
            raise SystemExit(f"{name}: losses or gradients differ by {error:.1e}.")
        found = summary(compare({"without": without, "with": with_it}, options.rounds), "without")
        rows.append(
            show(
                {
                    "saving": name,
                    "with_s": found["with"]["median_s"],
                    "without_s": found["without"]["median_s"],
                    "speed_ratio": found["with"]["speed_ratio"],
                    "quartiles": found["with"]["ratio_quartiles"],
                    "differ_by": float(f"{error:.1e}"),
                }
            )
        )
    record("train_savings", rows, size=options.size)


if __name__ == "__main__":
    main()
