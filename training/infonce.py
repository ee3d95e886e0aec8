"""InfoNCE in which right answers are not used as negatives. Candidates are compared by content and by group.

A batch of a label dataset holds the same positive several times. Without a mask, each copy would be a negative of
queries that it answers. The losses of Sentence-Transformers neither compare contents nor know groups: they leave
duplicates to the sampler, or let a second model decide (GIST). So this loss is implemented here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SCORE_ROWS = 1024  # queries whose scores against all candidates are in memory at once


class Side(NamedTuple):
    """Queries, positives or negatives of all processes.

    Args:
        embeddings (`Tensor`): Shape `(rows, hidden)`.
        ids (`Tensor`): int64 of shape `(rows, 2)`, or `(rows, 0)` if nothing is masked. The first hash is that of the
            content. The second is, for queries, that of prompt and content; for candidates, that of the group, or of
            the content if there is no group. A query has the group of its positive.
    """

    embeddings: Tensor
    ids: Tensor


def infonce(
    queries: Side,
    positives: Side,
    negatives: Side,
    own: Tensor,
    *,
    dims: Sequence[int],
    temperature: float,
    symmetric: bool = False,
) -> Tensor:
    """The mean InfoNCE of queries against all positives and negatives, a scalar.

    Args:
        queries, positives, negatives (`Side`): The positive of query i is positive i.
        own (`Tensor`): Indices of the queries that count: those of this process.
        dims (`Sequence[int]`): The mean is also one over embeddings cut to these sizes and normalised again.
        temperature (`float`): Temperature over cosine similarities.
        symmetric (`bool`): Average it with the loss of positives against queries.
    """
    sides = (queries.embeddings, positives.embeddings, negatives.embeddings)

    def block_loss(block: Tensor) -> Tensor:
        masks = false_negatives(block, queries.ids, positives.ids, negatives.ids)
        cut = ([F.normalize(side[:, :dim], dim=1) for side in sides] for dim in dims)
        return torch.stack([_block_loss(part, masks, block, temperature, symmetric) for part in cut]).sum()

    total = queries.embeddings.new_zeros(())
    for block in own.split(SCORE_ROWS):
        # Recomputed in the backward pass, so that memory never holds all scores of a large batch.
        total = total + checkpoint(block_loss, block, use_reentrant=False, preserve_rng_state=False)
    return total / (len(own) * len(dims))


def _block_loss(
    sides: Sequence[Tensor], masks: Sequence[Tensor], block: Tensor, temperature: float, symmetric: bool
) -> Tensor:
    """Summed InfoNCE of the queries with indices `block`, without what is masked (`false_negatives`)."""
    (queries, positives, negatives), (of_positives, of_negatives, of_queries) = sides, masks
    to_positives = (queries[block] @ positives.T / temperature).masked_fill(of_positives, -torch.inf)
    to_negatives = (queries[block] @ negatives.T / temperature).masked_fill(of_negatives, -torch.inf)
    right = to_positives.gather(1, block[:, None])[:, 0]
    normaliser = torch.cat([to_positives, to_negatives], 1).logsumexp(1)
    if symmetric:
        to_queries = (positives[block] @ queries.T / temperature).masked_fill(of_queries, -torch.inf)
        normaliser = (normaliser + to_queries.logsumexp(1)) / 2
    return (normaliser - right).sum()


def false_negatives(
    block: Tensor, query_ids: Tensor, positive_ids: Tensor, negative_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of what must not be a negative of the rows `block`: right answers, and copies of the row's own query.

    Rows with the same query, which is its prompt and content, are one query with several positives and groups. Its
    right answers are the contents of these positives and of all candidates of these groups. In the other direction,
    the right queries of a positive are those that it answers.

    Args:
        block (`Tensor`): Indices of rows.
        query_ids, positive_ids, negative_ids (`Tensor`): As `Side.ids`.

    Returns:
        Three masks of shape `(len(block), rows)`: of positives and negatives, which the queries of `block` are
        compared with, and of queries, which their positives are compared with. The row's own two are in none.
    """
    if not positive_ids.shape[1]:
        others = (positive_ids, negative_ids, query_ids)
        first, second, third = (block.new_zeros(len(block), len(ids), dtype=torch.bool) for ids in others)
        return first, second, third
    query_contents, queries = query_ids.T.contiguous()
    groups = positive_ids[:, 1].contiguous()
    contents, candidate_groups = torch.cat([positive_ids, negative_ids]).T.contiguous()
    # A candidate without a group counts as a group of its content.
    of_groups = _held(queries[block, None] == queries, groups, candidate_groups)
    of_candidates = _held(of_groups, contents, contents) | (query_contents[block, None] == contents)
    answer = positive_ids[block, :1]
    answered = _held(answer == contents, candidate_groups, groups)
    of_queries = _held(answered, queries, queries) | (answer == query_contents)
    of_positives, of_negatives = of_candidates.tensor_split([len(queries)], 1)
    for mask in (of_positives, of_queries):
        mask.scatter_(1, block[:, None], False)
    return of_positives, of_negatives, of_queries


def _held(alike: Tensor, contents: Tensor, candidates: Tensor) -> Tensor:
    """Which candidates are among the contents of the rows that are alike, shape `(len(alike), len(candidates))`."""
    # Equal contents have one place among the sorted ones. No step waits for the device.
    places = contents.sort().values
    counts = torch.zeros(alike.shape, device=alike.device)
    counts.index_add_(1, torch.searchsorted(places, contents), alike.float())
    place = torch.searchsorted(places, candidates).clamp(max=len(places) - 1)
    return (counts[:, place] > 0) & (places[place] == candidates)
