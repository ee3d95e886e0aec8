"""The datasets of a training run: what `train_files` may be, and how it becomes datasets, weights and sides.

One pair file is loaded in `data.py`, one source of the paper in `sources.py`. Batches are drawn in `sampler.py`.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datasets import Dataset

from btok_hf.training.condensation_config import CONDENSE, CondensationConfig
from btok_hf.training.data import FORMATS, check_source, load_pairs
from btok_hf.training.sources import SOURCES, load_source

# A file, a Hub id or a source's name; a dict of it with other keys; `None`: the dataset's name says it.
Entry = str | dict[str, Any] | None
OF_DATASETS = ("name", "split", "revision", "columns")  # arguments of load_pairs


class Mixture(NamedTuple):
    """The datasets of a training run, and what is known about each, by dataset name.

    Args:
        datasets (`dict[str, Dataset]`): The pairs.
        weights (`dict[str, float]`, *optional*): Weights to draw them with; `None` if no entry has one.
        condense (`dict[str, str]`): Sides to generate: of sources, and of entries that name one.
        sources (`dict[str, str]`): Where they come from, for the card: a file or a Hub id.
    """

    datasets: dict[str, Dataset]
    weights: dict[str, float] | None
    condense: dict[str, str]
    sources: dict[str, str]


def load_mixture(train_files: str | Mapping[str, Entry], root: Path | str | None = None) -> Mixture:
    """Load the datasets of a training run.

    Args:
        train_files (`str` or `dict`): A pair file or Hub id as in `load_pairs`, or a name in `SOURCES`. Several are a
            mapping from the dataset's name to one of them or to `{"file": …, "weight": …, "condense": …}`, as a dict,
            as JSON or in a YAML file. `file` may be omitted if the dataset's name is that of a source. An entry may
            also have `name`, `split`, `revision` and `columns`, as in `load_pairs`.
        root (`str` or `Path`, *optional*): As in `load_source`.

    Returns:
        `Mixture`

    Raises:
        FileNotFoundError, ValueError: As in `load_source` and `load_pairs`; a malformed entry; weights for some
            entries only.
    """
    entries = read_mixture(train_files)
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(
            "train_files must be a file, a Hub id, a source, or a mapping from dataset names to them, "
            f"got {entries!r}."
        )
    files: dict[str, str] = {}
    weights: dict[str, float] = {}
    condense: dict[str, str] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        entry = dict(entry) if isinstance(entry, dict) else {"file": entry}
        files[name] = file = entry.pop("file", None) or name
        if not isinstance(file, str):
            raise ValueError(f"Dataset {name!r}: a file must be a text, got {file!r}.")
        if file in SOURCES:
            condense[name] = SOURCES[file].condense
        elif Path(file).suffix.lower() not in FORMATS and "/" not in file and not Path(file).exists():
            raise ValueError(
                f"Dataset {name!r}: {file!r} is not a pair file, Hub id or known source. Known sources are "
                f"{', '.join(SOURCES)}."
            )
        if (weight := entry.pop("weight", None)) is not None:
            weights[name] = weight
        if (side := entry.pop("condense", None)) is not None:
            if side not in CONDENSE:
                raise ValueError(f"Dataset {name!r}: condense must be one of {', '.join(CONDENSE)}, got {side!r}.")
            condense[name] = side
        chosen[name] = {key: entry.pop(key) for key in OF_DATASETS if key in entry}
        for key, value in chosen[name].items():
            if key != "columns" and not isinstance(value, str | None):  # YAML reads 1 and 12e3 as numbers
                raise ValueError(f"Dataset {name!r}: {key} must be a text, got {value!r}. Put it in quotation marks.")
        if entry:
            raise ValueError(
                f"Dataset {name!r} has unknown keys {sorted(entry)}. Known are file, weight, condense, "
                f"{', '.join(OF_DATASETS)}."
            )
        if chosen[name] and file in SOURCES:
            raise ValueError(
                f"Dataset {name!r} is the source {file!r}, which has no {', '.join(chosen[name])}: its format is "
                "known. Leave them out."
            )
    if weights and (missing := sorted(set(files) - set(weights))):
        raise ValueError(
            f"Some datasets have a weight, but {', '.join(missing)} have none. Give all a weight, or none."
        )
    for name, file in files.items():  # all of them before the first is loaded, which may take long
        if file not in SOURCES:
            check_source(file, **{key: value for key, value in chosen[name].items() if value and key != "columns"})
    datasets = {
        name: load_source(file, root) if file in SOURCES else load_pairs(file, **chosen[name])
        for name, file in files.items()
    }
    sources = {name: SOURCES[file].repo if file in SOURCES else file for name, file in files.items()}
    return Mixture(datasets, weights or None, condense, sources)


def read_mixture(files: str | Mapping[str, Entry]) -> Mapping[str, Entry]:
    """`train_files` as a mapping from dataset name to entry. Nothing is loaded."""
    if not isinstance(files, str):
        return files
    if files.lstrip().startswith("{"):
        return json.loads(files, object_pairs_hook=_as_dict)
    if Path(files).suffix in (".yaml", ".yml"):
        own = Path(__file__).parent / "recipes" / files  # a recipe that comes with this library
        path = next((path for path in (Path(files), own) if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"Mixture file {files!r} does not exist, here or among the library's recipes.")
        try:
            text = path.read_text("utf-8")
            _check_names(yaml.compose(text, yaml.SafeLoader))
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"Mixture file {files!r} is not YAML ({error}).") from error
    return {Path(os.path.abspath(files)).stem: files}  # of "." too


def _as_dict(entries: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of two entries with one name, the first would be dropped."""
    _refuse_twins(name for name, _ in entries)
    return dict(entries)


def _check_names(node: yaml.Node | None) -> None:
    """Refuse a name that stands twice in a mapping of YAML, before entries are merged."""
    if isinstance(node, yaml.MappingNode):
        _refuse_twins(name.value for name, _ in node.value if not name.tag.endswith(":merge"))
    if isinstance(node, yaml.CollectionNode):
        for part in itertools.chain.from_iterable(one if isinstance(one, tuple) else [one] for one in node.value):
            _check_names(part)


def _refuse_twins(names: Iterable[Any]) -> None:
    for name, count in Counter(map(str, names)).items():
        if count > 1:
            raise ValueError(f"The mixture has {name!r} twice in one mapping. Leave one out, or rename it.")


def condense_of(datasets: Iterable[str], chosen: str | dict[str, str] | None, own: dict[str, str]) -> dict[str, str]:
    """The side to generate for each dataset: the user's choice first, then that of its source or entry.

    Args:
        datasets (`Iterable[str]`): Names of the datasets.
        chosen (`str` or `dict[str, str]`): `CondensationConfig.condense`. Its default counts as no choice.
        own (`dict[str, str]`): Sides of sources and entries, by dataset name.

    Raises:
        ValueError: `chosen` names a dataset that does not exist.
    """
    if isinstance(chosen, dict):
        datasets = list(datasets)
        if unknown := sorted(set(chosen) - set(datasets)):
            raise ValueError(f"condense names {', '.join(unknown)}, but the datasets are {', '.join(datasets)}.")
        return own | chosen
    assert chosen is not None  # CondensationConfig refuses it
    default = chosen == CondensationConfig.condense
    return dict.fromkeys(datasets, chosen) | (own if default else {})
