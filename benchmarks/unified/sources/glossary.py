"""Config `glossary`: terms and their definitions."""

from collections import Counter
from pathlib import Path

from benchmarks.unified.sources.splits import column, is_test, keep, keep_far, keep_once, numbered, read_lines
from benchmarks.unified.sources.texts import clean, jaccard, normalised

# Near-duplicates, from train to test, are dropped: Jaccard similarity of the words of two definitions.
DEFINITION_JACCARD = 0.6


def build(source: Path, dropped: Counter) -> list[dict]:
    """Terms and their definitions."""
    rows = numbered(read_lines(source / "glossary.jsonl.gz"), "g")
    rows = [{**row, "term": clean(row["term"]), "definition": clean(row["meaning"])} for row in rows]
    complete = [normalised(row["term"]) and len(row["definition"].split()) >= 3 for row in rows]
    rows = keep(rows, complete, dropped, "no term, or a definition of fewer than 3 words")
    rows = keep_once(rows, lambda row: (row["term"], row["definition"]), dropped, "exact duplicate")
    terms = {normalised(row["term"]) for row in rows if is_test(row)}
    known = [is_test(row) or normalised(row["term"]) not in terms for row in rows]
    rows = keep(rows, known, dropped, "train: the term is in test")
    rule = f"train: Jaccard of the definition's words >= {DEFINITION_JACCARD} with test"
    return keep_far(
        rows,
        lambda a, b: jaccard(column(a, "definition"), column(b, "definition")) >= DEFINITION_JACCARD,
        dropped,
        rule,
    )
