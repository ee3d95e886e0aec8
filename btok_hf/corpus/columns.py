"""The columns of tables that are copied (`--columns`): the types in which they are stored, and their cells."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from btok_hf.corpus.records import NOT_PYTHON, cells_of

# Types in which values of JSON are stored. Lists and objects are kept as JSON text.
JSON_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
TEXTS = (pa.string(), pa.large_string())
ALIKE = ({"string", "large_string"}, {"binary", "large_binary"})  # they hold the same values


def stored_type(kind: pa.DataType) -> pa.DataType:
    """The type of a parquet column in units: the same values, in a type that a LanceDB table takes.

    Args:
        kind (`pyarrow.DataType`): The type in the table.

    Returns:
        `pyarrow.DataType`: The same. But of categories that of their values, of views and JSON that of plain strings,
        of decimals of 32 and 64 bits that of 128, and of lists of one length a list of any, unless they hold numbers.

    Raises:
        ValueError: Times in a zone that is not known, or views of lists, of which pyarrow cannot read parts.
    """
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        raise ValueError(f"it is {kind}, of which pyarrow cannot read parts")
    if pa.types.is_timestamp(kind):
        try:
            pa.scalar(0, kind).as_py()
        except NOT_PYTHON as error:
            raise ValueError(f"its zone {kind.tz!r} is not known") from error
    if pa.types.is_dictionary(kind):
        return stored_type(kind.value_type)
    if pa.types.is_string_view(kind) or isinstance(kind, pa.JsonType):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_within(field.type)) for field in kind])
    if pa.types.is_map(kind):
        fields = (kind.key_field, kind.item_field)
        return pa.map_(*(field.with_type(_within(field.type)) for field in fields), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind) and not _is_number(kind.value_type):
        return pa.list_(kind.value_field.with_type(_within(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_within(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_within(kind.value_type)))
    return kind


def _within(kind: pa.DataType) -> pa.DataType:
    """`stored_type` of a type within another, where LanceDB takes categories as they are."""
    return kind if pa.types.is_dictionary(kind) else stored_type(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def kept_type(kind: pa.DataType, before: str) -> pa.DataType | None:
    """The type that a column of a corpus keeps when tables are added.

    Args:
        kind (`pyarrow.DataType`): Its type with the tables that there are now.
        before (`str`): Its type in the corpus.

    Returns:
        `pyarrow.DataType`: The type in the corpus, or `None` if it does not hold the values that there are now.
    """
    if before == str(kind):
        return kind
    if before == "string" and pa.types.is_primitive(kind):
        return pa.string()
    if before == "double" and pa.types.is_integer(kind):
        return pa.float64()
    return pa.type_for_alias(before) if {before, str(kind)} in ALIKE else None


def wider(kind: pa.DataType, value: Any) -> pa.DataType:
    """The type of a column once it holds one more value of JSON. Mixed values are kept as JSON text."""
    if value is None:
        return kind
    fits = type(value) is not int or -(2**63) <= value < 2**63
    return widest((kind, JSON_TYPES.get(type(value), pa.string()) if fits else pa.string()))


def widest(kinds: Iterable[pa.DataType]) -> pa.DataType:
    """The type that holds values of all these types of JSON."""
    found = set(kinds) - {pa.null()}
    if len(found) > 1:
        return pa.float64() if found == {pa.int64(), pa.float64()} else pa.string()
    return found.pop() if found else pa.null()


def json_cells(record: Mapping[str, Any], kinds: Mapping[str, pa.DataType]) -> dict[str, pa.Array] | str:
    """The cells of a row of JSON or CSV as arrays of one.

    Args:
        record (`Mapping`): The row.
        kinds (`Mapping[str, pyarrow.DataType]`): The types of the columns.

    Returns:
        `dict[str, pyarrow.Array]`, or a `str` that says what does not fit.
    """
    cells = {}
    for name, kind in kinds.items():
        try:
            cells[name] = _json_array(record.get(name), kind)
        except (pa.ArrowException, TypeError, *NOT_PYTHON) as error:
            return _not_stored(name, kind, error)
    return cells


def _json_array(value: Any, kind: pa.DataType) -> pa.Array:
    if kind in TEXTS and value is not None:
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        value = value.encode("utf-8", "replace").decode()  # lone surrogates
    if kind == pa.float64() and value is not None:
        value = float(value)  # Arrow refuses integers that a float rounds
    return pa.array([value], kind)


def parquet_cells(batch: pa.RecordBatch, kinds: Mapping[str, pa.DataType]) -> list[dict[str, pa.Array] | str]:
    """The cells of rows of parquet as arrays of one, in other types.

    Args:
        batch (`pyarrow.RecordBatch`): The rows.
        kinds (`Mapping[str, pyarrow.DataType]`): The types of the columns.

    Returns:
        List of `dict[str, pyarrow.Array]`; of a row that does not fit, a `str` that says why.
    """
    if not kinds:
        return [{} for _ in range(len(batch))]
    arrays = {}
    for name, kind in kinds.items():
        try:
            # Of large integers a float keeps the first digits; other values that do not fit are errors.
            arrays[name] = batch.column(name).cast(kind, safe=not pa.types.is_floating(kind))
        except pa.ArrowException as error:
            if len(batch) == 1:
                return [_not_stored(name, kind, error)]
            return [cells for index in range(len(batch)) for cells in parquet_cells(batch.slice(index, 1), kinds)]
    readable = cells_of(pa.RecordBatch.from_pydict(arrays))  # searching could not show what Python cannot hold
    return [
        cells if isinstance(cells, str) else {name: array.slice(index, 1) for name, array in arrays.items()}
        for index, cells in enumerate(readable)
    ]


def _not_stored(name: str, kind: pa.DataType, error: Exception) -> str:
    return f"its column {name} cannot be stored as {kind} ({error})"
