"""Writing files: check the folder first, replace files atomically, and explain a full disk."""

import errno
import json
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError


def write_files(output_dir: Path | str, files: Mapping[str, str | bytes]) -> None:
    """Write files to a folder.

    Args:
        output_dir (`str` or `Path`): The folder.
        files (`dict[str, str | bytes]`): Content by relative path.
    """
    for name, content in files.items():
        path = Path(output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def nearest_existing(folder: Path | str) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_writable(output_dir: Path | str) -> None:
    """Raise `OSError` if `output_dir` cannot be written to.

    Creates and removes a file in the folder, or in its nearest parent that exists. Permission bits alone do not show
    read-only mounts.
    """
    existing = nearest_existing(output_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"The output folder {output_dir} cannot be written to: no file can be made in {existing} "
            f"({error.strerror}). Choose another folder, or make that one writable",
        ) from error


@contextmanager
def explain_full_disk(output_dir: Path | str, needed: int | None = None) -> Iterator[None]:
    """Raise an `OSError` that names the folder and the free space when the disk is full.

    Args:
        output_dir (`str` or `Path`): Folder that is written inside the context.
        needed (`int`, *optional*): Bytes of the weights, for the message.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in full and not re.search(r"os error (28|122)\b", str(error)):
            raise
        size = "" if needed is None else f" The weights need {needed:,} bytes."
        free = shutil.disk_usage(output_dir).free
        raise OSError(
            errno.ENOSPC,
            f"The disk is full: {output_dir} was not written whole.{size} There are {free:,} bytes free. "
            "Make room, or export to another disk",
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write. It replaces `path` atomically at the end of the context, unless there is an error.

    Until then, the content is in a hidden file `.NAME.CRC.HOST.PID.tmp` beside it. A killed process leaves it behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One per process: runs on several machines may write the same file of a shared file system. Names are cut, because
    # file systems take 255 bytes.
    host, crc = socket.gethostname()[:50], zlib.crc32(path.name.encode("utf-8", "surrogateescape"))
    draft = path.with_name(f".{path.name[:20]}.{crc:08x}.{host}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
