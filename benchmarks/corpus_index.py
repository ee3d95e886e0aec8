"""How an index of a corpus grows: time, size, memory, latency and recall from 10⁴ to 10⁶ vectors.

    python -m benchmarks.corpus_index                                     # 20 minutes on one CPU core, 3 GB of disk
    python -m benchmarks.corpus_index --dimensions 1536 --sizes 10000 100000   # like the vectors of a 2B model

It writes benchmarks/results/corpus_index.json (with 1536 dimensions corpus_index_1536.json) and draws
docs/results/corpus_index.png.

Databases are built by `Index.build`, other indexes by `btok_hf.corpus.vector_libraries`, from the same units. Queries
run one at a time, with the text of every hit. Recall@10 is the share of the ten nearest rows (exact search, float32)
that are found, over 200 queries that are not in the corpus. Every step runs in a fresh process, whose peak memory
includes Python and its libraries, and is stopped after `LIMIT` seconds.

The vectors. `btok-small` embeds the names, keywords, drawings, figures, definitions and modules of this repository:
some 20,000 vectors. More are made between them: a random vector, moved a random part of the way to one of its ten
nearest neighbours, with a little noise. So neighbourhoods stay as they are for the model; vectors that are random in
all directions have no neighbours. For more dimensions than 128, the vectors pass through a fixed random layer with
tanh: time, memory and size are then right, and recall is only an indication.
"""

import argparse
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

from benchmarks import RESULTS, ROOT

FOLDER = ROOT / "runs" / "corpus_index"
MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
SIZES = (10_000, 100_000, 1_000_000)
QUERIES, NEIGHBOURS, NOISE = 200, 10, 0.02
UNIT_ROWS, LIMIT = 20_000, 280
SETUPS = (  # library, precision, share of the dimensions
    ("lancedb", "float32", 1),
    ("lancedb", "float16", 1),
    ("lancedb", "binary", 1),
    ("lancedb", "float32", 2),
    ("lancedb", "float32", 4),
    ("faiss", "float32", 1),
    ("faiss", "int8", 1),
    ("faiss", "binary", 1),
    ("usearch", "float32", 1),
    ("usearch", "int8", 1),
    ("usearch", "binary", 1),
)


def normalised(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float32")


# ---------------------------------------------------------------- vectors and units


def embed():
    """Vectors of the repository's data, and their ten nearest neighbours."""
    from benchmarks.bench import corpus, names
    from benchmarks.unified.inputs import books, emoji
    from btok_hf import BTokSentenceTransformer
    from examples.prepare_emoji import draw

    texts = [*dict.fromkeys([*names(), *corpus(), *(row["definition"] for row in books("glossary", "train"))])]
    pictures = [draw(row["image"], size=56) for split in emoji().values() for row in split]
    pictures += [row["image"] for row in books("figures", "train")]
    model = BTokSentenceTransformer(MODEL, device="cpu")
    items = [{"text": text[:300]} for text in texts] + pictures
    vectors = normalised(model.encode(items, batch_size=64, show_progress_bar=False))
    near = [
        np.argpartition(-(part @ vectors.T), NEIGHBOURS + 1)[:, : NEIGHBOURS + 1]
        for part in np.array_split(vectors, 40)
    ]
    np.savez(FOLDER / "base.npz", vectors=vectors, near=np.concatenate(near))
    return {"vectors": len(vectors)}


def made(count, dimensions, seed):
    """`count` vectors between those of the repository's data."""
    base, generator = np.load(FOLDER / "base.npz"), np.random.default_rng(seed)
    vectors, near = base["vectors"], base["near"]
    first = generator.integers(0, len(vectors), count)
    second = near[first, generator.integers(0, near.shape[1], count)]
    part = generator.random((count, 1), np.float32)
    found = vectors[first] + part * (vectors[second] - vectors[first])
    found += NOISE * generator.standard_normal(found.shape, np.float32)
    if dimensions != found.shape[1]:
        layer = np.random.default_rng(0).standard_normal((found.shape[1], dimensions)).astype("float32")
        found = np.tanh(2 * normalised(found) @ layer)
    return normalised(found)


def write_units(size, dimensions):
    """Units of `size` rows, queries, and their ten nearest rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from btok_hf.corpus.units import Corpus, unit_schema

    folder = FOLDER / f"{size}-{dimensions}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # A configuration that allows cut vectors, to see what they cost where nothing was trained for them.
    trained = [dimensions // 2, dimensions // 4]
    config = json.loads((MODEL / "config.json").read_text()) | {"matryoshka_dimensions": trained}
    (folder / "config.json").write_text(json.dumps(config))
    corpus, schema, names = Corpus(str(folder / "out")), unit_schema(dimensions), []
    corpus.claim({"format": 1, "model": str(folder), "revision": None, "prompt": None, "dimensions": dimensions})
    queries = made(QUERIES, dimensions, seed=1)
    best, ids = np.empty((QUERIES, 0), "float32"), np.empty((QUERIES, 0), int)
    for start in range(0, size, UNIT_ROWS):
        count = min(UNIT_ROWS, size - start)
        vectors, rows = made(count, dimensions, seed=start + 2), np.arange(start, start + count)
        columns = {name: pa.nulls(count, schema.field(name).type) for name in schema.names}
        columns |= {"id": pa.array([str(row) for row in rows]), "kind": pa.array(["text"] * count)}
        columns["text"] = pa.array([f"row {row} of {size}" for row in rows])
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimensions)
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), buffer)
        names.append(f"{start:09d}")
        corpus.write(names[-1], buffer.getvalue(), {})
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        numbers = np.concatenate([ids, np.broadcast_to(rows, (QUERIES, count))], axis=1)
        order = np.argsort(-scores, axis=1)[:, :10]
        best, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
    corpus.set_plan(names)
    np.savez(folder / "queries.npz", queries=queries, nearest=ids)
    return {"units_mb": megabytes(folder / "out")}


def megabytes(path):
    files = [path, *path.parent.glob(f"{path.name}.ids*")] if path.is_file() else path.rglob("*")
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)


# ---------------------------------------------------------------- what is measured


def target(size, dimensions, library, precision, share):
    return FOLDER / f"{size}-{dimensions}" / f"{library}-{precision}-{share}"


def build(size, dimensions, library, precision, share):
    """Seconds to build, size on the disk, and peak memory."""
    from btok_hf.corpus import vector_libraries
    from btok_hf.corpus.index import Index

    out, path = str(FOLDER / f"{size}-{dimensions}" / "out"), target(size, dimensions, library, precision, share)
    kept, start = None if share == 1 else dimensions // share, time.perf_counter()
    if library == "lancedb":
        shutil.rmtree(path, ignore_errors=True)
        Index.build(out, path, precision=precision, dimensions=kept)
    elif library == "faiss":
        vector_libraries.write_faiss(out, path, precision, kept)
    else:
        vector_libraries.write_usearch(out, path, precision, kept)
    return {"build_s": round(time.perf_counter() - start, 1), "disk_mb": megabytes(path), "build_peak_mb": peak_mb()}


def update(size, dimensions, library, precision, share):
    """Seconds of a second run, in which nothing changed."""
    from btok_hf.corpus.index import Index

    start = time.perf_counter()
    Index.build(str(FOLDER / f"{size}-{dimensions}" / "out"), target(size, dimensions, library, precision, share))
    return {"again_s": round(time.perf_counter() - start, 1), "again_peak_mb": peak_mb()}


def search(size, dimensions, library, precision, share, exact):
    """Median and 99th percentile of a search, recall@10, and peak memory."""
    path, data = target(size, dimensions, library, precision, share), FOLDER / f"{size}-{dimensions}"
    data = np.load(data / "queries.npz")
    find = finder(path, library, precision, exact)
    find(data["queries"][0])  # opens files
    seconds, right = [], []
    for query, nearest in zip(data["queries"], data["nearest"].tolist()):
        start = time.perf_counter()
        found = find(query)
        seconds.append(time.perf_counter() - start)
        right.append(len({int(key) for key in found} & set(nearest)) / 10)
    return {
        "median_ms": round(1000 * float(np.median(seconds)), 2),
        "p99_ms": round(1000 * float(np.percentile(seconds, 99)), 2),
        "recall": round(float(np.mean(right)), 3),
        "search_peak_mb": peak_mb(),
    }


def finder(path, library, precision, exact):
    """A function from a query to the ids of ten hits."""
    from btok_hf.corpus.vector_libraries import IDS
    from btok_hf.corpus.vectors import bits

    if library == "lancedb":
        from btok_hf.corpus.index import Index

        index = Index.open(path)
        return lambda query: [hit.id for hit in index.search(query, exact=exact)]
    import pyarrow.parquet as pq

    ids = pq.read_table(f"{path}{IDS}").column("id").to_numpy(zero_copy_only=False)
    asked = bits if precision == "binary" else np.asarray
    if library == "faiss":
        import faiss

        faiss.omp_set_num_threads(1)
        index = (faiss.read_index_binary if precision == "binary" else faiss.read_index)(str(path))
        return lambda query: ids[index.search(asked(query)[None], 10)[1][0]]
    from usearch.index import Index as Graph

    graph = Graph.restore(str(path), view=True)
    return lambda query: ids[graph.search(asked(query), 10).keys]


def peak_mb():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# ---------------------------------------------------------------- all of it


def alone(name, *values):
    """A step in a fresh process: its result, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.corpus_index", "--one", json.dumps([name, *values])]
    try:
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"stopped": f"{name}: more than {LIMIT} s"}
    return json.loads(run.stdout.splitlines()[-1])


def measure(size, dimensions):
    rows = []
    print(size, alone("write_units", size, dimensions), flush=True)
    for setup in SETUPS:
        row = dict(zip(("library", "precision"), setup)) | {"dimensions": dimensions // setup[2], "vectors": size}
        row |= alone("build", size, dimensions, *setup)
        if "stopped" not in row:
            row |= alone("search", size, dimensions, *setup, False)
            if setup == SETUPS[0]:
                exact = alone("search", size, dimensions, *setup, True)
                row |= {f"exact_{name}": exact[name] for name in ("median_ms", "p99_ms") if name in exact}
                row |= alone("update", size, dimensions, *setup)
        print(json.dumps(row), flush=True)
        rows.append(row)
    shutil.rmtree(FOLDER / f"{size}-{dimensions}")
    return rows


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    keys = {"build_s": "seconds to build", "disk_mb": "MB on disk", "median_ms": "ms a query (median)"}
    full = max(row["dimensions"] for row in rows)
    styles = {"lancedb": "o-", "faiss": "s--", "usearch": "^:"}
    colours = {"float32": "C0", "float16": "C4", "int8": "C1", "binary": "C2"}
    for axis, (key, title) in zip(axes, (keys | {"recall": "recall@10"}).items()):
        for library, precision in dict.fromkeys((row["library"], row["precision"]) for row in rows):
            of = [row for row in rows if (row["library"], row["precision"]) == (library, precision)]
            of = [row for row in of if row["dimensions"] == full and key in row]
            points = [row["vectors"] for row in of], [row[key] for row in of]
            axis.plot(*points, styles[library], color=colours[precision], label=f"{library} {precision}")
        axis.set(xscale="log", yscale="linear" if key == "recall" else "log", xlabel="vectors", title=title)
        axis.grid(alpha=0.3)
    axes[3].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of vectors")
    parser.add_argument("--dimensions", type=int, default=128, help="dimensions of a vector")
    parser.add_argument("--one", type=json.loads, help="(internal) run one step and print its result")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.one:
        name, *values = options.one
        steps = {step.__name__: step for step in (embed, write_units, build, update, search)}
        print(json.dumps(steps[name](*values)))
        return
    if not (FOLDER / "base.npz").exists():
        print(alone("embed"), flush=True)
    rows = [row for size in options.sizes for row in measure(size, options.dimensions)]
    from importlib.metadata import version

    name = "corpus_index" if options.dimensions == 128 else f"corpus_index_{options.dimensions}"
    report = {
        "command": " ".join(["python -m benchmarks.corpus_index", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"one of {os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {library: version(library) for library in ("lancedb", "faiss-cpu", "usearch", "numpy")},
        "rows": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if options.dimensions == 128:
        picture(rows, ROOT / "docs" / "results" / "corpus_index.png")


if __name__ == "__main__":
    main()
