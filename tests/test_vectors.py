"""Stored vectors: what comes back, and which dimensions may be cut."""

import json
import shutil

import numpy as np
import pytest
from support.units import random_vectors

from btok_hf.corpus.vectors import check_dimensions, cut, load, store, stored_type, unit


@pytest.mark.parametrize(
    ("precision", "size", "lowest"), [("float32", 64, 1 - 1e-6), ("float16", 32, 1 - 1e-5), ("binary", 2, 0.6)]
)
def test_what_is_stored_comes_back_with_length_one(precision, size, lowest):
    vectors = random_vectors(50)
    column = store(vectors, precision)
    assert column.type == stored_type(16, precision) and column.nbytes == 50 * size
    loaded = load(column, 16, precision)
    assert loaded.dtype == np.float32 and np.allclose(np.linalg.norm(loaded, axis=1), 1, atol=1e-6)
    assert (loaded * vectors).sum(1).min() > lowest


def test_a_number_of_bits_that_fills_no_byte_comes_back():
    vectors = random_vectors(5, dimensions=11)
    vectors[0, 3] = 0  # is no positive number
    assert np.array_equal(load(store(vectors, "binary"), 11, "binary") > 0, vectors > 0)


def test_cut_vectors_have_length_one_again():
    vectors = random_vectors(5)
    short = cut(vectors, 4)
    assert short.shape == (5, 4) and np.allclose(np.linalg.norm(short, axis=1), 1)
    assert np.allclose(short / short[:, :1], vectors[:, :4] / vectors[:, :1], rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused(value):
    with pytest.raises(ValueError, match="points nowhere"):
        unit(np.array([[1.0, 0.0], [value, 0.0]]))


def test_only_dimensions_that_the_model_was_trained_for(repo, tmp_path):
    with pytest.raises(ValueError, match=r"was trained for, 64, got 8"):
        check_dimensions({"model": repo, "revision": "", "dimensions": 64}, 8)
    trained = tmp_path / "trained"
    shutil.copytree(repo, trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [8, 32, 64]}))
    for size in (8, 32):
        check_dimensions({"model": str(trained), "revision": "", "dimensions": 32}, size)
    with pytest.raises(ValueError, match="8 or 32, got 64"):
        check_dimensions({"model": str(trained), "revision": "", "dimensions": 32}, 64)
    with pytest.raises(OSError, match="no-such-folder"):
        check_dimensions({"model": str(tmp_path / "no-such-folder"), "revision": "", "dimensions": 64}, 8)
