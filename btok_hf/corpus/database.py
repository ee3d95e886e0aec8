"""The LanceDB database that `btok index` writes: opened, told from others, locked for one writer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
from filelock import FileLock, Timeout

TABLE, LOCK = "items", ".btok.lock"
SETTINGS = b"btok"  # in the metadata of the table's schema
# Readers look for new rows this often.
FRESH = timedelta(seconds=1)


def connect(path: str) -> Any:
    """The database in a folder or at an address. LanceDB makes a folder that does not exist."""
    return lancedb.connect(path, read_consistency_interval=FRESH)


def find_table(path: str) -> Any:
    """The table of a database, or `None`. Nothing is made.

    Raises:
        ValueError: A table of this name that `btok index` did not write.
    """
    if "://" not in path and not Path(path, f"{TABLE}.lance").is_dir():
        return None
    database = connect(path)
    if TABLE not in database.list_tables().tables:
        return None
    table = database.open_table(TABLE)
    if SETTINGS not in (table.schema.metadata or {}):
        raise ValueError(f"{path} holds a table {TABLE!r} that btok index did not write. Name another database.")
    return table


@contextmanager
def lock(path: str) -> Iterator[None]:
    """Lock a folder for one writer: two that add the same rows would duplicate them. A killed process frees it.

    Raises:
        RuntimeError: Another process has locked it.
    """
    if "://" in path:
        yield
        return
    is_new = not Path(path).exists()
    Path(path).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(path, LOCK), timeout=0):
            try:
                yield
            finally:
                if is_new and os.listdir(path) == [LOCK]:  # a run that wrote nothing leaves nothing
                    Path(path, LOCK).unlink()
                    os.rmdir(path)
    except Timeout as error:
        raise RuntimeError(
            f"Another btok index is writing to {path}. Wait until it has ended, and run the command again."
        ) from error
