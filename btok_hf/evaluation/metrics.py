"""Rank candidates and score rankings: the metrics of MMEB-V2 at 1, 5 and 10. Nothing here reads files or models.

- Candidates are ranked by cosine similarity, computed in float64 and rounded to float32. So the ranking does not
  depend on how candidates are cut into blocks, nor on the machine's fp32 kernels.
- Of two equally similar candidates, the first in the pool ranks first; of a query's own candidates, which many
  datasets begin with the right one, the first by the hash of its name.
- Grades belong to names. (The original evaluation mixes up the grades of a query whose relevant candidates have
  different grades, and counts a candidate twice if it is ranked twice.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

CUTOFFS = (1, 5, 10)
METRICS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
QUERIES_AT_ONCE = 512
LOW_BITS = 2**32 - 1
HIGHEST = 1000  # no grade is as high: the gain 2^grade must be a number


def check_embeddings(
    embeddings: np.ndarray | torch.Tensor, rows: Sequence[str], dimension: int | None = None
) -> np.ndarray:
    """Check that embeddings can be ranked, and return them as a float32 array.

    Args:
        embeddings (`numpy.ndarray` or `torch.Tensor` of shape `(rows, dimension)`): What a model returned.
        rows (`Sequence[str]`): A name of each row, for error messages.
        dimension (`int`, *optional*): Dimension of the other embeddings.

    Returns:
        `numpy.ndarray` of shape `(rows, dimension)`

    Raises:
        ValueError: A wrong shape, NaN or infinite values, or a zero vector; the message names the first such row.
    """
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().float().cpu().numpy()
    embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(rows) or dimension not in (None, embeddings.shape[1]):
        raise ValueError(
            f"The model returned an array of shape {embeddings.shape} for {rows[0]} to {rows[-1]}, where "
            f"({len(rows)}, {dimension or 'dimension'}) was expected: one vector per input, all of one dimension."
        )
    finite = np.isfinite(embeddings).all(1)
    for good, problem in ((finite, "NaN or infinite values"), (embeddings.any(1), "nothing but zeros")):
        if not good.all():
            raise ValueError(
                f"The embedding of {rows[int(np.argmin(good))]} holds {problem} ({(~good).sum()} of {len(rows)} rows "
                "do). Check the input and the model's precision."
            )
    return embeddings


def rank(queries: np.ndarray, blocks: Iterable[np.ndarray], depth: int) -> np.ndarray:
    """The best candidates of each query, by cosine similarity.

    Memory holds `queries`, one block and `depth` numbers per query. It does not grow with the number of candidates.

    Args:
        queries (`numpy.ndarray` of shape `(queries, dimension)`): Vectors of any length above 0.
        blocks (`Iterable[numpy.ndarray]` of shapes `(candidates, dimension)`): The candidates, cut into blocks.
        depth (`int`): Number of candidates to keep for each query.

    Returns:
        `numpy.ndarray` of shape `(queries, min(depth, candidates))`: Positions of the candidates, best first. Of two
        equally similar ones, the earlier is first.
    """
    parts = _unit(queries).split(QUERIES_AT_ONCE)
    best = [torch.empty(len(part), 0, dtype=torch.int64) for part in parts]
    start = 0
    for block in blocks:
        candidates = _unit(block)
        for index, part in enumerate(parts):
            keys = torch.cat([best[index], ranking_keys((part @ candidates.T).float(), start)], 1)
            best[index] = keys.topk(min(depth, keys.shape[1]), dim=1).values
        start += len(block)
    return (LOW_BITS - (torch.cat(best) & LOW_BITS)).numpy()


def _unit(vectors: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(np.asarray(vectors, np.float64)), dim=1, eps=0)


def ranking_keys(scores: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Distinct integers in the order of the scores; of equal ones, that of the earlier candidate is larger.

    Args:
        scores (`torch.Tensor` of shape `(queries, candidates)`): fp32.
        start (`int`): Position of the first candidate.

    Returns:
        `torch.Tensor` of shape `(queries, candidates)`: int64. The high 32 bits are those of the score, the low 32
        count the position backwards.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) + (LOW_BITS - torch.arange(start, start + scores.shape[1]))


def query_metrics(
    rankings: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]]
) -> dict[str, np.ndarray]:
    """Every metric of every query.

    With r(i) the grade of the candidate at rank i, the gain is r (linear) or 2^r - 1 (exponential):

    - `hit@k`: whether any of the first k is relevant. `mrr@k`: 1 / rank of the first relevant one, 0 beyond k.
    - `ndcg@k`: sum over i ≤ k of gain(i) / log2(i + 1), divided by that sum for the best possible ranking.
    - `precision@k`, `recall@k`: relevant ones among the first k, divided by k or by the number of relevant ones.
      `f1@k`: their harmonic mean.
    - `map@k`: sum of precision@i over the relevant ranks i ≤ k, divided by min(number of relevant ones, k).

    A query without relevant candidates has recall 1 and all other metrics 0, as in the original evaluation.

    Args:
        rankings (`Sequence[Sequence[str]]`): Names of each query's candidates, best first, at least the first 10.
        relevance (`Sequence[dict[str, float]]`): Grades above 0 of each query's relevant candidates, by name.

    Returns:
        `dict[str, numpy.ndarray]`: Arrays of shape `(queries,)`, by `metric@k`.

    Raises:
        ValueError: A name is ranked twice, a grade is not above 0 and below 1,000, or the arguments differ in length.
    """
    if len(rankings) != len(relevance):
        raise ValueError(f"Got {len(rankings)} rankings and grades for {len(relevance)} queries. Pass one of each.")
    depth = max(CUTOFFS)
    grades, ideal = np.zeros((2, len(rankings), depth))
    relevant = np.array([len(graded) for graded in relevance])
    for row, (names, graded) in enumerate(zip(rankings, relevance)):
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise ValueError(f"Query {row} ranks {twice!r} more than once. Give every candidate a unique name.")
        for name, grade in graded.items():
            if not 0 < grade < HIGHEST:
                raise ValueError(
                    f"Query {row} gives {name!r} the grade {grade}. Grades are above 0 and below {HIGHEST}; leave out "
                    "what is not relevant."
                )
        actual = [graded.get(name, 0) for name in names[:depth]]
        best = sorted(graded.values(), reverse=True)[:depth]
        grades[row, : len(actual)], ideal[row, : len(best)] = actual, best
    found = (grades > 0).cumsum(1)
    ranks = np.arange(1, depth + 1)
    gains: dict[str, Callable[[np.ndarray], np.ndarray]] = {"linear": lambda r: r, "exponential": lambda r: 2**r - 1}
    scores = {}
    for k in CUTOFFS:
        hits, most = found[:, k - 1], np.minimum(relevant, k)
        precision = hits / k
        recall = np.where(relevant > 0, hits / np.maximum(relevant, 1), 1.0)
        scores[f"hit@{k}"] = (hits > 0).astype(float)
        for name, gain in gains.items():
            reached, possible = ((gain(r) / np.log2(ranks + 1))[:, :k].sum(1) for r in (grades, ideal))
            scores[f"ndcg_{name}@{k}"] = reached / np.where(possible > 0, possible, 1)
        scores[f"precision@{k}"] = precision
        scores[f"recall@{k}"] = recall
        total = precision + recall
        scores[f"f1@{k}"] = 2 * precision * recall / np.where(total > 0, total, 1)
        at_hits = np.where(grades > 0, found / ranks, 0)[:, :k].sum(1)
        scores[f"map@{k}"] = at_hits / np.maximum(most, 1)
        scores[f"mrr@{k}"] = np.where(grades > 0, 1 / ranks, 0)[:, :k].max(1)
    return {f"{metric}@{k}": scores[f"{metric}@{k}"] for metric in METRICS for k in CUTOFFS}


def score(rankings: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `query_metrics` over the queries, and their number: the content of a `{dataset}_score.json`.

    Args:
        rankings, relevance: As in `query_metrics`.

    Returns:
        `dict[str, float]`: 24 metrics by `metric@k`; `num_pred` and `num_data`, the number of queries;
        `num_candidates`, the mean number of names in a ranking.

    Raises:
        ValueError: As in `query_metrics`, or no queries.
    """
    if not len(rankings):
        raise ValueError("There are no queries to score.")
    means = {name: float(values.mean()) for name, values in query_metrics(rankings, relevance).items()}
    ranked = sum(map(len, rankings)) / len(rankings)
    return {**means, "num_pred": len(rankings), "num_data": len(relevance), "num_candidates": ranked}
