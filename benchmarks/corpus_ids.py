"""What an index of ids is worth in LanceDB, for the statements by which `btok index` and `btok app` look rows up.

    python -m benchmarks.corpus_ids --rows 2000000    # a minute of one CPU core, 150 MB of disk

It writes benchmarks/results/corpus_ids.json.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree

from benchmarks import RESULTS
from benchmarks.bench import machine, show

CHUNK, IDS, LOOK_UPS = 10_000, 1000, 20  # rows to replace at once, ids of a statement that deletes, calls of `get`


def look_up(table, ids):
    """The median of some rows by their ids, as `Index.get` asks for them."""
    seconds = []
    for key in ids[:: len(ids) // LOOK_UPS]:
        start = time.perf_counter()
        found = table.search().where(f"id = '{key}'").limit(1).to_arrow()
        seconds.append(time.perf_counter() - start)
        assert len(found) == 1
    return float(np.median(seconds))


def replace(table, ids):
    rows = pa.table({"id": ids[:CHUNK], "text": ["another text"] * CHUNK})
    table.merge_insert("id").when_matched_update_all().execute(rows)


def delete(table, ids):
    table.delete(f"id IN ({', '.join(repr(key) for key in ids[:IDS])})")


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the table")
    count = parser.parse_args().rows
    if count < 4 * CHUNK:
        parser.error(f"--rows must be at least {4 * CHUNK}, of which {CHUNK} are replaced twice, got {count}")
    ids = [f"folder-{number % 97}/file-{number:09d}.txt" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"some text {number}" for number in range(count)]
        table = lancedb.connect(folder).create_table("items", pa.table({"id": ids, "text": texts}))

        def size():
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

        def measure(name, start):
            part = ids[start:]
            return show(
                {
                    "ids": name,
                    "get_ms": round(1000 * look_up(table, part), 1),
                    "replace_10000_s": round(seconds_of(partial(replace, table, part)), 2),
                    "delete_1000_s": round(seconds_of(partial(delete, table, part[CHUNK:])), 2),
                }
            )

        rows, before = [measure("without an index", 0)], size()
        built = seconds_of(lambda: table.create_index("id", config=BTree()))
        grown = (size() - before) / count
        rows.append(measure("with it", count // 2))
    result = {"machine": machine(), "rows": count, "build_s": round(built, 1), "bytes_a_row": round(grown, 1)}
    show(result)
    (RESULTS / "corpus_ids.json").write_text(json.dumps({**result, "speed": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
