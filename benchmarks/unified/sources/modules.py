"""Config `modules`: sections of textbooks."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.unified.sources.splits import column, is_test, keep, keep_far, keep_once, read_lines
from benchmarks.unified.sources.texts import GRAM, clean, cut_characters, gram_share, normalised

# Near-duplicates, from train to test, are dropped: runs of words in common, as a share of the smaller text's.
MODULE_SHARE = 0.1
LEAST_MODULE_CHARACTERS, MOST_MODULE_CHARACTERS = 600, 1500

GENERIC_TITLE = re.compile(
    r"|introduction|preface|(chapter )?summary|connection for ap® courses|glossary.*|key terms|answer key|index|units"
    r"|useful information|reference tables|references|recommended resources.*|.*to come",
    re.IGNORECASE,
)
# Notes to teachers within the text of "physics", marked with the level of the students.
TEACHERS_NOTE = re.compile(r"\[(BL|OL|AL|EL|TEKS)\]|Physics learning objectives come from")


def build(source: Path, dropped: Counter) -> list[dict]:
    """Sections: title, learning objectives and the beginning of the text."""
    rows = []
    for row in read_lines(source / "modules.jsonl.gz"):
        paragraphs = [clean(block[1]) for block in row["blocks"] if block[0] == "p"]
        full = "\n".join(text for text in paragraphs if text and not TEACHERS_NOTE.match(text))
        objectives = [text for text in map(clean, row["objectives"]) if text]
        text = cut_characters(full, MOST_MODULE_CHARACTERS)
        rows.append({**row, "title": clean(row["title"]), "objectives": objectives, "full": full, "text": text})
    rows = keep(rows, [not GENERIC_TITLE.fullmatch(row["title"]) for row in rows], dropped, "generic title")
    rule = f"fewer than {LEAST_MODULE_CHARACTERS} characters of text"
    rows = keep(rows, [len(row["full"]) >= LEAST_MODULE_CHARACTERS for row in rows], dropped, rule)
    rows = keep_once(rows, lambda row: row["text"], dropped, "exact duplicate of the text")
    titles = {normalised(row["title"]) for row in rows if is_test(row)}
    known = [is_test(row) or normalised(row["title"]) not in titles for row in rows]
    rows = keep(rows, known, dropped, "train: the title is in test")
    rule = f"train: shares >= {MODULE_SHARE:.0%} of the smaller text's word {GRAM}-grams with test"
    return keep_far(
        rows,
        lambda a, b: (
            np.maximum(*(gram_share(column(a, key), column(b, key)) for key in ("full", "text"))) >= MODULE_SHARE
        ),
        dropped,
        rule,
    )
