"""Model, columns and rows, checked before the training: an error in a later epoch would cost the hours before it.

What a cell may hold is in `data.py`, how it is read in `btok_hf/inputs.py`.
"""

import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import repeat
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from btok_hf.adapters import check_trainable
from btok_hf.content import content_hash
from btok_hf.input_kinds import INPUT_KEYS, is_cell, is_media_path, is_messages, text_of
from btok_hf.inputs import REMOTE, shown
from btok_hf.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.cells import as_stored, holds_strings, stored_cells
from btok_hf.training.condensation_config import CONDENSE, CondensationConfig
from btok_hf.training.condensation_loss import CondensationLoss

logger = logging.getLogger(__name__)

MAX_PATH = 255  # characters: longer strings are texts
HELD_OUT = re.compile(r"(test|valid|validation|val|dev|eval|evaluation)([_.-]|$)")  # names of splits
OF_FILES = ("image", "video", "url", "path")  # keys of a dict, or of a part of a chat message, that name a file
AS_DATASET = (
    "Make a dataset with load_pairs(path), datasets.Dataset.from_list(rows) or Dataset.from_pandas(frame, "
    "preserve_index=False)."
)
SINGLE = (datasets.Value, datasets.ClassLabel, datasets.Json)
MEDIA = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
NOT_EMBEDDED = ("target", "group", "negative_groups", "dataset_name")  # columns of pairs


def check_model(model: Any, loss: Any, args: Any) -> BTokSentenceTransformer:
    """The model, if `CondensationTrainer` can train it with this loss (`None`: its own) and with these arguments.

    Raises `ValueError`.
    """
    if not isinstance(model, BTokSentenceTransformer):
        raise ValueError(
            f"CondensationTrainer trains a BTokSentenceTransformer, got {type(model).__name__}. "
            "Load the model with btok_hf.BTokSentenceTransformer(path)."
        )
    if len(model) > 1:
        raise ValueError(
            f"The model has {len(model)} modules, but only the first would be saved. Remove the others; for fewer "
            "dimensions set matryoshka_dims."
        )
    backbone: Any = model.transformer.model
    if not isinstance(backbone, PreTrainedModel):
        raise ValueError(
            f"The model holds a {type(backbone).__name__}, whose weights could not be saved in their names. Leave the "
            "backbone as it is: adapters are added by peft_config of the trainer or model.add_adapter, and not by "
            "get_peft_model; compiling is torch_compile of the arguments."
        )
    if loss is not None and not isinstance(loss, CondensationLoss):
        raise ValueError(
            f"loss must be a CondensationLoss, got {(loss if isinstance(loss, type) else type(loss)).__name__}. Leave "
            "it out; for Matryoshka embeddings set matryoshka_dims. Other losses train with the "
            "SentenceTransformerTrainer of Sentence-Transformers."
        )
    if loss is not None and loss.condensation_weight and not getattr(args, "condensation_weight", True):
        raise ValueError(
            f"The loss has condensation_weight={loss.condensation_weight}, but that of args is 0, so that no batch "
            "would have texts to generate. Set both to the same value."
        )
    for adapters in getattr(backbone, "peft_config", {}).values():
        check_trainable(adapters)
    dropout = getattr(backbone.config.get_text_config(), "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"attention_dropout in config.json must be 0, got {dropout}: it has no effect on packed attention, and "
            "GradCache could not repeat it. Load the model with model_kwargs={'attention_dropout': 0.0}, or correct "
            "the file."
        )
    return model


def checked_datasets(part: str, given: Any, args: Any) -> Any:
    """The dataset or datasets of a trainer, checked row by row.

    They are copies, because Sentence-Transformers changes the format of the datasets that it gets. Files are not
    decoded in them (`as_stored`).

    Args:
        part (`str`): `train_dataset` or `eval_dataset`.
        given (`Dataset` or `dict[str, Dataset]`, *optional*): What the user gave.
        args (`CondensationConfig`): The arguments of the run.

    Raises:
        ValueError: As in `check_columns`, `check_rows` and `check_targets`; splits to evaluate on among the training
            data.
    """
    if part == "train_dataset" and isinstance(given, DatasetDict) and any(map(HELD_OUT.match, given)):
        raise ValueError(
            f"train_dataset has the splits {', '.join(given)}, and each would be trained on. Give one of them, as "
            "dataset['train'], or a plain dict of the datasets to train on."
        )
    parts = given if isinstance(given, dict) else {part: given}
    copies = {name: as_stored(data) if isinstance(data, Dataset) else data for name, data in parts.items()}
    for name, dataset in copies.items():
        if dataset is not None and not hasattr(dataset, "column_names"):
            raise ValueError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}. {AS_DATASET}")
        if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":  # rows are made on the way
            continue
        of = name if isinstance(given, dict) else None
        check_columns(dataset.column_names, of)
        check_rows(dataset, name)
        if isinstance(args, CondensationConfig) and args.condensation_weight:
            sides = CONDENSE[args.condense_for(of)]
            check_targets(dataset, name, [generated for _, generated in sides])
    return copies if isinstance(given, dict) else copies[part]


def check_columns(columns: Collection[str], dataset_name: str | None = None) -> list[str]:
    """Refuse columns that training cannot use. Returns `query`, `positive` and the negatives, in this order."""
    where = "The dataset" if dataset_name is None else f"Dataset {dataset_name!r}"
    negatives = negative_columns(columns)
    unknown = sorted(set(columns) - {"query", "positive", *negatives, *NOT_EMBEDDED})
    missing = sorted({"query", "positive"} - set(columns))
    if unknown or missing:
        problems = [f"{problem} {names}" for problem, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(
            f"{where} has the columns {sorted(columns)}: {'; '.join(problems)}. Training takes query, positive, "
            "negative or negative_1, negative_2, … (each a text, an image, or a dict with image, video and text), "
            "negatives (a list of them), target (a text to generate instead of the other side's own), group (rows of "
            "one group answer each other's queries) and negative_groups (a list of the groups of negatives). "
            "Choose them with columns= of load_pairs, or rename them with dataset.rename_column and drop the rest "
            "with dataset.remove_columns."
        )
    if "negative_groups" in columns and "negatives" not in columns:
        raise ValueError(
            f"{where} has a column negative_groups, but not negatives, whose groups it lists. Give it negatives, or "
            "drop it with dataset.remove_columns."
        )
    return ["query", "positive", *negatives]


def negative_columns(columns: Collection[str]) -> list[str]:
    """The columns of hard negatives."""
    embedded = (name for name in columns if name not in NOT_EMBEDDED)
    return [name for name in embedded if re.fullmatch(r"negatives|negative(_\d+)?", name)]


def first_rows(parts: Dataset | dict[str, Dataset] | None) -> list[dict[str, Any]]:
    """The first row of a dataset, or of each dataset of a dict, with its name."""
    if parts is None:
        return []
    rows = []
    for name, dataset in (parts if isinstance(parts, dict) else {None: parts}).items():
        where = "The dataset" if name is None else f"Dataset {name!r}"
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{where} is streamed ({type(dataset).__name__}), but batches are drawn from rows by number. Load it "
                "without streaming: datasets keeps rows in Arrow files on disk and not in memory."
            )
        if len(dataset) == 0:
            raise ValueError(f"{where} has no rows.")
        rows.append({**({} if name is None else {"dataset_name": name}), **dataset[0]})
    return rows


def most_negatives(parts: Dataset | dict[str, Dataset] | None) -> int:
    """The most negatives of a row, at least 1: the largest side of a batch has this many times its rows."""
    most = 1
    for dataset in parts.values() if isinstance(parts, dict) else [parts]:
        names = [] if dataset is None else dataset.column_names
        columns = sum(name != "negatives" for name in negative_columns(names))
        cells = stored_cells(dataset, "negatives") if dataset is not None and "negatives" in names else []
        most = max(most, columns + max((len(cell) for cell in cells if cell), default=0))
    return most


def check_rows(dataset: Dataset, where: str, required: Collection[str] = ("query", "positive")) -> None:
    """Raise `ValueError` for the first row with an empty query, positive or group, or a file that is not there.

    Files that are stored in the dataset are not decoded.

    Args:
        dataset (`Dataset`): Rows. Those that a transform makes are not checked.
        where (`str`): Names the dataset in errors.
        required (`Collection[str]`): The columns whose cells must not be null.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":  # rows are made on the way
        return
    arrow = dataset.with_format("arrow")
    if "group" in dataset.column_names and (row := _meaningless_group(arrow["group"])) >= 0:
        raise ValueError(
            f"Row {row} of {where}: its group is empty or not a number, and all such rows would be one group. Set it "
            "to None, for a row without a group."
        )
    if {"negatives", "negative_groups"} <= set(dataset.column_names):
        groups = (group for part in arrow["negative_groups"].chunks for group in part.to_pylist())
        for row, (cells, own) in enumerate(zip(stored_cells(dataset, "negatives"), groups)):
            check_negatives(cells, own, f"Row {row} of {where}")
    there: dict[str, bool] = {}  # by path
    # `check_columns` names those that are unknown or missing.
    embedded = ("query", "positive", *negative_columns(dataset.column_names))
    for name in (name for name in dataset.column_names if name in embedded):
        lost = _LostFiles(where, name)
        feature = dataset.features[name]
        feature = getattr(feature, "feature", feature) if name == "negatives" else feature
        single = isinstance(feature, SINGLE)  # no images as lists of numbers
        for row, cell in enumerate(stored_cells(dataset, name)):
            values = cell if isinstance(cell, list) and name == "negatives" else [cell]
            # A list that is null is an empty one here.
            values = values if name in required else [value for value in values if value not in (None, [])]
            if name != "negatives" and isinstance(cell, list) and cell and not is_messages(cell):
                raise ValueError(
                    f"Row {row} of {where}: its {name} is a list, which is no input. A column of lists of hard "
                    'negatives is called negatives; several parts of one input are given as {"text": […]}, '
                    '{"image": […]} or {"video": […]}.'
                )
            problem = next(filter(None, (_problem(value, single) for value in values)), None)
            for path in _paths(values):
                if path not in there:
                    there[path] = os.path.isfile(path)
                if not there[path] and problem is None:
                    problem = f"names {path!r}, a file that does not exist"
            if problem:
                raise ValueError(
                    f"Row {row} of {where}: its {name} {problem}. Correct or remove the row; a text that looks like a "
                    'path is given as {"text": …}.'
                )
            lost.look(row, values)
        lost.end()


class _LostFiles:
    """Texts of a column that have several words, end as names of media do, and name no file that exists."""

    def __init__(self, where: str, column: str) -> None:
        self.where, self.column = where, column
        self.texts, self.count, self.first = 0, 0, ""

    def look(self, row: int, values: Iterable[Any]) -> None:
        """Count the texts of a row, and those that seem to be files."""
        for text in (value for value in values if isinstance(value, str)):
            if len(text) > MAX_PATH or not text.rstrip()[-8:].lower().endswith(MEDIA):
                self.texts += 1
            elif not is_media_path(text) and not os.path.isfile(text):
                self.count += 1
                self.first = self.first or f"Row {row} of {self.where}: its {self.column} {text!r}"

    def end(self) -> None:
        """Raise `ValueError` if a column of files has some that do not exist. Between other texts, warn of them."""
        if self.count and not self.texts:
            raise ValueError(
                f"{self.first} looks like a file, which does not exist, among {self.count} like it. Correct the "
                'paths; a text that looks like a path is given as {"text": …}.'
            )
        if self.count:
            logger.warning(
                f"{self.first} is taken for a text. If it is a file, correct its path: it does not exist. Texts "
                f"like it in this column: {self.count}."
            )


def check_negatives(negatives: Any, groups: Any, where: str) -> None:
    """Refuse negatives that are no list, and another number of groups than of negatives. A row may have neither."""
    if negatives is not None and not isinstance(negatives, (list, tuple)):
        raise ValueError(
            f"{where}: 'negatives' must be a list of inputs, got {type(negatives).__name__}. Name a column of single "
            "negatives 'negative' (in CSV: negative_1, negative_2, …)."
        )
    if groups is not None and (not isinstance(groups, list) or len(groups) != len(negatives or ())):
        given = f"{len(groups)} groups" if isinstance(groups, list) else repr(groups)
        raise ValueError(
            f"{where}: negative_groups must be a list with a group or None for each of its {len(negatives or ())} "
            f"negatives, got {given}."
        )


def group_hash(group: Any) -> int:
    """A hash of a group. Numbers and their texts are equal: 1, 1.0 and "1", as formats of files store them."""
    whole = isinstance(group, float) and group.is_integer()
    return content_hash({"group": int(group) if whole else group})


def _meaningless_group(groups: pa.ChunkedArray) -> int:
    """The first row whose group is NaN or an empty text; -1 if there is none."""
    if pa.types.is_floating(groups.type):
        return pc.index(pc.is_nan(groups), True).as_py()
    if pa.types.is_nested(groups.type) or not holds_strings(groups.type):
        return -1
    return pc.index(pc.utf8_trim_whitespace(groups), "").as_py()


def check_targets(dataset: Dataset, where: str, generated: Collection[str]) -> None:
    """Raise `ValueError` for the first row without a text to generate.

    Args:
        dataset (`Dataset`): Rows.
        where (`str`): Names the dataset.
        generated (`Collection[str]`): The columns whose text is generated, if a row has no `target`.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":  # rows are made on the way
        return
    for column in [name for name in dataset.column_names if name in generated]:
        given = stored_cells(dataset, "target") if "target" in dataset.column_names else repeat(None)
        for row, (cell, target) in enumerate(zip(stored_cells(dataset, column), given)):
            target_text(cell, target, column, f"Row {row} of {where}")


def target_text(cell: Any, target: Any, column: str, where: str) -> str:
    """The text that a row generates: its target, or else the text of this cell of `column`; raises `ValueError`."""
    text = text_of(cell) if target is None else text_of(target, is_text=True)
    if text is None and target is not None:
        raise ValueError(f"{where}: a target must be a text, got {shown(target)}. Correct the column target.")
    if text is None:
        file = f" (it names the file {cell!r})" if isinstance(cell, str) else ""
        raise ValueError(
            f"{where}: condensation generates the text of its {column}, which has none{file}. Set condense to the "
            "other side or to 'none' for this dataset, or add a text column 'target'."
        )
    return text


def _problem(value: Any, single: bool) -> str | None:
    """What is wrong with a value of `stored_cells`, apart from files that do not exist. `single`: it is no list."""
    if _is_empty(value):
        return "is empty"
    if _has_empty_file(value):
        return "holds a file of 0 bytes"
    if single and isinstance(value, (bool, int, float)):
        return "is a number or bytes, and neither a text nor a file (a number is written as a text)"
    if isinstance(value, str) and value != value.strip() and is_media_path(value) and not os.path.isfile(value):
        return f"has white space around a path or address, {value!r}"
    if isinstance(value, str) and value.startswith('{"') and _is_input(value):
        return "is a dict written as a text, as CSV files have it (write JSON lines or parquet, with dicts)"
    return None


def _is_input(text: str) -> bool:
    """Whether a text is an input dict in JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() <= set(INPUT_KEYS)


def _is_empty(value: Any) -> bool:
    """Whether a value of `stored_cells` has no content but white space."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return not (value.strip() if isinstance(value, str) else value)


def _has_empty_file(value: Any) -> bool:
    """Whether a value of `stored_cells` has a file of 0 bytes."""
    if isinstance(value, dict):
        return (is_cell(value) and value["bytes"] is False) or any(map(_has_empty_file, value.values()))
    return isinstance(value, list) and any(map(_has_empty_file, value))


def _paths(value: Any, is_file: bool = False) -> Iterator[str]:
    """Files that a value of `stored_cells` names. With `is_file`, every string is a path, whatever it looks like."""
    if isinstance(value, str):
        if not value.startswith(REMOTE) and (is_file or is_media_path(value)):
            yield value
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part, is_file)
    elif isinstance(value, dict) and is_cell(value):
        # hf://… and zip://… are paths on the Hub and in archives.
        if value["bytes"] is None and value["path"] and "://" not in value["path"]:
            yield value["path"]
    elif isinstance(value, dict):
        for key in OF_FILES:
            yield from _paths(value.get(key), is_file=True)
        if isinstance(value.get("content"), list):
            yield from _paths(value["content"])
