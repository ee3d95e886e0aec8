"""Decode text greedily from the Bottleneck Tokens' keys and values, and show it beside the input.

    python -m benchmarks.unified.decode --size small --seed 0      # writes docs/results/small-decoded.png

The decoder does not see the input (`BTokSentenceTransformer.reconstruct`). The inputs are held out. The arms are those
that condensed in all steps. The printed table says how often the text begins with the right name, what share of its
words is in the input's name and keywords, what share is in another input's, and how many texts differ.
"""

import argparse
import re
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks import ROOT
from benchmarks.unified.inputs import DRAWING, books, clip, describe, emoji, page, pages, square, strip
from benchmarks.unified.report import LABELS
from benchmarks.unified.run import model_folder
from btok_hf import BTokSentenceTransformer
from examples.prepare_emoji import draw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ARMS = ("btok-throughout-unmasked", "btok-throughout")
SHOWN = {"drawing": 4, "clip": 3, "figure": 2, "page": 2}


def examples():
    """All held-out examples by kind: (input, picture of it, description)."""
    drawings = [
        (draw(row["image"], size=DRAWING), describe(row["names"]["en"], row["keywords"]["en"]))
        for row in emoji()["unseen_drawings"]
    ]
    figures = [(square(row["image"]), row["caption"]) for row in books("figures", "test")]
    sheets = [(page(row["title"], row["text"]), row["title"]) for row in pages("test")]
    clips = [
        (
            clip(row["frames"]),
            strip([frame.resize((DRAWING,) * 2) for frame in row["frames"]]),
            describe(row["name"], row["keywords"]),
        )
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


def name(text):
    return text.partition(":")[0]


def words(text):
    return set(re.findall(r"\w+", text.casefold()))


def shared(text, right):
    """The share of a text's words that are in the right one."""
    return len(words(text) & words(right)) / max(1, len(words(text)))


def measures(texts, right):
    """The numbers of the printed table for the texts of one model."""
    others = [shared(text, other) for i, text in enumerate(texts) for j, other in enumerate(right) if i != j]
    return {
        "the right name": f"{100 * np.mean([name(text) == name(answer) for text, answer in zip(texts, right)]):.1f} %",
        "words that are right": f"{100 * np.mean(list(map(shared, texts, right))):.1f} %",
        "words that are another input's": f"{100 * np.mean(others):.1f} %",
        "different texts": str(len(set(texts))),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "unified", help="output folder of benchmarks.unified.run"
    )
    options = parser.parse_args()
    models = {arm: model_folder(arm, options.seed, options.size, options.runs) for arm in ARMS}
    missing = [str(path) for path in models.values() if not (path / "golden.json").exists()]
    if missing:
        raise SystemExit(
            f"No models in {', '.join(missing)}: run `python -m benchmarks.unified.run --table throughout` first."
        )
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
    figure.savefig(ROOT / "docs" / "results" / f"{options.size}-decoded.png", dpi=90)

    lines = [f"| decoded text | {' | '.join(LABELS[arm] for arm in ARMS)} |", "|---|---|---|"]
    for kind, title in (("drawing", "unseen drawings"), ("clip", "unseen clips")):
        inputs, _, right = zip(*found[kind])
        columns = [measures(decode(model, list(inputs)), right) for model in models.values()]
        lines += [
            f"| {title} ({len(inputs)}): {row} | {' | '.join(column[row] for column in columns)} |"
            for row in columns[0]
        ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
