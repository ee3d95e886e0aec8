"""What the Bottleneck Tokens keep: text decoded greedily from their keys and values alone, beside the input.

    python benchmarks/unified/decode.py --size small --seed 0      # writes runs/unified/small-decoded.png

The decoder does not see the input (`BTokSentenceTransformer.reconstruct`). Shown are inputs that no arm was trained
on, for the arms whose training condensed; the printed table counts how often the text begins with the right name.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import LABELS
from run import model_folder
from tasks import DRAWING, ROOT, books, clip, draw, emoji, page, pages, square, strip

from btok_hf import BTokSentenceTransformer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ARMS = ("btok-throughout-unmasked", "btok-throughout")
SHOWN = {"drawing": 4, "clip": 3, "figure": 2, "page": 2}


def examples():
    """By kind: (input, picture of it, what it is) of everything held out."""
    drawings = [(draw(row["image"], size=DRAWING), row["names"]["en"]) for row in emoji()["unseen_drawings"]]
    figures = [(square(row["image"]), row["caption"]) for row in books("figures", "test")]
    sheets = [(page(row["title"], row["text"]), row["title"]) for row in pages("test")]
    clips = [
        (clip(row["frames"]), strip([frame.resize((DRAWING,) * 2) for frame in row["frames"]]), row["name"])
        for row in books("clips", "test")
    ]
    found = {"drawing": drawings, "figure": figures, "page": sheets}
    return {"clip": clips, **{kind: [(image, image, text) for image, text in rows] for kind, rows in found.items()}}


def decode(model, inputs, batch_size=64):
    return [
        text
        for start in range(0, len(inputs), batch_size)
        for text in model.reconstruct(inputs[start : start + batch_size], max_new_tokens=16)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "unified", help="folder that run.py wrote to")
    options = parser.parse_args()
    models = {arm: model_folder(arm, options.seed, options.size, options.runs) for arm in ARMS}
    missing = [str(path) for path in models.values() if not (path / "golden.json").exists()]
    if missing:
        raise SystemExit(f"No models in {', '.join(missing)}: run run.py --table arms first.")
    models = {arm: BTokSentenceTransformer(str(path)) for arm, path in models.items()}

    found = examples()
    chosen = [
        (kind, *found[kind][i])
        for kind, n in SHOWN.items()
        for i in np.linspace(3, len(found[kind]) - 3, n, dtype=int)
    ]
    texts = {arm: decode(model, [item for _, item, _, _ in chosen]) for arm, model in models.items()}
    figure, axes = plt.subplots(
        len(chosen), 2, figsize=(12, 0.9 * len(chosen)), width_ratios=[1, 4], layout="constrained"
    )
    for row, ((kind, _, image, text), (left, right)) in enumerate(zip(chosen, axes)):
        left.imshow(image)
        lines = [f"{kind}: {text[:90]}", *(f"    {LABELS[arm]}: {texts[arm][row][:110]}" for arm in ARMS)]
        # Captions may hold dollar signs, which matplotlib would read as mathematics.
        right.text(0, 0.5, "\n".join(lines).replace("$", r"\$"), va="center", fontsize=9)
        left.axis("off"), right.axis("off")
    figure.savefig(options.runs / f"{options.size}-decoded.png", dpi=110)

    lines = [
        f"| decoded text begins with the right name | {' | '.join(LABELS[arm] for arm in ARMS)} |",
        "|---|---|---|",
    ]
    for kind, title in (("drawing", "unseen drawings"), ("clip", "clips of unseen emoji")):
        inputs, _, names = zip(*found[kind])
        cells = []
        for model in models.values():
            right = [
                text.startswith(f"{name}:") or text == name for text, name in zip(decode(model, list(inputs)), names)
            ]
            cells.append(f"{100 * np.mean(right):.1f} %")
        lines.append(f"| {title} ({len(names)}) | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
