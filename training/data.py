"""Pair files: load them, check their columns, decode their cells, evaluate retrieval on them.

Several datasets in one run are in `mixture.py`, the paper's data in `sources.py`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from btok_hf.inputs import content_hash

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_pairs(source: str) -> Dataset:
    """Load pairs with the columns of `CondensationTrainer`.

    Args:
        source (`str`): A parquet, JSON-lines or CSV file, or the Hub id of a dataset with a `train` split. A column
            holds texts, images (as the `datasets` feature, or as file paths), or dicts of both.

    Returns:
        `datasets.Dataset`

    Raises:
        FileNotFoundError, ValueError: No such file, an unknown format, or wrong columns.
    """
    suffix = Path(source).suffix.lower()
    if suffix in FORMATS:
        if not Path(source).is_file():
            raise FileNotFoundError(f"Pair file {source!r} does not exist.")
        dataset = load_dataset(FORMATS[suffix], data_files=str(source), split="train")
    elif Path(source).exists():
        raise ValueError(f"Pair file {source!r} has an unknown format. Use one of {', '.join(FORMATS)}.")
    else:
        dataset = load_dataset(source, split="train")
    check_columns(dataset.column_names, source)
    return dataset


def retrieval_evaluator(source: str, batch_size: int = 64) -> InformationRetrievalEvaluator:
    """An `InformationRetrievalEvaluator` over a pair file: every distinct query against every distinct positive.

    Equal queries are one query with several right answers; equal positives (images: equal pixels) are one candidate.

    Args:
        source (`str`): As in `load_pairs`. The positive of a row whose `query` is null is a candidate only.
        batch_size (`int`): Rows per forward.

    Returns:
        `InformationRetrievalEvaluator`: With accuracy, precision and recall at 1 and 10, nDCG@10, MAP@100, and MRR
        over all candidates.
    """
    queries: dict[str, Any] = {}
    corpus: dict[str, Any] = {}
    relevant: dict[str, set[str]] = {}
    for row in load_pairs(source):
        query, positive = decode_cell(row["query"]), decode_cell(row["positive"])
        candidate = str(content_hash(positive))
        corpus.setdefault(candidate, positive)
        if query is not None:
            asked = str(content_hash(query))
            queries.setdefault(asked, query)
            relevant.setdefault(asked, set()).add(candidate)
    return InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        name=Path(source).stem,
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[1, 10],
        mrr_at_k=[len(corpus)],
        ndcg_at_k=[10],
        map_at_k=[100],
        batch_size=batch_size,
        write_csv=False,
    )


def decode_cell(cell: Any) -> Any:
    """A cell of a dataset as an input.

    Arrow gives all dicts of a column the same keys; those with `None` are dropped. Images inside dicts come encoded,
    as `bytes` and `path`; they are decoded.
    """
    if isinstance(cell, (list, tuple)):
        return [decode_cell(part) for part in cell]
    if not isinstance(cell, dict):
        return cell
    if set(cell) == {"bytes", "path"}:
        return datasets.Image().decode_example(cell)
    return {key: part if key == "video" else decode_cell(part) for key, part in cell.items() if part is not None}


def check_columns(columns: Collection[str], dataset_name: str | None = None) -> list[str]:
    """Refuse columns that training cannot use. Returns `query`, `positive` and the negatives, in this order."""
    where = "The dataset" if dataset_name is None else f"Dataset {dataset_name!r}"
    embedded = [column for column in columns if column not in ("target", "group", "dataset_name")]
    negatives = [name for name in embedded if name in ("negative", "negatives") or name.startswith("negative_")]
    unknown = sorted(set(embedded) - {"query", "positive", *negatives})
    missing = sorted({"query", "positive"} - set(embedded))
    if unknown or missing:
        problems = [f"{problem} {names}" for problem, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(
            f"{where} has the columns {sorted(columns)}: {'; '.join(problems)}. Training takes query, positive, "
            "negative or negative_1, negative_2, … (each a text, an image, or a dict with image, video and text), "
            "negatives (a list of them), target (a text to generate instead of the other side's own) and group (rows "
            "of one group answer each other's queries). "
            "Rename the columns with dataset.rename_column and drop the rest with dataset.remove_columns."
        )
    return ["query", "positive", *negatives]
