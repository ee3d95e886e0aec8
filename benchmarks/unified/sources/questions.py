"""Config `questions`: exercises and review questions of textbooks."""

import re
from collections import Counter
from pathlib import Path

from benchmarks.unified.sources.splits import column, keep, keep_far, keep_most, keep_once, numbered, read_lines
from benchmarks.unified.sources.texts import clean, jaccard, normalised

# Near-duplicates, from train to test, are dropped: Jaccard similarity of the words of two questions.
QUESTION_JACCARD = 0.7
QUESTION_WORDS = (5, 60)
TRAIN_QUESTIONS = 6000

ONLY_A_LETTER = re.compile(r"\W*[A-Za-z]\W*")


def build(source: Path, kept_modules: set[str], dropped: Counter) -> list[dict]:
    """Exercises and review questions with their answers, where the book gives more than a letter."""
    rows = []
    for row in numbered(read_lines(source / "questions.jsonl.gz"), "q"):
        answer = clean(row["answer"])
        answer = None if not answer or ONLY_A_LETTER.fullmatch(answer) else answer
        rows.append({**row, "question": clean(row["question"]), "answer": answer})
    rows = keep(rows, [row["module"] in kept_modules for row in rows], dropped, "module not in `modules`")
    least, most = QUESTION_WORDS
    fitting = [least <= len(row["question"].split()) <= most for row in rows]
    rows = keep(rows, fitting, dropped, f"fewer than {least} or more than {most} words")
    rows = keep_once(rows, lambda row: normalised(row["question"]), dropped, "exact duplicate")
    rule = f"train: Jaccard of the words >= {QUESTION_JACCARD} with test"
    rows = keep_far(
        rows, lambda a, b: jaccard(column(a, "question"), column(b, "question")) >= QUESTION_JACCARD, dropped, rule
    )
    return keep_most(rows, TRAIN_QUESTIONS, False, dropped, f"train: over the limit of {TRAIN_QUESTIONS} rows")
