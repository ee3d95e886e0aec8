"""Prompts in training: those that `encode_query` and `encode_document` will use afterwards."""

from collections.abc import Collection, Mapping
from typing import Any

from sentence_transformers import SentenceTransformer

COLUMNS = ("query", "positive", "negative")
# Names that `encode_document` looks for, in its order.
DOCUMENT = ("document", "passage", "corpus")
Prompts = str | Mapping[str, Any] | None


def training_prompts(given: Prompts, model: SentenceTransformer, datasets: Collection[str]) -> Any:
    """What to put before the inputs of each column.

    Args:
        given: `prompts` of the training arguments: one text, texts by column, or either of them by dataset. `None`:
            those of the model, `query` for queries and `document` for the others.
        model (`SentenceTransformer`): The model. Prompts that are given for all datasets become its own, so that
            `encode_query` and `encode_document` use what was trained.
        datasets (`Collection[str]`): Names of the datasets; none if there is only one.

    Returns:
        The prompts, in the form of Sentence-Transformers, with those of negatives, which are those of positives. If
        they are by dataset, those of all others are at `None`, where there are any.

    Raises:
        ValueError: A name that is neither a column nor a dataset.
    """
    if given is None:
        document = next((model.prompts[name] for name in DOCUMENT if name in model.prompts), None)
        own = {"query": model.prompts.get("query"), "positive": document, "negative": document}
        return {name: text for name, text in own.items() if text} or None
    of_columns: Any = given
    if not isinstance(given, str):
        by_dataset = {name: value for name, value in given.items() if name in datasets}
        of_columns = {name: value for name, value in given.items() if name not in datasets}
        for value in (of_columns, *by_dataset.values()):
            _check_names(value, datasets)
        if by_dataset:
            filled = {name: _with_negatives(value) for name, value in by_dataset.items()}
            others = _with_negatives(of_columns)
            return {**filled, **dict.fromkeys({*datasets} - {*filled}, others), **({None: others} if others else {})}
    texts = dict.fromkeys(("query", "positive"), of_columns) if isinstance(of_columns, str) else of_columns
    model.prompts |= {"query": texts.get("query") or "", "document": texts.get("positive") or ""}
    return _with_negatives(of_columns)


def _with_negatives(value: Any) -> Any:
    """Prompts by column, in which negatives have that of the positives."""
    if isinstance(value, str) or "positive" not in value:
        return value
    return {"negative": value["positive"], **value}


def _check_names(value: Any, datasets: Collection[str]) -> None:
    unknown = [] if isinstance(value, str) else sorted(set(value) - set(COLUMNS))
    if unknown:
        raise ValueError(
            f"prompts name {', '.join(map(repr, unknown))}. Use the columns {', '.join(COLUMNS)} (for all negatives), "
            f"or the datasets, of which {', '.join(sorted(datasets)) or 'none'} has a name."
        )
