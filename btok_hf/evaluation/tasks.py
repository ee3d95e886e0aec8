"""The 78 datasets of MMEB-V2 as data, and the types of a dataset read from disk.

tasks.csv holds what differs between the datasets. Their files are found by loading.py, their rows read by readers.py.
`root` is the folder of the benchmark as these commands make it:

    hf download TIGER-Lab/MMEB-V2 --repo-type dataset --local-dir MMEB-V2 && cd MMEB-V2
    hf download ziyjiang/MMEB_Test_Instruct --repo-type dataset --local-dir image-query
    for repo in ViDoSeek MMLongBench; do
        hf download VLM2Vec/$repo-page-fixed --repo-type dataset --local-dir visdoc-tasks/data/$repo-page-fixed; done
    tar -xzf image-tasks/mmeb_v1.tar.gz -C image-tasks
    (cd video-tasks/frames && mkdir video_cls video_ret && tar -xzf video_cls.tar.gz -C video_cls &&
        tar -xzf video_ret.tar.gz -C video_ret && tar -xzf video_mret.tar.gz && cat video_qa.tar.gz-* | tar -xz)
    (cd visdoc-tasks && tar -xzf visdoc-tasks.data.tar.gz && tar -xzf visdoc-tasks.images.tar.gz)

Other releases use other names for some folders; these are tried too. If the rows of a dataset are missing, they are
read from its repository on the Hub. Missing pages are written from the corpus, which holds them.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict


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
        query_kind, candidate_kind (`str`): `text`, `image`, `video`, or several joined by `+`; `|` between
            alternatives.
        scope (`str`): `local`, if each query ranks its own candidates, or `global`.
        metric (`str`): The main metric.
        query_instruction, candidate_instruction (`str`): Empty if the rows hold them (all of `image`).
        num_frames (`int`, *optional*): Frames of a video; `None`: all that are stored.
        rows (`int`, *optional*): If set, only this many rows, from the first, belong to the dataset.
        queries (`int`): Number of queries behind the published scores (VLM2Vec's score files, data v2.0.1).
        candidates (`int`, *optional*): Number of candidates of each query behind them, where files may lack some
            without an error: clips are the folders that were unpacked.
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
    candidates: int | None


class TaskInput(TypedDict, total=False):
    """A query or candidate before its media are decoded; `read_input` decodes them.

    Args:
        text (`str`): A text.
        image (`str`): Path of an image.
        video (`str`): Path of a folder of frames.
    """

    text: str
    image: str
    video: str


class Query(NamedTuple):
    """One query.

    Args:
        id (`str`): Its id, or the number of its row.
        input (`TaskInput`): What is encoded.
        candidates (`list[str]`, *optional*): Names of the candidates that it ranks, each once; `None`: all candidates
            of the task.
        relevance (`dict[str, float]`): Grades above 0 of the right candidates, by name. Never empty.
    """

    id: str
    input: TaskInput
    candidates: list[str] | None
    relevance: dict[str, float]


class Task(NamedTuple):
    """A dataset read from disk. Media are paths of existing files, not decoded.

    Args:
        name, modality, meta_task, metric, num_frames: As in `TaskInfo`.
        queries (`list[Query]`): In the order of the rows.
        candidates (`dict[str, TaskInput]`): Inputs by name. Of two candidates with one name the first counts, as in
            the original evaluation: in text-to-image retrieval, two captions of one image are one candidate.
    """

    name: str
    modality: str
    meta_task: str
    metric: str
    queries: list[Query]
    candidates: dict[str, TaskInput]
    num_frames: int | None = 8


def _table() -> Iterator[TaskInfo]:
    with open(Path(__file__).with_name("tasks.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {
                key: int(row[key]) if row[key] else None for key in ("num_frames", "rows", "queries", "candidates")
            }
            fields: dict[str, Any] = {**row, **numbers}
            yield TaskInfo(**fields)


TASKS = {info.name: info for info in _table()}

# Below the root, in order of preference.
MEDIA = {
    "image": ("image-tasks/MMEB", "image-tasks", "image-tasks/mmeb_v1/MMEB"),
    "video": (
        "video-tasks/frames/{level}/{media}",
        "video-tasks/frames/{media}",
        "video-tasks/frames/{level}/{level}/{media}",
        "video-tasks/frames/{level}/data/ziyan/video_retrieval/{media}/frames",
        "video-tasks/frames/data/ziyan/video_retrieval/{media}/frames",
    ),
    "visdoc": ("visdoc-tasks/images/{media}", "visdoc-tasks/{media}"),
}


class Media:
    """Finds the images and folders of frames of a dataset.

    Releases differ in where their archives unpack to. The first folder that holds the first path is used for all.

    Args:
        info (`TaskInfo`): The dataset.
        root (`Path`): Folder of the benchmark.
    """

    def __init__(self, info: TaskInfo, root: Path) -> None:
        level = f"video_{info.meta_task[2:].lower()}"
        names = [(pattern, media) for pattern in MEDIA[info.modality] for media in info.media.split("|")]
        self.folders = [root / pattern.format(level=level, media=media) for pattern, media in names]
        self.found: dict[str, str] = {}

    def image(self, path: str) -> str:
        """Path of an image."""
        return self._find(path, Path.is_file)

    def frames(self, path: str) -> str:
        """Path of a folder of frames that is not empty."""
        return self._find(path, lambda folder: folder.is_dir() and any(folder.iterdir()))

    def _find(self, path: str, exists: Callable[[Path], bool]) -> str:
        path = str(path)
        if path not in self.found:
            folder = next((folder for folder in self.folders if path and exists(folder / path)), None)
            if folder is None:
                looked = ", ".join(str(folder / path) for folder in self.folders)
                raise FileNotFoundError(
                    f"{path!r} is missing or empty. Looked for {looked}; {holds(self.folders[0] / path)}. Unpack "
                    "the archives of TIGER-Lab/MMEB-V2: see btok_hf/evaluation/tasks.py."
                )
            self.folders = [folder]
            self.found[path] = str(folder / path)
        return self.found[path]


def holds(path: Path) -> str:
    """The nearest existing folder of a path, and what it holds."""
    while not path.is_dir():
        path = path.parent
    names = sorted(entry.name for entry in path.iterdir())
    return f"{path} holds {', '.join(names[:8]) or 'nothing'}{', …' if names[8:] else ''}"
