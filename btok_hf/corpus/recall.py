"""How many of the nearest rows a search finds: measured against all embeddings in float32, in one pass."""

from collections.abc import Sequence

import numpy as np

from btok_hf.corpus.units import read_units

# Scores of equal rows differ by rounding.
ROUNDING = 1e-5


def measure_recall(out: str, queries: np.ndarray, found: Sequence[Sequence[str]], k: int = 10) -> float:
    """The share of the k nearest rows that a search found.

    The queries are rows of the corpus themselves. Each finds itself, which is not counted. Of rows that are equally
    near, any counts.

    Args:
        out (`str`): Folder or address that `btok embed` wrote.
        queries (`np.ndarray`): Embeddings of rows, fp32, shape `(q, d)`.
        found (`Sequence[Sequence[str]]`): For each query the ids of the `k + 1` hits, itself included.
        k (`int`): Nearest rows that should be found.

    Returns:
        `float`: From 0 to 1, the mean over the queries.
    """
    best = np.full((len(queries), 0), -np.inf, np.float32)
    asked: dict[str, list[int]] = {key: [] for keys in found for key in keys}
    for number, keys in enumerate(found):
        for key in keys:
            asked[key].append(number)
    scores: list[list[float]] = [[] for _ in queries]  # exact ones, of what was found
    for batch in read_units(out, columns=["id", "embedding"])[1]:
        batch = batch.filter(batch.column("embedding").is_valid())
        ids, vectors = batch.column("id").to_pylist(), batch.column("embedding").flatten().to_numpy()
        exact = queries @ vectors.reshape(len(batch), -1).T
        best = np.sort(np.concatenate([best, exact], axis=1), axis=1)[:, -(k + 1) :]
        for row in np.flatnonzero([key in asked for key in ids]):
            for number in asked[ids[row]]:
                scores[number].append(exact[number, row])
    needed = best.shape[1] - 1  # a small corpus has fewer than k other rows
    if not needed:
        return 1.0
    right = [sum(score >= best[number, 0] - ROUNDING for score in of) for number, of in enumerate(scores)]
    return float(np.mean([min(max(count - 1, 0), needed) / needed for count in right]))
