"""The 78 datasets of MMEB-V2 (work in progress: the interface stands, the readers follow)."""

from typing import NamedTuple


class TaskInfo(NamedTuple):
    """A row of tasks.csv (further fields follow)."""

    name: str
    modality: str
    meta_task: str
    metric: str


class Query(NamedTuple):
    id: str
    input: dict
    candidates: list | None
    relevance: dict


class Task(NamedTuple):
    name: str
    modality: str
    meta_task: str
    metric: str
    queries: list
    candidates: dict


TASKS: dict[str, TaskInfo] = {}


def load_task(name, root=None, limit=None):
    raise NotImplementedError
