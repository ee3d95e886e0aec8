"""List the files of an input and group them into units. The content of files is not read here."""

import glob
import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from btok_hf.corpus.rows import File, Row
from btok_hf.corpus.units import WRITTEN_FILES, WRITTEN_FOLDERS, Store, holds_corpus
from btok_hf.hub_names import is_hub_id
from btok_hf.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys((".txt", ".md"), "text"),
    ".pdf": "page",
}
PAGED = {".pdf": "pdf", ".tif": "tiff", ".tiff": "tiff"}
# Packages that a kind of file needs, with the extra that installs them.
NEEDED = {"video": ("av", "video"), "page": ("pypdfium2", "corpus")}
# Facts of a file that change with its content, as file systems name them: hashes first, then times.
STATES = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
# The pages of a PDF are not known before it is read: it counts as one row per this many bytes.
PAGE_BYTES = 2**16


class Found(NamedTuple):
    """A file of the input.

    Args:
        path (`str`): Relative to the root of the input.
        size (`int`): Bytes.
        state (`str`): Changes with the content: its hash, or size and time.
    """

    path: str
    size: int
    state: str


class Unit(NamedTuple):
    """Rows that are written together.

    Args:
        name (`str`): A hash of what they are and of the settings.
        rows (`int`): How many, as far as a list of files tells: a PDF counts as one.
        files (`tuple[str, ...]`): Files whose rows they are; of a table, its file.
        first (`int`): Of a table: number of the first row, from 0.
        offset (`int`): Of a table of lines: byte at which the first row starts.
    """

    name: str
    rows: int
    files: tuple[str, ...]
    first: int = 0
    offset: int = 0


def name_of(*parts: Any) -> str:
    """A hash of texts and numbers, as the name of a file."""
    return blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Input:
    """The input of `btok embed`: a folder or file, a pattern of files, or a dataset on the Hub.

    Args:
        given (`str`): A path, an address that fsspec knows (`s3://…`, `hf://…`), with `*` a pattern of them, or the id
            of a dataset on the Hub.
        out (`str`, *optional*): OUT, which may lie in the input. What `btok embed` wrote, there or into another
            folder, is no input.

    Attributes:
        address (`str`): The same as an absolute path or address.
        root (`str`): The folder that paths of files are relative to.
        skipped (`Counter`): What `files` left out, by reason.

    Raises:
        FileNotFoundError: There is no such input.
    """

    def __init__(self, given: str, out: str | None = None) -> None:
        self.fs, path = fsspec.core.url_to_fs(f"hf://datasets/{given}" if is_hub_id(given) else given)
        self._is_local = isinstance(self.fs, LocalFileSystem)
        self._out = None if out is None else self._real(Store(out).root)
        self._corpora: dict[str, bool] = {}  # folders that may be one
        path = path.rstrip("/") or "/"
        self._is_pattern = glob.has_magic(path) and not self.fs.exists(path)
        if self._is_pattern:
            parts = path.split("/")
            fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
            self._root = "/".join(parts[:fixed]) or "/"
        elif not self.fs.exists(path):
            raise FileNotFoundError(
                f"There is no input {given!r}. Give a folder, a file, an address such as s3://bucket/folder, or the "
                "id of a dataset on the Hub (org/name)."
            )
        else:
            path = self.fs.info(path)["name"].rstrip("/") or "/"  # as lists of files spell it
            self._root = path if self.fs.isdir(path) else path.rpartition("/")[0]
        self._path = path
        self.address, self.root = (self._full(each) for each in (path, self._root))
        self.skipped: Counter[str] = Counter()

    def _full(self, path: str) -> str:
        return path if self._is_local else self.fs.unstrip_protocol(path)

    def _real(self, folder: str) -> str:
        """A folder without links."""
        return os.path.realpath(folder) if self._is_local else folder

    def _was_written(self, path: str) -> bool:
        """Whether `btok embed` wrote a file."""
        folder, _, name = path.rpartition("/")
        if name not in WRITTEN_FILES:
            folder, _, last = folder.rpartition("/")
            if last not in WRITTEN_FOLDERS:
                return False
        if folder not in self._corpora:
            inside = f"{folder}/".startswith(f"{self._root.rstrip('/')}/")  # INPUT may name units on purpose
            self._corpora[folder] = self._real(folder) == self._out or (inside and holds_corpus(self.fs, folder))
        return self._corpora[folder]

    def file(self, path: str) -> File:
        """A file by its path relative to the root."""
        return File(self.fs, f"{self._root.rstrip('/')}/{path}")

    def files(self) -> Iterator[Found]:
        """The files of the input, always in the same order. What is left out is counted in `skipped`.

        Raises:
            OSError: A folder cannot be listed.
        """
        self.skipped.clear()
        if self._is_pattern:
            found = self.fs.glob(self._path, detail=True)
            entries: Iterable[Any] = (found[path] for path in sorted(found) if found[path]["type"] != "directory")
        elif self._path == self._root:
            entries = self._walk(self._root)
        else:
            entries = [self.fs.info(self._path)]
        for entry in entries:
            path = entry["name"]
            if self._is_pattern and self._is_hidden(path):
                self.skipped["hidden"] += 1
                continue
            if self._was_written(path):
                self.skipped["that btok embed wrote"] += 1
                continue
            size, state = entry.get("size"), next((entry[key] for key in STATES if entry.get(key) is not None), None)
            if self._is_local and entry["type"] != "file":
                if not os.path.isfile(path):
                    self.skipped["links to folders" if os.path.isdir(path) else "broken links or special files"] += 1
                    continue
                status = os.stat(path)  # of what a link leads to
                size, state = status.st_size, status.st_mtime
            if state is None:
                raise ValueError(
                    f"{path} has neither a hash nor a time in the lists of {type(self.fs).__name__}, so that changes "
                    "would not be noticed. Copy the input to a file system that tells them."
                )
            yield Found(path[len(self._root.rstrip("/")) + 1 :], size or 0, f"{size} {state}")

    def _is_hidden(self, path: str) -> bool:
        """Whether a path that a pattern matches has a part that begins with a point where the pattern has none."""
        start = len(self._root.rstrip("/")) + 1
        return any(part.startswith(".") for part in path[start:].split("/")) and not any(
            part.startswith(".") for part in self._path[start:].split("/")
        )

    def _walk(self, folder: str) -> Iterator[dict[str, Any]]:
        """The files of a folder and of those in it."""
        entries = sorted(self.fs.ls(folder, detail=True, refresh=True), key=lambda entry: entry["name"])
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["name"].rstrip("/") == folder:
                continue  # object storage may hold an object of the folder's name
            if name.startswith("."):
                self.skipped["hidden"] += 1
            elif entry["type"] == "directory":
                yield from self._walk(entry["name"].rstrip("/"))
            else:
                yield entry


class FolderSource:
    """Images, videos, texts, PDFs and TIFFs, a file or page a row.

    Args:
        given (`Input`): The input.
        unit_rows (`int`): Most rows of a unit.
    """

    def __init__(self, given: Input, unit_rows: int) -> None:
        self.input, self.unit_rows = given, unit_rows
        self.metadata: dict[str, Any] = {}

    def plan(self, settings: str) -> list[Unit]:
        """Cut the files into units.

        A unit also ends after every file whose path has a certain hash. So a new or removed file changes only the unit
        that it belongs to, and not all units after it.

        Args:
            settings (`str`): A hash of the settings, which is part of every name.

        Returns:
            `list[Unit]`

        Raises:
            ImportError: A kind of file needs a package that is not installed.
            ValueError: Nothing can be embedded.
        """
        units: list[Unit] = []
        files: list[Found] = []
        weight, seen, unknown = 0, set(), Counter[str]()

        def cut() -> None:
            units.append(Unit(name_of(settings, *files), len(files), tuple(file.path for file in files)))
            files.clear()

        for file in self.input.files():
            suffix = Path(file.path).suffix.lower()
            if suffix not in KINDS:
                unknown[suffix or "no suffix"] += 1
                continue
            seen.add(KINDS[suffix])
            own = 1 + file.size // PAGE_BYTES if suffix == ".pdf" else 1
            if files and weight + own > self.unit_rows:
                cut()
                weight = 0
            files.append(file)
            weight += own
            if int(name_of(file.path)[:8], 16) % self.unit_rows == 0:
                cut()
                weight = 0
        if files:
            cut()
        for suffix, count in unknown.items():
            self.input.skipped[f"of a type that is not embedded ({suffix})"] = count
        if not units:
            raise ValueError(
                f"{self.input.address} holds no file that can be embedded ({skipped_in_words(self.input.skipped)}). "
                f"Known are {', '.join(sorted(KINDS))}. For parquet, JSON lines and CSV name the columns: --text, "
                "--image, --video."
            )
        check_packages(seen)
        return units

    def rows(self, unit: Unit) -> Iterator[Row]:
        """The rows of a unit, not read yet. A file that may have pages is one row whose part is `pdf` or `tiff`."""
        for path in unit.files:
            suffix = Path(path).suffix.lower()
            if not _is_utf8(path):  # its row could not say where the file is
                yield Row(path, KINDS[suffix], error="the name of the file is not UTF-8; rename it")
                continue
            yield Row(path, KINDS[suffix], {PAGED.get(suffix, KINDS[suffix]): self.input.file(path)}, source=path)


def _is_utf8(path: str) -> bool:
    """Whether a path can be stored as text. Python represents other bytes of a file name as lone surrogates."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_packages(kinds: Iterable[str]) -> None:
    """Raise `ImportError` if a kind of content needs a package that is not installed."""
    for kind in sorted(kinds):
        package, extra = NEEDED.get(kind, (None, None))
        if package and importlib.util.find_spec(package) is None:
            what = {"video": "Videos", "page": "PDFs"}[kind]
            raise ImportError(f"{what} need the package {package}: pip install 'btok-hf[{extra}]'.")


def skipped_in_words(skipped: Counter[str]) -> str:
    """What was left out, for a message."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "it is empty"
