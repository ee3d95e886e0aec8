"""Evaluation: the 78 datasets of MMEB-V2, metrics, reports, and model metadata for mteb.

`mmeb.py` runs an evaluation. Datasets are described in `tasks.py` and read by `loading.py` and `readers.py`. Names are
imported on first use, as in `btok_hf`.
"""

from importlib import import_module
from typing import Any

_LAZY_IMPORTS = {
    "TASKS": "btok_hf.evaluation.tasks",
    "Query": "btok_hf.evaluation.tasks",
    "Task": "btok_hf.evaluation.tasks",
    "evaluate": "btok_hf.evaluation.mmeb",
    "load_task": "btok_hf.evaluation.loading",
    "mteb_meta": "btok_hf.evaluation.mteb",
    "score": "btok_hf.evaluation.metrics",
}
__all__ = list(_LAZY_IMPORTS)


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'btok_hf.evaluation' has no attribute {name!r}")
    return getattr(import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
