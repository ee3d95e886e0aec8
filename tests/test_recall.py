"""Measured recall: the right share, whatever is equal, missing or cut."""

import numpy as np
import pytest
from support.units import random_vectors, rows_of, write_units

from btok_hf.corpus.recall import measure_recall


def ids(vectors, query, k):
    return [f"a{number}" for number in np.argsort(-(vectors @ query), kind="stable")[:k]]


def test_the_share_of_the_nearest_that_is_found(tmp_path):
    vectors = random_vectors(2500)
    out, queries = write_units(tmp_path, rows_of(vectors), unit_rows=2000), vectors[[5, 2400]]
    found = [ids(vectors, query, 11) for query in queries]
    assert measure_recall(out, queries, found) == 1
    far = ids(vectors, queries[0], 100)[-4:]
    assert measure_recall(out, queries, [found[0][:7] + far, found[1]]) == pytest.approx((0.6 + 1) / 2)
    assert measure_recall(out, queries, [[], found[1][:1]]) == 0  # itself alone is nothing


def test_equal_rows_may_stand_for_each_other(tmp_path):
    vectors = np.concatenate([random_vectors(100)] * 2)
    out = write_units(tmp_path, rows_of(vectors))
    order = ids(vectors, vectors[3], 12)
    assert measure_recall(out, vectors[3:4], [order[:10] + order[11:]]) == 1


def test_a_small_corpus_with_failed_rows(tmp_path):
    vectors = random_vectors(3)
    out = write_units(tmp_path, rows_of([*vectors, None]))
    assert measure_recall(out, vectors[:1], [["a0", "a1", "a2"]]) == 1
    assert measure_recall(out, vectors[:1], [["a0", "a1"]]) == 0.5
    alone = write_units(tmp_path / "alone", rows_of(vectors[:1]))
    assert measure_recall(alone, vectors[:1], [["a0"]]) == 1
