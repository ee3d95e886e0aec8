"""All steps on real data: base model → Bottleneck Tokens → training → repository → stock loaders → search in a page.

    make demo        (or: python examples/demo.py)

1. `prepare_emoji.py` prepares the emoji data and a small random Qwen2-VL.
2. `training/train.py` trains it with condensation and exports it.
3. A fresh process loads the export with stock transformers and stock Sentence-Transformers and checks that they agree.
   It prints retrieval metrics on drawings that training never saw.
4. `btok embed` and `btok index` write a database of the drawings. `btok app` shows a page that searches it.

Everything is written under runs/emoji.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs/emoji")
SHOWN = 8  # queries on the contact sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=["all", "check"], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--max_steps", type=int, default=None, help="training steps, instead of the recipe's")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.step == "check":
        return check()
    started = time.time()
    # Nothing needs the Hub. Without a network, asking it would only cost time.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    steps = [] if arguments.max_steps is None else ["--max_steps", str(arguments.max_steps)]
    embedded, database = RUN / "embedded", RUN / "db"
    for folder in (embedded, database):  # of an earlier run's model
        shutil.rmtree(folder, ignore_errors=True)
    embed = ["-m", "btok_hf", "embed", str(RUN / "drawings"), str(embedded), "--model", str(RUN / "model")]
    for title, command in (
        ("1/5 Prepare the data and a base model", ["examples/prepare_emoji.py", "--output_dir", str(RUN)]),
        ("2/5 Train and export", ["training/train.py", "--config", "training/recipes/emoji.yaml", *steps]),
        ("3/5 Load the export in a fresh process and search", ["examples/demo.py", "--step", "check"]),
        ("4/5 Embed the drawings", embed),
        ("5/5 Write a database", ["-m", "btok_hf", "index", str(embedded), "--db", str(database)]),
    ):
        print(f"\n=== {title} ({(time.time() - started) / 60:.1f} min so far)", flush=True)
        subprocess.run([sys.executable, *command], check=True, env=environment)
    print(f"\nDone in {(time.time() - started) / 60:.1f} minutes. Search the drawings in a browser with:")
    print(f"  .venv/bin/btok app --db {database}")


def check():
    """Step 3, in a fresh process: check that the loaders agree, and measure how well unseen drawings are found."""
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    from btok_hf.training.evaluator import retrieval_evaluator

    repo = str(RUN / "model")
    stock = SentenceTransformer(repo, device="cpu")  # without trust_remote_code
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo)
    evaluator = retrieval_evaluator(str(RUN / "pairs" / "eval_unseen_drawings.parquet"))

    contents = [{"type": "text", "text": evaluator.queries[0]}, {"type": "image", "image": evaluator.corpus[0]}]
    with torch.no_grad():
        auto = [
            model(
                **processor.apply_chat_template(
                    [{"role": "user", "content": [content]}], tokenize=True, return_dict=True, return_tensors="pt"
                )
            ).pooler_output[0]
            for content in contents
        ]
    difference = np.abs(torch.stack(auto).numpy() - stock.encode([evaluator.queries[0], evaluator.corpus[0]])).max()
    print(f"AutoModel (trust_remote_code) and SentenceTransformer (stock modules) differ by {difference:.1e}")
    if difference > 1e-6:
        raise SystemExit("The loaders disagree.")

    untrained = SentenceTransformer(str(RUN / "untrained"), device="cpu")
    results = [measure(candidate, evaluator) for candidate in (untrained, stock)]
    size = len(evaluator.corpus)
    chance = {"R@1": 1 / size, "R@10": 10 / size, "MRR": sum(1 / rank for rank in range(1, size + 1)) / size}
    held_out = len({document for documents in evaluator.relevant_docs.values() for document in documents})
    print(
        f"\ntext → image: {len(evaluator.queries)} names in three languages; {size} candidates, of which {held_out} "
        "answer a query (drawings never seen in training) and the rest are training drawings of other concepts"
    )
    print(f"{'':18}{'R@1':>7}{'R@10':>7}{'MRR':>7}")
    for title, row in (("chance", chance), ("before training", results[0]), ("after training", results[1])):
        print(f"{title:18}" + "".join(f"{100 * row[key]:7.1f}" for key in ("R@1", "R@10", "MRR")))
    (RUN / "demo.json").write_text(
        json.dumps({"candidates": size, "chance": chance, "before": results[0], "after": results[1]}, indent=2) + "\n"
    )
    contact_sheet(stock, evaluator, RUN / "demo.png")
    print(f"\nQueries and their top hits: {RUN / 'demo.png'}")


def measure(model, evaluator):
    """R@1, R@10 (a right drawing among the first) and MRR over all candidates."""
    scores = evaluator(model)
    return {
        "R@1": scores[f"{evaluator.name}_cosine_accuracy@1"],
        "R@10": scores[f"{evaluator.name}_cosine_accuracy@10"],
        "MRR": scores[f"{evaluator.name}_cosine_mrr@{len(evaluator.corpus)}"],
    }


def contact_sheet(model, evaluator, path, top=8):
    """A picture with one query per line and its top hits, with a frame around the right ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sentence_transformers import util

    chosen = [round(index * (len(evaluator.queries) - 1) / (SHOWN - 1)) for index in range(SHOWN)]
    hits = util.semantic_search(
        model.encode_query([evaluator.queries[index] for index in chosen]),
        model.encode_document(evaluator.corpus, batch_size=256),
        top_k=top,
    )
    figure, axes = plt.subplots(SHOWN, top + 1, figsize=(top + 4, SHOWN), width_ratios=[3] + [1] * top)
    for line, index, found in zip(axes, chosen, hits):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].text(1, 0.5, evaluator.queries[index], ha="right", va="center", wrap=True)
        right = evaluator.relevant_docs[evaluator.queries_ids[index]]
        for axis, hit in zip(line[1:], found):
            axis.imshow(evaluator.corpus[hit["corpus_id"]])
            if evaluator.corpus_ids[hit["corpus_id"]] in right:
                axis.spines[:].set(visible=True, color="green", linewidth=3)
    figure.suptitle("Queries and their nearest drawings (green frame: the right one, never seen in training)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
