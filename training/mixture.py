"""The datasets of a training run: what `train_files` may be, and the pairs, weights and sides that it stands for."""

import json
from pathlib import Path

import yaml

from btok_hf.training.condensation_config import CONDENSE, CondensationConfig
from btok_hf.training.data import FORMATS, load_pairs
from btok_hf.training.sources import SOURCES, load_source


def load_mixture(entries, root=None):
    """Load the datasets of a training run.

    Args:
        entries (`str` or `dict`): A pair file or Hub id as in `load_pairs`, or a name in `SOURCES`; or several, as a
            mapping from the dataset's name to one of them or to `{"file": …, "weight": …, "condense": …}`. `file` may
            be left out where the dataset's name is a source's.
        root (`str`, *optional*): As in `load_source`.

    Returns:
        `tuple`: The datasets by name; their weights by name, `None` if none is given; and by name the sides to
        generate, of the sources and of the entries that name one.

    Raises:
        FileNotFoundError, ValueError: As in `load_source` and `load_pairs`; a malformed entry; weights for some
            entries only.
    """
    if isinstance(entries, str):
        entries = {Path(entries).stem: entries}
    files, weights, condense = {}, {}, {}
    for name, entry in entries.items():
        entry = dict(entry) if isinstance(entry, dict) else {"file": entry}
        files[name] = file = entry.pop("file", None) or name
        if file in SOURCES:
            condense[name] = SOURCES[file].condense
        elif Path(file).suffix.lower() not in FORMATS and "/" not in file and not Path(file).exists():
            raise ValueError(
                f"Dataset {name!r}: {file!r} is no pair file, Hub id or known source. Known are {', '.join(SOURCES)}."
            )
        if (weight := entry.pop("weight", None)) is not None:
            weights[name] = weight
        if (side := entry.pop("condense", None)) is not None:
            if side not in CONDENSE:
                raise ValueError(f"Dataset {name!r}: condense must be one of {', '.join(CONDENSE)}, got {side!r}.")
            condense[name] = side
        if entry:
            raise ValueError(f"Dataset {name!r} has unknown keys {sorted(entry)}. Known are file, weight, condense.")
    if weights and (missing := sorted(set(files) - set(weights))):
        raise ValueError(f"Give every dataset a weight, or none: {', '.join(missing)} lack one.")
    datasets = {name: load_source(file, root) if file in SOURCES else load_pairs(file) for name, file in files.items()}
    return datasets, weights or None, condense


def read_mixture(files):
    """`train_files` as a mapping from dataset name to entry."""
    if isinstance(files, dict):
        return files
    if files.lstrip().startswith("{"):
        return json.loads(files)
    if Path(files).suffix in (".yaml", ".yml"):
        own = Path(__file__).parent / "recipes" / files  # a mixture of this library, wherever it is installed
        return yaml.safe_load((Path(files) if Path(files).exists() else own).read_text("utf-8"))
    return {Path(files).stem: files}


def condense_of(datasets, chosen, own):
    """What is generated for each dataset: what the user chose, or else what its source or mixture says."""
    if isinstance(chosen, dict):
        return own | chosen
    default = chosen == CondensationConfig.condense
    return dict.fromkeys(datasets, chosen) | (own if default else {})


def source_of(name, entry):
    """Where a dataset comes from, for the card: a file, or a Hub id."""
    file = (entry if isinstance(entry, str) else entry.get("file")) or name
    return SOURCES[file].repo if file in SOURCES else file
