"""Lists of terms: an input that is several things at once, for the question how much Bottleneck Tokens hold.

    python -m benchmarks.pretrained.lists --anchors       # what TF-IDF, BM25 and all-MiniLM-L6-v2 reach

A query is a list of four terms, and the right candidate the list of their four definitions, in another order. Lists
are drawn in pools of eight terms, 16 lists of a pool: nearly every wrong candidate of a pool shares terms with the
right one, so an embedding that holds three of the four meanings is not enough. `run.py --sources lists --by-book lists
--only list` trains batches of one pool each and scores the lists of held-out books.
"""

import argparse
import itertools
import json
import random
import sys
from functools import cache

from benchmarks import RESULTS
from benchmarks.pretrained.tasks import anchors, rows
from benchmarks.unified.inputs import cut
from benchmarks.unified.tasks import Task

NAME = "list → definitions"
TERMS, POOL, LISTS = 4, 8, 16


def lists(split: str, seed: int) -> list[dict]:
    """Lists of all terms of `split`, each term in one pool: rows with `query`, `positive`, `group` and `book`.

    `group` tells lists apart, and `book` is the number of the pool. The first list of every pool comes first, then
    the second of every pool.
    """
    rng = random.Random(seed)
    # Terms and definitions are unique, so no list is another one in disguise.
    by_definition = {cut(row["definition"]).casefold(): row for row in rows("glossary", split)}
    terms = list({row["term"].casefold(): row for row in by_definition.values()}.values())
    rng.shuffle(terms)
    pools = [terms[start : start + POOL] for start in range(0, len(terms) - POOL + 1, POOL)]
    drawn = [rng.sample(list(itertools.combinations(pool, TERMS)), LISTS) for pool in pools]
    return [
        {
            "query": "; ".join(row["term"] for row in rng.sample(chosen, TERMS)),
            "positive": "; ".join(cut(row["definition"]) for row in rng.sample(chosen, TERMS)),
            "group": f"{pool}/{number}",
            "book": str(pool),
        }
        for number in range(LISTS)
        for pool, chosen in enumerate(of_pool[number] for of_pool in drawn)
    ]


@cache
def tasks(split: str = "test") -> dict[str, Task]:
    """The task, by its name. Queries of one pool are not independent."""
    found = lists(split, seed=0)
    queries, candidates = [row["query"] for row in found], [row["positive"] for row in found]
    pools = [row["book"] for row in found]
    return {NAME: Task(NAME, queries, candidates, list(range(len(found))), pools, (queries, candidates))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", action="store_true", help="score the anchors and write benchmarks/results")
    scored = anchors(tasks()) if parser.parse_args().anchors else {}
    print(f"{NAME}: {len(tasks()[NAME].queries):,} queries and candidates")
    for name, ranks in scored.items():
        print(f"{name}: MRR {100 * sum(1 / rank for rank in ranks[NAME]) / len(ranks[NAME]):.1f}")
    if scored:
        target = RESULTS / "pretrained" / "anchors-lists.json"
        target.write_text(
            json.dumps({"command": " ".join(["-m benchmarks.pretrained.lists", *sys.argv[1:]]), "ranks": scored})
        )


if __name__ == "__main__":
    main()
