"""Metrics against hand-computed cases and pytrec_eval; rankings against a plain sort."""

import math

import numpy as np
import pytest
import pytrec_eval
import torch
from support.evaluation import LETTERS

from btok_hf.evaluation.metrics import METRICS, check_embeddings, query_metrics, rank, score


def metrics(ranking, relevance):
    """Of one query."""
    return {name: values[0] for name, values in query_metrics([list(ranking)], [relevance]).items()}


def discounted(*gains):
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))


def test_one_relevant_candidate_by_hand():
    found = metrics("abcdefghij", {"c": 1})
    assert [name for name in found if name.endswith("@5")] == [f"{metric}@5" for metric in METRICS]
    for k, hit in ((1, 0), (5, 1), (10, 1)):
        assert found[f"hit@{k}"] == hit
        assert found[f"precision@{k}"] == pytest.approx(hit / k)
        assert found[f"recall@{k}"] == hit
        assert found[f"f1@{k}"] == pytest.approx(hit * 2 / (k + 1))
        assert found[f"map@{k}"] == found[f"mrr@{k}"] == pytest.approx(hit / 3)
        assert found[f"ndcg_linear@{k}"] == found[f"ndcg_exponential@{k}"] == pytest.approx(hit / 2)


def test_several_relevant_candidates_by_hand():
    # Relevant are ranks 1, 4, 7 and one that is not ranked.
    found = metrics("abcdefghij", {"a": 1, "d": 1, "g": 1, "z": 1})
    assert found["precision@5"] == pytest.approx(2 / 5)
    assert found["recall@5"] == pytest.approx(2 / 4)
    assert found["f1@5"] == pytest.approx(2 * 0.4 * 0.5 / 0.9)
    assert found["map@1"] == 1  # divided by min(4, 1)
    assert found["map@5"] == pytest.approx((1 + 2 / 4) / 4)
    assert found["map@10"] == pytest.approx((1 + 2 / 4 + 3 / 7) / 4)
    assert found["mrr@10"] == 1
    assert found["ndcg_linear@5"] == pytest.approx(discounted(1, 0, 0, 1) / discounted(1, 1, 1, 1))


def test_grades_belong_to_names_in_any_order():
    ranking, graded = "abcdef", {"a": 1, "c": 3, "e": 2}
    linear = discounted(1, 0, 3, 0, 2) / discounted(3, 2, 1)
    exponential = discounted(1, 0, 7, 0, 3) / discounted(7, 3, 1)
    for order in (graded, dict(reversed(graded.items())), dict(sorted(graded.items(), key=lambda pair: pair[1]))):
        found = metrics(ranking, order)
        assert found["ndcg_linear@5"] == pytest.approx(linear)
        assert found["ndcg_exponential@5"] == pytest.approx(exponential)
        assert found["ndcg_linear@1"] == pytest.approx(1 / 3)
    assert metrics("cea", graded)["ndcg_exponential@10"] == pytest.approx(1)


def test_more_relevant_candidates_than_the_cutoff():
    found = metrics(LETTERS, dict.fromkeys(LETTERS, 1.0))
    assert found["ndcg_linear@10"] == found["map@10"] == found["precision@10"] == 1
    assert found["recall@10"] == pytest.approx(10 / 16)


def test_empty_gold_and_short_rankings():
    found = metrics("abc", {})
    assert {value for name, value in found.items() if name.startswith("recall")} == {1}
    assert {value for name, value in found.items() if not name.startswith("recall")} == {0}
    assert metrics("ab", {"b": 1})["precision@10"] == pytest.approx(1 / 10)
    assert metrics("", {"b": 1})["mrr@10"] == 0


def test_many_queries_are_each_one_by_itself():
    rng = np.random.default_rng(0)
    rankings = [rng.permutation(list(LETTERS)).tolist() for _ in range(50)]
    graded = [
        {name: float(rng.integers(1, 4)) for name in rng.permutation(list(LETTERS))[: row % 7]} for row in range(50)
    ]
    together = query_metrics(rankings, graded)
    for row in range(50):
        assert metrics(rankings[row], graded[row]) == {name: values[row] for name, values in together.items()}
    means = score(rankings, graded)
    assert list(means) == [*together, "num_pred", "num_data", "num_candidates"]
    assert means["num_pred"] == means["num_data"] == 50 and means["num_candidates"] == len(LETTERS)
    assert means["f1@5"] == pytest.approx(together["f1@5"].mean())


def test_agrees_with_pytrec_eval():
    rng = np.random.default_rng(1)
    runs, qrels, rankings = {}, {}, []
    for row in range(200):
        ranking = rng.permutation(list(LETTERS)).tolist()
        chosen = rng.permutation(list(LETTERS))[: rng.integers(1, 6)]  # at most 5: map@5 and @10 agree
        runs[str(row)] = {name: float(-place) for place, name in enumerate(ranking)}
        qrels[str(row)] = {str(name): int(rng.integers(1, 4)) for name in chosen}
        rankings.append(ranking)
    measures = {"ndcg_cut": "ndcg_linear", "map_cut": "map", "P": "precision", "recall": "recall", "success": "hit"}
    wanted = {f"{measure}.1,5,10" for measure in measures}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(runs)
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    ours = query_metrics(rankings, list(qrels.values()))
    for k in (1, 5, 10):
        for theirs_name, name in measures.items():
            if (name, k) != ("map", 1):  # pytrec_eval divides by all relevant candidates, even if they are more than k
                expected = [theirs[row][f"{theirs_name}_{k}"] for row in runs]
                assert ours[f"{name}@{k}"] == pytest.approx(expected, abs=1e-6), (name, k)
        cut = {row: dict(list(run.items())[:k]) for row, run in runs.items()}
        expected = [values["recip_rank"] for values in reciprocal.evaluate(cut).values()]
        assert ours[f"mrr@{k}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("ranking", "relevance", "message"),
    [
        ("aba", {"a": 1}, "Query 1 ranks 'a' more than once"),
        ("abc", {"a": 0}, "Query 1 gives 'a' the grade 0"),
        ("abc", {"a": -1}, "grade -1"),
        ("abc", {"a": math.nan}, "grade nan"),
        ("abc", {"a": math.inf}, "grade inf"),
        ("abc", {"a": 1000}, "grade 1000. Grades are above 0 and below 1000"),
    ],
)
def test_refused_rankings(ranking, relevance, message):
    with pytest.raises(ValueError, match=message):
        query_metrics(["xyz", ranking], [{"x": 1}, relevance])


def test_refused_numbers_of_queries():
    with pytest.raises(ValueError, match="2 rankings and grades for 1"):
        score(["a", "b"], [{"a": 1}])
    with pytest.raises(ValueError, match="no queries"):
        score([], [])


def test_rank_is_a_stable_sort_whatever_the_blocks():
    rng = np.random.default_rng(2)
    candidates = rng.normal(size=(700, 24)).astype(np.float32)
    candidates[[5, 300, 301, 699]] = candidates[42]  # equally similar to anything
    candidates[600:650] = -candidates[42]
    queries = np.concatenate([rng.normal(size=(600, 24)), candidates[[42]], -candidates[[42]]]).astype(np.float32)
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (queries.astype(float), candidates.astype(float))]
    similarities = (unit[0] @ unit[1].T).astype(np.float32)
    similarities[:, [5, 300, 301, 699]] = similarities[:, [42]]
    similarities[:, 600:650] = similarities[:, [600]]
    expected = np.argsort(-similarities, axis=1, kind="stable")
    assert expected[-2, :5].tolist() == [5, 42, 300, 301, 699]
    assert expected[-1, :50].tolist() == list(range(600, 650))
    for size in (13, 64, 699, 700):
        blocks = [candidates[start : start + size] for start in range(0, 700, size)]
        assert (rank(queries, blocks, 100) == expected[:, :100]).all(), size
        assert (rank(queries, blocks, 700) == expected).all(), size
    assert rank(queries[:2], [candidates[:3]], 100).shape == (2, 3)
    lengths = [2.0 ** rng.integers(-60, 60, (len(x), 1)).astype(np.float32) for x in (queries, candidates)]
    assert (rank(queries * lengths[0], [candidates * lengths[1]], 100) == expected[:, :100]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_neighbouring_similarities(sign):
    """Similarities a few units of float32's last place apart, and ties among them, above and below zero."""
    angles = np.random.default_rng(3).uniform(1, 1 + 1e-5, 300)
    candidates = np.stack([sign * np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    unit = candidates.astype(float)
    similarities = (unit[:, 0] / np.linalg.norm(unit, axis=1)).astype(np.float32)
    assert 50 < len(set(similarities)) < 300
    expected = np.argsort(-similarities, kind="stable")
    blocks = [candidates[:100], candidates[100:]]
    assert (rank(np.array([[1, 0]], np.float32), blocks, 300)[0] == expected).all()


def test_zero_similarity_is_one_value():
    # The second candidate's similarity is -1e-48, which float32 rounds to -0: a tie with the zeros behind it.
    candidates = np.array([[-1, 1], [-1e-38, 1e10], [0, 1], [1, 1], [0, 1]], np.float32)
    assert rank(np.array([[1, 0]], np.float32), [candidates], 5).tolist() == [[3, 1, 2, 4, 0]]


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[1, 2], [np.nan, 1], [np.inf, 1]], "embedding of candidate 'b' holds NaN or infinite .*2 of 3 rows"),
        ([[1, 2], [1, 1], [0, 0]], "embedding of candidate 'c' holds nothing but zeros"),
        ([[1, 2], [1, 1]], r"shape \(2, 2\) for candidate 'a' to candidate 'c'"),
        ([[1, 2]] * 4, r"shape \(4, 2\) for candidate 'a' to candidate 'c'"),
        ([[1, 2, 3]] * 3, r"shape \(3, 3\) .* \(3, 2\) was expected"),
        ([1, 2, 3], r"shape \(3,\)"),
    ],
)
def test_refused_embeddings(embeddings, message):
    with pytest.raises(ValueError, match=message):
        check_embeddings(np.array(embeddings), ["candidate 'a'", "candidate 'b'", "candidate 'c'"], dimension=2)


def test_tensors_are_embeddings_too():
    checked = check_embeddings(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), ["a", "b"])
    assert checked.dtype == np.float32 and (checked == 1).all()
