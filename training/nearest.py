"""The nearest candidates of queries, without those that answer them: exact search, in torch or with faiss."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

FEW = 32  # queries whose scores of all candidates are in memory at once, beside an index

Excluded = list[tuple[str, np.ndarray]]  # distinct positions of candidates that are left out, after the reason


class Nearest(NamedTuple):
    """The nearest candidates of a query.

    Args:
        scores (`list[float]`): Dot products, highest first.
        candidates (`list[int]`): Their positions.
        left_out (`Counter`): Number of candidates by the reason that they are left out; of several, the first. Those
            count that are nearer than the last of `candidates`, or all if there are no more candidates.
    """

    scores: list[float]
    candidates: list[int]
    left_out: Counter[str]


# From queries `(batch, hidden)`, what is left out for each, and how many candidates to find for each.
Search = Callable[[np.ndarray, Sequence[Excluded], int], Iterator[Nearest]]


def torch_search(corpus: np.ndarray) -> Search:
    """A function that finds the nearest candidates. It makes all scores of a batch.

    Args:
        corpus (`numpy.ndarray` of shape `(candidates, hidden)`): fp32.
    """
    candidates = torch.from_numpy(corpus)

    def search(queries: np.ndarray, excluded: Sequence[Excluded], count: int) -> Iterator[Nearest]:
        for scores, parts in zip(torch.from_numpy(queries) @ candidates.T, excluded):
            hidden = []
            for reason, positions in parts:
                indices = torch.from_numpy(positions)
                hidden.append((reason, scores[indices]))
                scores[indices] = -torch.inf  # also so that one with two reasons counts once
            best, found = scores.topk(min(count, len(corpus)))
            left_out = Counter[str]()
            for reason, values in hidden:
                left_out[reason] += int((values > best[-1]).sum())
            there = best.isfinite()
            yield Nearest(best[there].tolist(), found[there].tolist(), +left_out)

    return search


def faiss_search(corpus: np.ndarray) -> Search:
    """As `torch_search`, with a flat index of faiss, which keeps no other scores than those of the nearest.

    A query with more of its nearest left out than that is searched by `torch_search`, with a few others at a time.
    """
    import faiss

    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus)
    search_all = torch_search(corpus)

    def search(queries: np.ndarray, excluded: Sequence[Excluded], count: int) -> Iterator[Nearest]:
        most = min(2 * count, len(corpus))
        done = [_without(*row, count) for row in zip(*index.search(queries, most), excluded)]
        short = [number for number, nearest in enumerate(done) if len(nearest.scores) < count and most < len(corpus)]
        for start in range(0, len(short), FEW):
            part = short[start : start + FEW]
            for number, nearest in zip(part, search_all(queries[part], [excluded[one] for one in part], count)):
                done[number] = nearest
        yield from done

    return search


def _without(scores: np.ndarray, found: np.ndarray, excluded: Excluded, count: int) -> Nearest:
    """The first `count` of these that are not left out."""
    reasons = np.full(len(found), "", object)
    for reason, positions in reversed(excluded):
        reasons[np.isin(found, positions)] = reason
    kept = np.flatnonzero(reasons == "")[:count]
    last = kept[-1] if len(kept) == count else len(found)
    return Nearest(scores[kept].tolist(), found[kept].tolist(), Counter(filter(None, reasons[:last])))
