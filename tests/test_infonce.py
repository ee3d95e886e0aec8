"""Which candidates are masked, and InfoNCE by its definition."""

import random

import pytest
import torch
from torch.nn import functional as F

from btok_hf.training import infonce as module
from btok_hf.training.infonce import Side, false_negatives, infonce


def ids(*contents, groups=()):
    """Hashes of rows: of their content, and of their group or again of the content."""
    groups = dict(groups)
    numbers = {name: index + 1 for index, name in enumerate("abcdefghijklmnopqrstuvwxyz")}
    return torch.tensor([[numbers[c], -groups.get(i, -numbers[c])] for i, c in enumerate(contents)]).reshape(-1, 2)


def masks(queries, positives, negatives=(), groups=(), negative_groups=(), block=None):
    found = false_negatives(
        torch.arange(len(queries)) if block is None else torch.tensor(block),
        ids(*queries),
        ids(*positives, groups=groups),
        ids(*negatives, groups=negative_groups),
    )
    return [[row.nonzero()[:, 0].tolist() for row in mask] for mask in found]


def test_copies_of_a_positive():
    assert masks("abc", "xxy", "yx") == [[[1], [0], []], [[1], [1], [0]], [[1], [0], []]]


def test_answers_of_an_equal_query_are_no_negatives_wherever_they_stand():
    """Also as a negative of a third row, and as the positive of a fourth."""
    of_positives, of_negatives, of_queries = masks("aabc", "xyzy", "yz")
    assert of_positives == [[1, 3], [0, 3], [], [1]]
    assert of_negatives == [[0], [0], [1], [0]]
    assert of_queries == [[1], [0, 3], [], [0, 1]]


def test_answers_of_a_group_are_no_negatives_wherever_they_stand():
    of_positives, of_negatives, _ = masks("abcd", "xyzy", "zyx", groups={0: 7, 1: 7})
    assert of_positives == [[1, 3], [0, 3], [], [1]]
    assert of_negatives == [[1, 2], [1, 2], [0], [1]]


def test_a_negative_of_a_group_answers_its_rows_also_if_no_row_has_its_content():
    groups = {0: 7, 1: 8, 2: 7}
    of_positives, of_negatives, _ = masks("abcd", "xyzu", "vwu", groups=groups, negative_groups={0: 7, 2: 8})
    assert of_negatives == [[0], [2], [0], [2]]
    assert of_positives == [[2], [3], [0], []]  # "u" is an answer of the second row's group


def test_an_equal_query_has_the_groups_of_all_its_rows():
    of_positives, of_negatives, of_queries = masks("aab", "xyz", "wv", groups={1: 7, 2: 7}, negative_groups={0: 7})
    assert of_positives == [[1, 2], [0, 2], [1]] and of_negatives == [[0], [0], [0]]
    assert of_queries == [[1], [0, 2], [0, 1]]


def test_the_query_itself_is_no_negative():
    """As in pairs that are given in both directions."""
    of_positives, of_negatives, of_queries = masks("abc", "bax", "ca")
    assert of_positives == [[1], [0], []]
    assert of_negatives == [[1], [1], [0]]  # "a" is the second row's answer
    assert of_queries == [[1], [0], []]
    assert masks("ab", "ab")[0] == [[], []]  # a row's own positive stays


def test_a_query_is_its_content_and_its_prompt():
    """The second hash of a query is that of both; the first finds copies of the query among the candidates."""
    queries = torch.tensor([[1, 100], [1, 200], [1, 100], [2, 300]])
    positives, negatives = ids("x", "y", "z", "a"), ids("y", "w")
    of_positives, of_negatives, of_queries = false_negatives(torch.arange(4), queries, positives, negatives)
    assert [row.nonzero()[:, 0].tolist() for row in of_positives] == [[2, 3], [3], [0, 3], []]
    assert [row.nonzero()[:, 0].tolist() for row in of_negatives] == [[], [0], [], []]
    assert [row.nonzero()[:, 0].tolist() for row in of_queries] == [[2], [], [0], [0, 1, 2]]


def test_rows_of_a_block_only():
    assert masks("aabc", "xyzy", "yz", block=[3, 1]) == [[[1], [0, 3]], [[0], [0]], [[0, 1], [0, 3]]]


def test_random_batches_by_the_definition():
    for seed in range(30):
        rng = random.Random(seed)
        queries, positives, negatives = (rng.choices("abcdefghij", k=count) for count in (9, 9, 7))
        groups, others = ({row: rng.randrange(3) for row in range(n) if rng.random() < 0.4} for n in (9, 7))
        candidates = list(zip(positives + negatives, [*map(groups.get, range(9)), *map(others.get, range(7))]))
        right = []
        for i in range(9):
            same = [j for j in range(9) if queries[j] == queries[i]]
            asked = {groups.get(j) for j in same} - {None}
            right.append({positives[j] for j in same} | {content for content, group in candidates if group in asked})
            right[i] |= {queries[i]}
        expected = [
            [[j for j in range(9) if j != i and positives[j] in right[i]] for i in range(9)],
            [[j for j, content in enumerate(negatives) if content in right[i]] for i in range(9)],
            [[j for j in range(9) if j != i and positives[i] in right[j]] for i in range(9)],
        ]
        assert masks(queries, positives, negatives, groups, others) == expected, seed


def test_without_ids_nothing_is_masked():
    nothing = torch.zeros(3, 0, dtype=torch.long)
    found = false_negatives(torch.arange(3), nothing, nothing, nothing[:2])
    assert [mask.shape for mask in found] == [(3, 3), (3, 2), (3, 3)] and not any(map(torch.any, found))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [0, 4])
def test_definition(symmetric, count, monkeypatch):
    """In blocks, with fewer dimensions, for the queries of one process; gradients too."""
    monkeypatch.setattr(module, "SCORE_ROWS", 2)
    queries, positives = ids(*"aabcd"), ids(*"xyzye")
    negatives = ids(*"yzdb"[:count])
    embeddings = [torch.randn(len(x), 8, requires_grad=True) for x in (queries, positives, negatives)]
    own = torch.arange(1, 5)
    sides = [Side(*pair) for pair in zip(embeddings, (queries, positives, negatives))]
    loss = infonce(*sides, own, dims=[8, 3], temperature=0.1, symmetric=symmetric)
    found = torch.autograd.grad(loss, embeddings)
    of_positives, of_negatives, of_queries = false_negatives(own, queries, positives, negatives)
    expected = 0
    for dim in (8, 3):
        q, p, n = (F.normalize(x[:, :dim], dim=1) for x in embeddings)
        scores = (q[own] @ torch.cat([p, n]).T / 0.1).masked_fill(
            torch.cat([of_positives, of_negatives], 1), -torch.inf
        )
        part = F.cross_entropy(scores, own)
        if symmetric:
            back = (p[own] @ q.T / 0.1).masked_fill(of_queries, -torch.inf)
            part = (part + F.cross_entropy(back, own)) / 2
        expected = expected + part / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, embeddings, allow_unused=True, materialize_grads=True)
    )
