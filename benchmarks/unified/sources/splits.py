"""What the textbook configs share: reading rows, the split by book, and rules that drop rows and count them."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

SPLITS = ("train", "test")
TEST_BOOKS = ("physics", "introduction-sociology", "american-government")


def read_lines(path: Path) -> list[dict]:
    """The rows of a compressed JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def numbered(rows: list[dict], letter: str) -> list[dict]:
    """The rows with an `id` (the module and a number within it) and a `book`."""
    count = Counter()
    result = []
    for row in rows:
        count[row["module"]] += 1
        identifier = f"{row['module']}/{letter}{count[row['module']]}"
        result.append({**row, "id": identifier, "book": row["module"].split("/")[0]})
    return result


def column(rows: list[dict], name: str) -> list:
    """One column; nulls become empty texts."""
    return [row[name] or "" for row in rows]


def is_test(row: dict) -> bool:
    """Whether the row comes from a book of the test split."""
    return row["book"] in TEST_BOOKS


def fraction(text: str) -> float:
    """A hash of the text in [0, 1). Choices made with it stay the same when data are added."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def keep(rows: list[dict], flags, dropped: Counter, rule: str) -> list[dict]:
    """The rows with a true flag. The number of the others is added to `dropped`."""
    flags = list(flags)
    dropped[rule] += len(flags) - sum(map(bool, flags))
    return [row for row, flag in zip(rows, flags, strict=True) if flag]


def keep_once(rows: list[dict], key, dropped: Counter, rule: str) -> list[dict]:
    """One row for every key: the first, with test rows before train rows."""
    seen = {}
    for row in sorted(rows, key=is_test, reverse=True):
        seen.setdefault(key(row), row["id"])
    first = set(seen.values())
    return keep(rows, [row["id"] in first for row in rows], dropped, rule)


def keep_far(rows: list[dict], near, dropped: Counter, rule: str) -> list[dict]:
    """All test rows, and the train rows that are near to none of them by `near(train, test)`, a boolean matrix."""
    train, test = [row for row in rows if not is_test(row)], [row for row in rows if is_test(row)]
    far = {row["id"] for row, given_away in zip(train, near(train, test).any(1), strict=True) if not given_away}
    return keep(rows, [is_test(row) or row["id"] in far for row in rows], dropped, rule)


def keep_most(rows: list[dict], most: int, test: bool, dropped: Counter, rule: str) -> list[dict]:
    """At most so many rows of the split, chosen by a hash of the id."""
    chosen = sorted((fraction(row["id"]), row["id"]) for row in rows if is_test(row) == test)[:most]
    chosen = {identifier for _, identifier in chosen}
    return keep(rows, [is_test(row) != test or row["id"] in chosen for row in rows], dropped, rule)
