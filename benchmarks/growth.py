"""How cost grows: encoding against length, batch and K; search against the size of the corpus.

    python -m benchmarks.growth    # 9 minutes on one CPU core

It writes benchmarks/results/growth.json and docs/results/growth.png.

Memory is the peak above what was held before. Each setting runs in a fresh process. Search is exact, over random unit
vectors, with `sentence_transformers.util.semantic_search` and with faiss (`pip install faiss-cpu`).
"""

import json
import subprocess
import sys
import time

import matplotlib
import numpy as np
import torch
from sentence_transformers.util import semantic_search

from benchmarks import ROOT
from benchmarks.bench import DEVICE, arguments, exact_texts, names, peak_of, record, repository, result_file, show
from btok_hf import BTokSentenceTransformer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTHS = (16, 64, 256, 1024, 4096)
BATCHES = (1, 4, 16, 64, 256)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
CORPORA = (10**3, 10**4, 10**5, 10**6)
DIMENSIONS, QUERIES = 512, 32


def encode(size, length, rows, num_tokens):
    """Median seconds and peak GB of one forward over `rows` texts of `length` tokens (0: names of emoji)."""
    model = BTokSentenceTransformer(repository(size, num_tokens))
    items = exact_texts(model.tokenizer, length, rows) if length else names()[:rows]

    @torch.inference_mode()
    def call(batch=items):
        model(model.preprocess(batch))

    model.eval()
    # A small first call does the set-up. A call of the full size would already allocate the memory to be measured.
    call(names()[:1])
    memory, seconds = peak_of(call), []
    while len(seconds) < 3 or (sum(seconds) < 3 and len(seconds) < 15):
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": float(f"{np.median(seconds):.4g}"), "peak_gb": round(memory, 3)}


def search(size, library):
    """Median seconds of finding 10 of `size` vectors for each of the queries, and the GB of its index."""
    generator = torch.Generator().manual_seed(0)
    corpus = torch.nn.functional.normalize(torch.randn(size, DIMENSIONS, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(QUERIES, DIMENSIONS, generator=generator), dim=1)
    if library == "faiss":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(DIMENSIONS)
        index.add(corpus.numpy())
        found, call = [], lambda: index.search(queries.numpy(), 10)
    else:
        found, call = [], lambda: semantic_search(queries, corpus, top_k=10)
    for _ in range(4):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return {"seconds": float(f"{np.median(found[1:]):.4g}"), "peak_gb": round(corpus.nbytes / 1e9, 3)}


def alone(kind, threads, *values):
    """Measure in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.growth",
        "--one",
        json.dumps([kind, *values]),
        "--threads",
        str(threads),
    ]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def picture(rows, path):
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained", sharex="col")
    titles = {"length": "tokens of a text", "batch": "texts in a forward", "tokens": "K", "corpus": "vectors"}
    for column, (table, title) in enumerate(titles.items()):
        for label in dict.fromkeys(row["what"] for row in rows if row["table"] == table):
            part = [row for row in rows if row["table"] == table and row["what"] == label]
            for line, (key, unit) in enumerate((("seconds", "seconds"), ("peak_gb", "GB"))):
                axis = axes[line, column]
                axis.plot([row["x"] for row in part], [row[key] for row in part], "o-", label=label)
                axis.set(xscale="log", xlabel=title if line else None, ylabel=unit)
                if table != "tokens":
                    axis.set_yscale("log")
                axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    options = arguments(__doc__, one={"type": json.loads, "help": "(internal) measure one setting"})
    if options.one:
        kind, *values = options.one
        print(json.dumps(encode(*values) if kind == "encode" else search(*values)))
        return
    rows = []

    def add(table, what, x, kind, *values):
        rows.append(show({"table": table, "what": what, "x": x, **alone(kind, options.threads, *values)}))

    for length in LENGTHS:
        add("length", "one text, K = 4", length, "encode", options.size, length, 1, 4)
    for count in BATCHES:
        add("batch", "names of emoji, K = 4", count, "encode", options.size, 0, count, 4)
    for num_tokens in TOKENS:
        for length, count in ((16, 64), (256, 4)):
            what = f"{count} texts of {length} tokens"
            add("tokens", what, num_tokens, "encode", options.size, length, count, num_tokens)
    for library in ("semantic_search", "faiss"):
        for count in CORPORA:
            add("corpus", library, count, "search", count, library)
    record("growth", rows, size=options.size, dimensions=DIMENSIONS, queries=QUERIES)
    picture(rows, ROOT / "docs" / "results" / result_file("growth").with_suffix(".png").name)


if __name__ == "__main__":
    main()
