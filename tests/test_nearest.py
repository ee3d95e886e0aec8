"""The nearest candidates without those that are left out: torch and faiss, against sorting."""

from collections import Counter

import numpy as np
import pytest

from btok_hf.training.nearest import faiss_search, torch_search


@pytest.mark.parametrize("search", [torch_search, faiss_search])
@pytest.mark.parametrize("count", [1, 5, 60, 1000])
def test_as_by_sorting(search, count):
    """With groups of any size, one of all candidates, and candidates that are left out for two reasons."""
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(200, 8)).astype(np.float32)
    queries = rng.normal(size=(40, 8)).astype(np.float32)
    sizes = [0, 1, 20, 150, 200]
    excluded = [
        [("content", rng.choice(200, 3, replace=False)), ("group", rng.permutation(200)[: sizes[number % 5]])]
        for number in range(40)
    ]
    found = list(search(corpus)(queries, excluded, count))
    for query, parts, nearest in zip(queries, excluded, found, strict=True):
        reasons = {int(position): reason for reason, positions in reversed(parts) for position in positions}
        scores = corpus @ query
        order = np.argsort(-scores, kind="stable").tolist()
        expected = [position for position in order if position not in reasons][:count]
        assert nearest.candidates == expected
        np.testing.assert_allclose(nearest.scores, scores[expected], atol=1e-5)
        nearer = order if len(expected) < count else order[: order.index(expected[-1])]
        assert nearest.left_out == Counter(reasons[position] for position in nearer if position in reasons)
    assert {len(nearest.candidates) for nearest in found} >= ({0, count} if count < 50 else {0})
