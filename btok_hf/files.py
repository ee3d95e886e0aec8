"""Writing files: checked before work is lost, in one step, with errors that say what is missing."""

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def write_files(output_dir, files):
    """Write files of a repository: a mapping from relative path to text or bytes."""
    for name, content in files.items():
        path = Path(output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def nearest_existing(folder):
    """`folder`, or the nearest one above it that exists."""
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_writable(output_dir):
    """Raise an `OSError` with a way out if `output_dir` cannot be written to. Leaves nothing behind.

    A file is really made and removed, in the folder or, where it does not exist yet, in the nearest one above it:
    permission bits do not tell about read-only mounts.
    """
    existing = nearest_existing(output_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"The output folder {output_dir} cannot be written to: no file can be made in {existing} "
            f"({error.strerror}). Name another folder, or make that one writable",
        ) from error


@contextmanager
def explain_full_disk(output_dir, needed=None):
    """Turn a full disk, as Python and safetensors report it, into an error that says where and how much is missing."""
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
            f"The disk is full: {output_dir} is incomplete.{size} There are {free:,} bytes free. "
            "Make room, or export to another disk",
        ) from error


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


@contextmanager
def replacing(path):
    """A file to write that takes its place at once when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of its own: two runs may share a cache
    with open(draft, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
