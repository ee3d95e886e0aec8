"""What the unified benchmark asks: queries and candidates, all embedded in one vector space.

python -m benchmarks.unified.tasks        # lists the sources and the tasks with their sizes
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.unified.inputs import CATEGORIES, DRAWING, books, clip, cut, emoji, page, pages, sprite_clips, square
from benchmarks.unified.training_rows import LANGUAGES, training_rows
from examples.prepare_emoji import draw

MOTION = "motion → video or its reversal"
CLIPS = "name → video"
UNSEEN = "name of an unseen concept → drawing"


@dataclass
class Task:
    """Queries, each with one right answer among all candidates, or among a few of them (`choices`)."""

    name: str
    queries: list
    candidates: list
    right: list  # index of the right candidate of each query
    groups: list  # what the queries are about: those of one group are not independent
    baseline: tuple = None  # texts or images of queries and candidates for the trivial baseline
    choices: list = None  # candidates of each query, where they are not all


@cache
def tasks(size=DRAWING):
    """All tasks, by name. Drawings have `size` pixels a side."""
    seen, unseen, strange = (emoji()[split] for split in ("train", "unseen_drawings", "unseen_concepts"))
    held_out = {row["emoji"]: row for row in unseen}
    # One drawing of every concept: the unseen one, or else a training drawing as a distractor.
    pool = list(unseen) + list({row["emoji"]: row for row in seen if row["emoji"] not in held_out}.values())
    pictures = [draw(row["image"], size=size) for row in pool]
    concepts = [row["emoji"] for row in unseen]
    own = list(range(len(unseen)))
    other = [row for row in seen if row["emoji"] in held_out]
    names = [row["names"]["en"] for row in pool]
    foreign = [(language, index) for language in LANGUAGES[1:] for index in own]
    found = [
        Task("name → drawing", names[: len(own)], pictures, own, concepts),
        Task(
            "name in de, fr, es → drawing",
            [unseen[index]["names"][language] for language, index in foreign],
            pictures,
            [index for _, index in foreign],
            [concepts[index] for _, index in foreign],
        ),
        Task("drawing → name", pictures[: len(own)], names, own, concepts),
        Task(
            "drawing → other artist's",
            [draw(row["image"], size=size) for row in other],
            pictures,
            [concepts.index(row["emoji"]) for row in other],
            [row["emoji"] for row in other],
            ([draw(row["image"], size=size) for row in other], pictures),
        ),
    ]
    new = list({row["emoji"]: row for row in strange}.values())
    # Names of concepts that training never saw, among all drawings: only words shared with others can help. The models
    # of the repository were trained with clips of some, which are distractors here.
    clipped = set(books("clips", "train")["emoji"])
    asked = [index for index, row in enumerate(new) if row["emoji"] not in clipped]
    found.append(
        Task(
            UNSEEN,
            [new[index]["names"]["en"] for index in asked],
            [draw(row["image"], size=size) for row in new] + pictures,
            asked,
            [new[index]["emoji"] for index in asked],
        )
    )
    clips = list(books("clips", "test"))
    videos = [clip(row["frames"]) for row in clips]
    every = range(len(clips))
    found.append(Task(CLIPS, [r["name"] for r in clips], videos, list(every), [r["emoji"] for r in clips]))
    motions = [(row["emoji"], text, frames) for row in unseen for text, frames in sprite_clips(row)]
    found.append(
        Task(
            MOTION,
            [text for _, text, _ in motions],
            [clip(frames) for _, _, frames in motions],
            list(range(len(motions))),
            [concept for concept, _, _ in motions],
            choices=[(index, index ^ 1) for index in range(len(motions))],
        )
    )
    sheets = list(pages("test"))
    images = [page(sheet["title"], sheet["text"]) for sheet in sheets]
    for kind in ("title", "question"):
        asked = [(text, index) for index, sheet in enumerate(sheets) for text in sheet["asks"][kind][:3]]
        texts = [text for text, _ in asked]
        readable = [f"{sheet['title']} {sheet['text']}" for sheet in sheets]
        found.append(
            Task(
                f"{kind} → page",
                texts,
                images,
                [index for _, index in asked],
                [sheets[index]["module"] for _, index in asked],
                (texts, readable),
            )
        )
    terms = {cut(row["definition"]).casefold(): row for row in books("glossary", "test")}
    terms = list({row["term"].casefold(): row for row in terms.values()}.values())
    queries, answers = [row["term"] for row in terms], [cut(row["definition"]) for row in terms]
    modules = [row["module"] for row in terms]
    found.append(
        Task("term → definition", queries, answers, list(range(len(terms))), modules, (queries, answers)),
    )
    figures = list({cut(row["caption"]): row for row in books("figures", "test")}.values())
    images, captions = [square(row["image"]) for row in figures], [cut(row["caption"]) for row in figures]
    each, modules = list(range(len(figures))), [row["module"] for row in figures]
    found.append(Task("figure → caption", images, captions, each, modules))
    found.append(Task("caption → figure", captions, images, each, modules))
    return {task.name: task for task in found}


def drawn(categories=CATEGORIES):
    """Whether the training drawings of these categories (`None`: all) show the emoji of a clip, for each of `CLIPS`.

    A clip is held out, but not what it shows: such an emoji was trained as drawings, with its name.
    """
    trained = {row["emoji"] for row in emoji(categories)["train"]}
    return np.array([concept in trained for concept in tasks()[CLIPS].groups])


def score(task, ranks):
    """The score of each query, in percent.

    Raises:
        ValueError: The ranks are not those of the task's queries.
    """
    if len(ranks) != len(task.queries):
        raise ValueError(
            f"{task.name} has {len(task.queries)} queries, and a result has {len(ranks)} ranks: it is of another "
            "version of the task. Remove the file and run the benchmark again."
        )
    ranks = np.asarray(ranks)
    return 100.0 * (ranks == 1) if task.choices is not None else 100.0 / ranks


def chance(task):
    """The expected score of a random order."""
    if task.choices is not None:
        return 100 / len(task.choices[0])
    return 100 * np.mean(1 / np.arange(1, len(task.candidates) + 1))


if __name__ == "__main__":
    for name, rows in training_rows().items():
        size = sum(len(row[key]["bytes"]) for row in rows for key in row if isinstance(row[key], dict))
        print(f"{name:40} {len(rows):6,} rows {size / 1e6:6.1f} MB")
    for task in tasks().values():
        print(f"{task.name:40} {len(task.queries):6,} queries {len(task.candidates):6,} candidates")
