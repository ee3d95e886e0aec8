"""Stand-ins for models in evaluations, and scores without caches, batches or blocks."""

import numpy as np

from btok_hf.evaluation.embeddings import hash_of
from btok_hf.evaluation.loading import read_input
from btok_hf.evaluation.metrics import score

# Local texts, a global pool of videos, local videos with a folder of clips, pages; queries with and without images.
SAMPLE = ["OK-VQA", "CIRR", "MSVD", "MomentSeeker", "ViDoRe_arxivqa"]

# SAMPLE and OTHERS together have every layout.
OTHERS = ["VOC2007", "WebQA", "Breakfast", "SmthSmthV2", "NExTQA", "QVHighlight", "VisRAG_ArxivQA"]


def refuse(inputs):
    raise AssertionError(f"encoded again: {inputs}")


def counted(function):
    """The function, and the batches that it is given."""
    batches = []

    def counting(inputs):
        batches.append(inputs)
        return function(inputs)

    return counting, batches


def by_hand(encode, task):
    """Scores of a task without caches, batches or blocks."""

    def vectors(items):
        found = np.stack([encode([read_input(item, task.num_frames)])[0] for item in items])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    names, queries = list(task.candidates), vectors([query.input for query in task.queries])
    similarity = queries.astype(float) @ vectors(task.candidates.values()).astype(float).T
    rankings = []
    for row, query in zip(similarity.round(6), task.queries):
        own = names if query.candidates is None else sorted(query.candidates, key=hash_of)
        rankings.append(sorted(own, key=lambda name, row=row: -row[names.index(name)]))
    return score(rankings, [query.relevance for query in task.queries]), rankings


LETTERS = "abcdefghijklmnop"


def original(item):
    """The text with its media token, as in the original evaluation code."""
    return {"image": "<image>\n", "video": "<video> "}.get(next(iter(item)), "") + item["text"]


def asked(task):
    return [original(query.input) for query in task.queries]


def frames_of(root, kind, name):
    return root / "video-tasks" / "frames" / f"video_{kind}" / name
