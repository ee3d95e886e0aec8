"""Plan a run of `btok embed`: check its settings before the model is loaded, and list the missing units."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from btok_hf.arguments import named_source
from btok_hf.corpus.listing import FolderSource, Input, Unit, name_of
from btok_hf.corpus.rows import PAGE_DPI, PAGE_PIXELS
from btok_hf.corpus.tables import Columns, TableSource
from btok_hf.corpus.units import FORMAT, Corpus, Store
from btok_hf.model_info import check_dimensions, identify, trained_dimensions

NO_COLUMNS = Columns()


@dataclass(frozen=True)
class Options:
    """How to embed.

    Args:
        model (`str`): Folder or Hub id of a repository with Bottleneck Tokens.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        prompt (`str`, *optional*): Instruction for every row. Default: the model's for documents.
        dimensions (`int`, *optional*): Leading dimensions to keep, if the model was trained for it. Default: all.
        dtype (`str`): dtype of the weights.
        max_pixels (`int`, *optional*): Reduce larger images and frames to this many pixels.
        max_seq_length (`int`, *optional*): Cut texts to this many tokens.
        columns (`Columns`): Of tables. Without a column to embed, files are embedded.
        unit_rows (`int`): Most rows of a unit.
        thumbnail_pixels (`int`): Longest side of a thumbnail; 0 makes none.
        device (`str`, *optional*): Device of the model. Default: a GPU if there is one.
        batch_size (`int`): As in `encode`.
        threads (`int`): Threads that read and decode ahead of the model.
    """

    model: str
    revision: str | None = None
    prompt: str | None = None
    dimensions: int | None = None
    dtype: str = "auto"
    max_pixels: int | None = None
    max_seq_length: int | None = None
    columns: Columns = NO_COLUMNS
    unit_rows: int = 512
    thumbnail_pixels: int = 192
    device: str | None = None
    batch_size: int = 32
    threads: int = 4

    def __post_init__(self) -> None:
        least = {"thumbnail_pixels": 0}
        for name in ("unit_rows", "thumbnail_pixels", "batch_size", "threads", "max_pixels", "max_seq_length"):
            if (value := getattr(self, name)) is not None and value < least.get(name, 1):
                raise ValueError(f"{name} must be {least.get(name, 1)} or more, got {value}.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must be auto or a name of torch such as bfloat16, got {self.dtype!r}.")
        if not self.columns.parts() and any(self.columns):
            raise ValueError(
                "--id and --columns name columns of a table. Say what to embed with --text, --image or --video, or "
                "leave them out to embed files."
            )

    def replace(self, **changes: Any) -> "Options":
        """The same with other values."""
        return replace(self, **changes)


class Job(NamedTuple):
    """What a worker needs to embed units. It can be pickled.

    Args:
        given (`str`): The input, as an absolute path or address.
        out (`str`): The folder of the corpus, likewise.
        options (`Options`): With the commit of a model on the Hub as `revision`.
        dimensions (`int`): Dimensions of an embedding.
        metadata (`dict[str, pyarrow.DataType]`): Columns that are taken from a table.
        revision (`str`): The identity of the model (`btok_hf.model_info.identify`).
        again (`frozenset[str]`): Names of units that are there, and are embedded again.
    """

    given: str
    out: str
    options: Options
    dimensions: int
    metadata: Mapping[str, pa.DataType]
    revision: str
    again: frozenset[str] = frozenset()

    def source(self) -> FolderSource | TableSource:
        """The source of the rows."""
        return _source(Input(self.given), self.out, self.options, self.metadata)


class Plan(NamedTuple):
    """A job and its units.

    Args:
        job (`Job`): The job.
        units (`list[Unit]`): All units of the input.
        missing (`list[Unit]`): Those that are not embedded yet.
        removed (`int`): Units of changed or removed input.
        skipped (`dict[str, int]`): Files of the input that are not embedded, by reason.
        is_new (`bool`): Whether this plan claimed the folder.
    """

    job: Job
    units: list[Unit]
    missing: list[Unit]
    removed: int
    skipped: Mapping[str, int]
    is_new: bool


def make_plan(given: str, out: str, options: Options, *, clean: bool = True, retry_failed: bool = False) -> Plan:
    """Check everything that can be checked without the model, claim the folder, and list what is to do.

    Args:
        given (`str`): INPUT of `btok embed`.
        out (`str`): OUT of `btok embed`.
        options (`Options`): How to embed.
        clean (`bool`): Remove what belongs to changed or removed input. One of several processes does it.
        retry_failed (`bool`): Embed units with failed rows again.

    Returns:
        `Plan`

    Raises:
        FileNotFoundError: There is no such input.
        ImportError: A kind of content needs a package that is not installed.
        OSError: The model cannot be found.
        ValueError: Nothing to embed, ids that are not unique, options that do not fit the model, or a folder with
            another corpus.
    """
    found = Input(given, out)
    with named_source(options.model):
        revision, config = identify(options.model, options.revision)
    if Path(options.model).exists():
        options = options.replace(model=os.path.abspath(options.model))  # for other processes
    else:
        options = options.replace(revision=revision)
    dimensions = trained_dimensions(config)[-1] if options.dimensions is None else options.dimensions
    check_dimensions(options.model, config, dimensions)
    source = _source(found, out, options)
    settings: dict[str, Any] = {
        "format": FORMAT,
        "model": options.model,
        "revision": revision,
        "prompt": options.prompt,
        "dimensions": dimensions,
        "dtype": options.dtype,
        "max_pixels": options.max_pixels,
        "max_seq_length": options.max_seq_length,
        "input": found.address,
        "root": found.root,
        "kind": "table" if options.columns.parts() else "folder",
        "unit_rows": options.unit_rows,
        "thumbnail_pixels": options.thumbnail_pixels,
        "pages": [PAGE_DPI, PAGE_PIXELS],
        **({"table": options.columns._asdict()} if options.columns.parts() else {}),
    }
    identity = name_of(*(f"{key}={value}" for key, value in settings.items() if key != "model"))
    corpus = Corpus(out)
    held = corpus.settings()
    if held is not None:  # before tables are scanned
        corpus.compare(held, settings | {"metadata": held.get("metadata")})
    units = source.plan(identity)
    if clean and isinstance(source, TableSource):  # once is enough
        source.check_ids()
    if held is not None and isinstance(source, TableSource):
        source.keep_types(held["metadata"])
    settings["metadata"] = {name: str(kind) for name, kind in source.metadata.items()}
    is_new = corpus.claim(settings)
    names = [unit.name for unit in units]
    corpus.set_plan(names)
    written = corpus.written()
    stale = written - set(names)
    if clean:
        corpus.remove(stale)
        if isinstance(source, TableSource):
            source.forget()
    # They stay until they are replaced: a run that fails must not cost the rows that they have.
    again = frozenset(corpus.failed(names) if retry_failed else ())
    job = Job(found.address, corpus.store.address, options, dimensions, source.metadata, revision, again)
    missing = [unit for unit in units if unit.name not in written - again]
    return Plan(job, units, missing, len(stale), dict(found.skipped), is_new)


def _source(
    found: Input, out: str, options: Options, metadata: Mapping[str, pa.DataType] | None = None
) -> FolderSource | TableSource:
    if options.columns.parts():
        return TableSource(found, options.columns, options.unit_rows, Store(out), metadata)
    return FolderSource(found, options.unit_rows)
