"""Pair files: what `train.py` trains and evaluates on."""

from pathlib import Path

from datasets import load_dataset
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from btok_hf.training.condensation_trainer import as_input, check_columns, identity

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_pairs(source):
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


def retrieval_evaluator(source, batch_size=64):
    """An `InformationRetrievalEvaluator` over a pair file: every distinct query against every distinct positive.

    Equal queries are one query with several right answers; equal positives (images: equal pixels) are one candidate.

    Args:
        source (`str`): As in `load_pairs`. Further positives without a query (rows whose `query` is null) are
            candidates only.
        batch_size (`int`): Rows per forward.

    Returns:
        The evaluator; its metrics are accuracy, recall (at 1 and 10) and mrr (over all candidates).
    """
    queries, corpus, relevant = {}, {}, {}
    for row in load_pairs(source):
        query, positive = as_input(row["query"]), as_input(row["positive"])
        candidate = str(identity(positive))
        corpus.setdefault(candidate, positive)
        if query is not None:
            asked = str(identity(query))
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
