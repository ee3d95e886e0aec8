"""Pair files and datasets of pairs: load them.

What a cell holds is in `cells.py`. Columns and rows are checked in `checks.py`. Several datasets in one run are in
`mixture.py`, the paper's data in `sources.py`.
"""

import csv
import glob
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher

from btok_hf.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from btok_hf.training.cells import (
    as_stored,
    holds_json,
    stored_cells,
    with_features,
)
from btok_hf.training.checks import (
    AS_DATASET,
    MAX_PATH,
    NOT_EMBEDDED,
    OF_FILES,
    check_columns,
)

logger = logging.getLogger(__name__)

SCORES_AT_ONCE = 2**23  # cosines of queries and candidates, in an evaluation
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_pairs(
    source: str | Path,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Load pairs with the columns of `CondensationTrainer`.

    Args:
        source (`str` or `Path`): A parquet, JSON-lines or CSV file, the folder of a dataset, or the Hub id of one. A
            column holds texts, images (as the `datasets` feature, or as file paths), or dicts of both, which CSV
            cannot hold. Relative paths start at the folder of the file; what does not lie there is looked for from
            the current folder.
        name (`str`, *optional*): Configuration of a dataset, as in `datasets.load_dataset`. A file has none.
        split (`str`, *optional*): Split of a dataset, e.g. `validation` or `train[:10%]`. Default: `train`.
        revision (`str`, *optional*): Branch, tag or commit of a dataset on the Hub.
        columns (`dict[str, str]`, *optional*): The dataset's column for each column of pairs, e.g.
            `{"query": "anchor", "positive": "positive"}`. Others are left out. Default: all, with their own names.

    Returns:
        `datasets.Dataset`

    Raises:
        FileNotFoundError, ValueError: No such file, configuration or split, an unknown format, wrong columns, or an
            argument that a file or folder cannot have.
    """
    if not isinstance(source, (str, Path)):
        raise ValueError(f"load_pairs takes a path or an id of the Hub, got {type(source).__name__}. {AS_DATASET}")
    source = str(source)
    chosen = {key: value for key, value in {"name": name, "split": split, "revision": revision}.items() if value}
    check_source(source, **chosen)
    suffix = Path(source).suffix.lower()
    if suffix not in FORMATS:
        return _with_columns(load_dataset(source, **{"split": "train", **chosen}), columns, source)
    with _named_file(source):
        dataset = _read_file(source, FORMATS[suffix])
    dataset = _with_columns(dataset, columns, source)
    with _named_file(source):
        return _with_own_paths(dataset, Path(source).resolve().parent)


def check_source(source: str, **chosen: str) -> None:
    """Refuse a source or argument of `load_pairs` that is wrong whatever it holds. Nothing is loaded.

    Args:
        source (`str`): As in `load_pairs`.
        chosen (`str`): The `name`, `split` and `revision` that are given.

    Raises:
        FileNotFoundError, ValueError: No such file, an empty one, an unknown format, or an argument that a file or
            folder cannot have.
    """
    if Path(source).suffix.lower() in FORMATS:
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"Pair file {source!r} does not exist. Check the path; relative paths start at the current folder."
            )
        if chosen:
            raise ValueError(f"Pair file {source!r} has no {' or '.join(chosen)}: only datasets have. Leave it out.")
        if Path(source).stat().st_size == 0:
            raise ValueError(f"Pair file {source!r} is empty.")
    elif Path(source).is_file():
        raise ValueError(f"Pair file {source!r} has an unknown format. Use one of {', '.join(FORMATS)}.")
    elif Path(source).is_dir() and "revision" in chosen:
        raise ValueError(
            f"The folder {source!r} has no revision, got {chosen['revision']!r}. Only datasets of the Hub have."
        )


def _with_columns(dataset: Dataset, columns: Mapping[str, str] | None, source: str) -> Dataset:
    """The dataset with these columns of pairs, which are checked."""
    if columns is not None:
        if not isinstance(columns, Mapping):
            raise ValueError(f"columns of {source!r} must map columns of pairs to its own, got {columns!r}.")
        if missing := sorted(set(columns.values()) - set(dataset.column_names)):
            raise ValueError(
                f"{source!r} has no columns {missing}, which columns names. It has {dataset.column_names}."
            )
        if len(set(columns.values())) < len(columns):
            raise ValueError(f"columns of {source!r} names a column twice, got {dict(columns)}. Name each once.")
        names = {of: ours for ours, of in columns.items()}
        dataset = dataset.select_columns(list(names)).rename_columns(names)
    check_columns(dataset.column_names, source)
    return dataset


@contextmanager
def _named_file(source: str) -> Iterator[None]:
    try:
        yield
    except (DatasetsError, ValueError, OSError, csv.Error) as error:
        raise ValueError(f"Pair file {source!r} cannot be read ({error.__cause__ or error}). Correct it.") from error


def _read_file(source: str, kind: str) -> Dataset:
    dataset = load_dataset(kind, data_files=glob.escape(str(source)), split="train", **_options(source))
    plain = datasets.Features({name: _as_text(feature) for name, feature in dataset.features.items()})
    # A tuple, because `datasets` reads the file once for each part of a list of arguments.
    mixed = tuple(name for name, feature in plain.items() if holds_json(feature) and name not in NOT_EMBEDDED)
    if kind != "json" or (plain == dataset.features and not mixed):
        return dataset
    # The JSON reader takes texts such as 2026-11-26 for dates, and 0001 and null for values, in a column with dicts.
    options = {"path": str(Path(source).resolve()), "modified": Path(source).stat().st_mtime_ns, "mixed": mixed}
    return cast(Dataset, Dataset.from_generator(_json_rows, features=plain, gen_kwargs=options))


def _as_text(feature: Any) -> Any:
    """A feature without dates: pairs hold none, so what looks like one is a text. Of mixed dicts, all is JSON."""
    if isinstance(feature, datasets.Value) and feature.dtype.startswith(("timestamp", "date", "time")):
        return datasets.Value("string")
    if isinstance(feature, dict):
        return datasets.Json() if holds_json(feature) else {name: _as_text(part) for name, part in feature.items()}
    return datasets.List(_as_text(feature.feature)) if isinstance(feature, datasets.List) else feature


def _json_rows(path: str, modified: int, mixed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, or of one JSON list. `modified` makes a changed file another dataset.

    In the columns `mixed`, texts that are JSON themselves become dicts.
    """
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(1024).lstrip()
        file.seek(0)
        rows = json.load(file) if start.startswith("[") else (json.loads(line) for line in file if line.strip())
        for row in rows:
            yield row | {name: _not_json(row[name]) for name in mixed if name in row}


def _not_json(cell: Any) -> Any:
    """A cell whose texts `datasets` stores as texts. It would take those that are JSON for what they stand for."""
    if isinstance(cell, list):
        return [_not_json(part) for part in cell]
    is_json = isinstance(cell, str) and datasets.Json().encode_example(cell) == cell
    return {"text": cell} if is_json else cell


def _with_own_paths(dataset: Dataset, folder: Path) -> Dataset:
    """Pairs in which a relative path of a picture or video that lies beside the pair file is absolute."""
    columns = [name for name in dataset.column_names if name not in NOT_EMBEDDED]
    found: list[str] = []
    for name in columns:
        for cell in stored_cells(dataset, name):
            _resolve(cell, folder, found)
    if not found:
        return dataset
    # What `datasets` makes of a file is cached. It would not notice files that come or go.
    fingerprint = Hasher.hash((dataset._fingerprint, str(folder), found, version("btok-hf")))
    # Without decoding: `datasets` would encode each image again, a JPEG with loss.
    stored = as_stored(dataset)
    options = {"folder": folder, "columns": columns}
    resolved = stored.map(
        _resolve_row, fn_kwargs=options, features=stored.features, new_fingerprint=fingerprint, desc="Finding files"
    )
    return with_features(resolved, dataset.features)


def _resolve_row(row: dict[str, Any], folder: Path, columns: list[str]) -> dict[str, Any]:
    return {name: _resolve(row[name], folder, []) for name in columns}


def _resolve(value: Any, folder: Path, found: list[str], is_file: bool = False) -> Any:
    """A cell with the absolute paths of files that lie in `folder`. The names of these files are added to `found`.

    With `is_file`, every string is a path, whatever its suffix.
    """
    if isinstance(value, str):
        named = is_file or Path(value).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
        if not named or len(value) >= MAX_PATH or Path(value).is_absolute() or not (folder / value).is_file():
            return value
        found.append(value)
        return str(folder / value)
    if isinstance(value, list) and isinstance(next(filter(None, value), None), (str, dict)):  # no frames
        return [_resolve(part, folder, found, is_file) for part in value]
    if isinstance(value, dict) and value.get("bytes") is None:  # in a dict, text is never a path
        return {
            key: part if key == "text" else _resolve(part, folder, found, is_file=key in OF_FILES)
            for key, part in value.items()
        }
    return value


def _numbered(rows: Any) -> Iterator[list[str]]:
    """Rows of a CSV file; errors name the line."""
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(
            f"line {rows.line_num}: {error}. A text that begins with a quotation mark ends with one, right before the "
            "comma, and has them twice inside"
        ) from None  # `_named_file` would quote the cause


def _options(source: str) -> dict[str, Any]:
    """How to read a file. In CSV every cell is a text, also `007`, `NA` and `null`; an empty one is no value."""
    if Path(source).suffix.lower() != ".csv":
        return {}
    limit = csv.field_size_limit(2**31 - 1)  # of a process; pandas, which reads the file, has none
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)  # a text that goes on after its quotation mark has lost its end
            rows = _numbered(reader)
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                raise ValueError(f"its header names a column twice: {', '.join(columns)}")
            if "" in columns:
                raise ValueError(
                    f"its header has a column without a name: {','.join(columns)}. It is the index, if pandas wrote "
                    "the file: use to_csv(…, index=False)"
                )
            for row in rows:
                if len(row) > len(columns):  # pandas would take the first for the names of the rows
                    raise ValueError(
                        f"line {reader.line_num} has {len(row)} cells and the header {len(columns)}: texts with "
                        "commas need quotation marks"
                    )
    finally:
        csv.field_size_limit(limit)
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    return {"features": features, "keep_default_na": False, "na_values": [""]}
