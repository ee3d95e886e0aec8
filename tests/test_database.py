"""Which databases are opened, and that one process writes at a time."""

import lancedb
import pytest
from support.units import random_vectors, rows_of, write_units

from btok_hf.corpus.database import find_table, lock
from btok_hf.corpus.index import Index


def test_one_run_writes_at_a_time(tmp_path):
    """Two that add the same rows would double them."""
    out, path = write_units(tmp_path / "out", rows_of(random_vectors(20))), tmp_path / "db"
    with lock(str(path)), pytest.raises(RuntimeError, match=r"Another btok index is writing to .*db\. Wait"):
        Index.build(out, path)
    assert Index.build(out, path)[0].count() == 20


def test_only_databases_of_btok_index_are_opened(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        assert find_table(str(path)) is None
        with pytest.raises(FileNotFoundError, match="no database of btok index"):
            Index.open(path)
    assert not (tmp_path / "nothing").exists()
    lancedb.connect(tmp_path).create_table("items", [{"id": "a"}])
    with pytest.raises(ValueError, match="did not write"):
        Index.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        Index.build(tmp_path / "nothing", tmp_path / "db")
