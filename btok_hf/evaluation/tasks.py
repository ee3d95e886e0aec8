"""The 78 datasets of MMEB-V2, and what a dataset read from disk is.

What differs between them is in tasks.csv; what their rows have in common is read by loading.py and readers.py.
Below `root` lies the benchmark as these commands leave it:

    hf download TIGER-Lab/MMEB-V2 --repo-type dataset --local-dir MMEB-V2 && cd MMEB-V2
    hf download ziyjiang/MMEB_Test_Instruct --repo-type dataset --local-dir image-query
    for repo in ViDoSeek MMLongBench; do
        hf download VLM2Vec/$repo-page-fixed --repo-type dataset --local-dir visdoc-tasks/data/$repo-page-fixed; done
    tar -xzf image-tasks/mmeb_v1.tar.gz -C image-tasks
    (cd video-tasks/frames && mkdir video_cls video_ret && tar -xzf video_cls.tar.gz -C video_cls &&
        tar -xzf video_ret.tar.gz -C video_ret && tar -xzf video_mret.tar.gz && cat video_qa.tar.gz-* | tar -xz)
    (cd visdoc-tasks && tar -xzf visdoc-tasks.data.tar.gz && tar -xzf visdoc-tasks.images.tar.gz)

Other releases name some folders otherwise; those are looked for too. A dataset whose rows are not there takes them
from its repository on the Hub. Pages that are not there are written from the corpus, which holds them.
"""

import csv
from pathlib import Path
from typing import NamedTuple


class TaskInfo(NamedTuple):
    """A row of tasks.csv: what is known of a dataset before its files are read.

    Args:
        name (`str`): The leaderboard's name.
        modality (`str`): `image`, `video` or `visdoc`.
        meta_task (`str`): `I-CLS`, `I-QA`, `I-RET`, `I-VG`, `V-CLS`, `V-QA`, `V-RET`, `V-MRET`, `VD-ViDoRe-V1`,
            `VD-ViDoRe-V2`, `VD-VisRAG` or `VD-OOD`.
        layout (`str`): How a row is read: a key of `READERS`, `pages` or `hashed_pages`.
        repo, split (`str`): Hub id of the rows and their split.
        subset (`str`): Its subset, or several, separated by spaces, that make up the dataset.
        data, media (`str`): Names of the file or folder of rows, and of the folder of media; `|` between alternatives.
        columns (`str`): Columns that are read, separated by spaces.
        query_kind, candidate_kind (`str`): `text`, `image`, `video` or joined by `+`; `|` between alternatives.
        scope (`str`): `local`, if each query ranks its own candidates, or `global`.
        metric (`str`): The main metric.
        query_instruction, candidate_instruction (`str`): Empty where the rows hold them (all of `image`).
        num_frames (`int`, *optional*): Frames of a video; `None`: all that are stored.
        rows (`int`, *optional*): Only the first rows belong to the dataset.
        queries (`int`): How many queries the published scores are of (VLM2Vec's score files, data v2.0.1).
    """

    name: str
    modality: str
    meta_task: str
    layout: str
    repo: str
    subset: str
    split: str
    data: str
    media: str
    columns: str
    query_kind: str
    candidate_kind: str
    scope: str
    metric: str
    query_instruction: str
    candidate_instruction: str
    num_frames: int | None
    rows: int | None
    queries: int


class Query(NamedTuple):
    """One query.

    Args:
        id (`str`): Its id, or the number of its row.
        input (`dict`): `text`, and `image` (path) or `video` (path of a folder of frames): see `read_input`.
        candidates (`list[str]`, *optional*): Names of what it ranks, each once; `None`: all candidates of the task.
        relevance (`dict[str, float]`): Names of the right candidates → grades above 0. Never empty.
    """

    id: str
    input: dict
    candidates: list[str] | None
    relevance: dict[str, float]


class Task(NamedTuple):
    """A dataset read from disk; media are paths, which were found but not decoded.

    Args:
        name, modality, meta_task, metric, num_frames: As in `TaskInfo`.
        queries (`list[Query]`): In the order of the rows.
        candidates (`dict[str, dict]`): Names → inputs. Of two candidates with one name the first counts, as in the
            original: so two captions of one image are one candidate of text-to-image retrieval.
    """

    name: str
    modality: str
    meta_task: str
    metric: str
    queries: list[Query]
    candidates: dict[str, dict]
    num_frames: int | None = 8


def _table():
    with open(Path(__file__).with_name("tasks.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {key: int(row[key]) if row[key] else None for key in ("num_frames", "rows", "queries")}
            yield TaskInfo(**{**row, **numbers})


TASKS = {info.name: info for info in _table()}


# -------------------------------------------------------------------------------------------------- images and videos


# ------------------------------------------------------------------------------------------------------------- pages


# -------------------------------------------------------------------------------------------------------------- files
