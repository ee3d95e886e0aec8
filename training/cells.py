"""Cells of a dataset: how `datasets` stores them, and the inputs that they become.

`datasets` decodes images in other ways than `encode` and names no row in its errors. So datasets are read with their
files as they are stored, and the functions of `btok_hf` decode them.
"""

import copy
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Value
from torch.utils.data import ConcatDataset

from btok_hf.input_kinds import is_cell
from btok_hf.inputs import REMOTE
from btok_hf.media import read_image

TEXT_ROWS, MEDIA_ROWS = 1024, 64  # inputs that are embedded at a time; those with media are decoded for it


def as_stored(dataset: Dataset) -> Dataset:
    """A copy of a dataset whose images and videos are read as their files: dicts of `bytes` and `path`.

    The rows are not copied. A dataset with a transform keeps it, because its rows are made by the transform.
    """
    if dataset.format["type"] == "custom":
        return copy.copy(dataset)
    names = dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]
    plain = dataset.select_columns(names).with_format(None)
    return with_features(plain, Features({name: _stored(part) for name, part in dataset.features.items()}))


def with_features(dataset: Dataset, features: Features) -> Dataset:
    """A copy of a dataset whose Arrow values, which are shared, have other features of the same Arrow types."""
    changed = dataset.with_format(None)
    changed.info.features = Features({name: features[name] for name in dataset.column_names})
    return changed


def _stored(feature: Any) -> Any:
    """The feature of a column as Arrow stores it, without decoding."""
    if isinstance(feature, (datasets.Image, datasets.Video)):
        return {"bytes": Value("binary"), "path": Value("string")}
    if isinstance(feature, dict):
        return {name: _stored(part) for name, part in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return replace(feature, feature=_stored(feature.feature))
    return feature


class NumberedRows(torch.utils.data.Dataset):
    """Rows with their number in their own dataset as `row`, so that errors of the collator can name them.

    Args:
        rows (`Dataset` or `ConcatDataset`): One dataset, or several behind each other.
    """

    def __init__(self, rows: Dataset | ConcatDataset) -> None:
        self.parts: Sequence[Any] = rows.datasets if isinstance(rows, ConcatDataset) else [rows]
        self.starts = list(accumulate(map(len, self.parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, which Arrow reads at once."""
        rows = []
        for part, group in groupby(indices, lambda index: bisect_right(self.starts, index) - 1):
            numbers = [index - self.starts[part] for index in group]
            read = self.parts[part].__getitems__(numbers)
            rows += [{**row, "row": number} for row, number in zip(read, numbers)]
        return rows


def stored_cells(dataset: Dataset, name: str) -> Iterator[Any]:
    """The cells of a column, for checks: strings as they are, and `True` in place of each file or number.

    `False` stands for a file of 0 bytes. So the contents of files are not read.
    """
    column = dataset.select_columns([name])
    if holds_json(dataset.features[name]):
        yield from (row[name] for row in column)
        return
    for part in column.with_format("arrow").iter(batch_size=10_000):
        for chunk in part[name].chunks:
            yield from _names_alone(chunk).to_pylist()


def holds_json(feature: Any) -> bool:
    """Whether Arrow stores cells of a column, or parts of them, as JSON, as it does with dicts of different keys."""
    parts = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return isinstance(feature, datasets.Json) or any(holds_json(part) for part in parts if part is not None)


def _names_alone(array: Any) -> Any:
    """An Arrow array with its strings, and with booleans for all other values, as `stored_cells` gives them."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        return _names_alone(array.cast(pa.list_(kind.value_field)))
    if pa.types.is_struct(kind):
        fields = [_names_alone(array.field(index)) for index in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, [field.name for field in kind], mask=array.is_null())
    if pa.types.is_null(kind):
        return array
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.greater(pc.binary_length(array), 0)
    if not holds_strings(kind):
        return pc.if_else(array.is_valid(), True, pa.scalar(None, pa.bool_()))
    # A list that is null becomes an empty list.
    return type(array).from_arrays(array.offsets, _names_alone(array.values)) if _is_list(kind) else array


def holds_strings(kind: Any) -> bool:
    """Whether values of an Arrow type are strings, or have some."""
    if pa.types.is_struct(kind) or _is_list(kind):
        return any(holds_strings(kind.field(index).type) for index in range(kind.num_fields))
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def as_input(cell: Any) -> Any:
    """A cell of a dataset as an input of `encode`.

    Arrow gives all dicts of a column the same keys; those with `None` or an empty list are dropped. Images and frames
    come as lists of numbers and become arrays. Files stay as they are: `check_input` decodes them, and its errors name
    the input.
    """
    if isinstance(cell, (list, tuple)):
        return _as_array(cell) if _is_numbers(cell) else [as_input(part) for part in cell]
    if not isinstance(cell, dict):
        return cell
    if is_cell(cell):
        path = cell["path"]
        if cell["bytes"] is None and path and "://" in path and not path.startswith(REMOTE):
            with fsspec.open(path, "rb") as file:  # as `datasets` names files on the Hub or in archives
                return {"bytes": file.read(), "path": path}
        return cell
    if "array" in cell:  # a video
        return {**{key: part for key, part in cell.items() if part is not None}, "array": _as_array(cell["array"])}
    filled = {key: part for key, part in cell.items() if not (part is None or (isinstance(part, list) and not part))}
    return {key: as_input(part) for key, part in filled.items()}


def _is_numbers(value: Any) -> bool:
    """Whether this is an array as Arrow stores it, in nested lists."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float))


def _as_array(numbers: Any) -> np.ndarray:
    array = np.asarray(numbers)
    if array.dtype.kind == "i" and array.size and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)  # Python's integers, in an eighth of the memory
    return array


def decode_cell(cell: Any) -> Any:
    """A cell of a dataset as an input whose images are decoded, as models of every kind take it.

    Files of videos, and what cannot be decoded, stay as they are.
    """
    return _decoded(as_input(cell))


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    if is_cell(value):
        try:
            return read_image(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))
        except (ValueError, OSError, TypeError):
            return value
    return {key: part if key == "video" and _is_encoded(part) else _decoded(part) for key, part in value.items()}


def _is_encoded(part: Any) -> bool:
    """Whether this is a file as `datasets` stores it, or a list of them."""
    parts = part if isinstance(part, list) else [part]
    return bool(parts) and all(isinstance(each, dict) and is_cell(each) for each in parts)


class StoredInputs(list):
    """Inputs that stay encoded in memory. An image is decoded each time that it is read from the list."""

    def __getitem__(self, index: Any) -> Any:
        return _decoded(super().__getitem__(index))

    def __iter__(self) -> Iterator[Any]:
        return map(_decoded, super().__iter__())
