"""Retrieval metrics of pairs."""

import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from support.media import image

from btok_hf import BTokSentenceTransformer
from btok_hf.training.evaluator import retrieval_evaluator


def test_images_in_dicts_are_told_apart_by_their_content(tmp_path):
    """Images are compared by their files, not by the object or the file name."""
    cells = [{"image": image(40, 40, i % 10), "text": "a"} for i in range(30)]
    features = Features({"query": Value("string"), "positive": {"image": Image(), "text": Value("string")}})
    pairs = {"query": [f"q{i}" for i in range(30)], "positive": cells}
    Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / "pairs.parquet")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.parquet"))
    assert (len(evaluator.queries), len(evaluator.corpus)) == (30, 10)


def test_images_to_evaluate_on_are_decoded_in_parts(tmp_path, repo, monkeypatch):
    """In memory they are files: decoded, they would take many times the space in every process."""
    features = Features({"query": Value("string"), "positive": Image()})
    pairs = {"query": [f"q{i}" for i in range(5)], "positive": [image(56, 84, i) for i in range(5)]}
    pairs = Dataset.from_dict(pairs, features=features)
    evaluator, model = retrieval_evaluator(pairs), BTokSentenceTransformer(repo, device="cpu")
    whole = evaluator(model)
    assert all(set(cell) == {"bytes", "path"} for cell in list.__iter__(evaluator.corpus))
    assert [picture.tobytes() for picture in evaluator.corpus] == [image(56, 84, i).tobytes() for i in range(5)]
    given, encode = [], model.encode_document
    monkeypatch.setattr(
        model, "encode_document", lambda part, **options: given.append(part) or encode(part, **options)
    )
    monkeypatch.setattr("btok_hf.training.evaluator.MEDIA_ROWS", 2)
    assert evaluator(model) == pytest.approx(whole)
    assert [[type(value).__name__ for value in part] for part in given] == [["Image"] * 2, ["Image"] * 2, ["Image"]]


def test_datasets_in_memory_are_evaluated_like_files(tmp_path):
    rows = Dataset.from_dict({"query": ["a", "b", "a"], "positive": ["x", "y", "z"]})
    rows.to_json(tmp_path / "file.jsonl")
    given, read = retrieval_evaluator(rows, name="mine"), retrieval_evaluator(str(tmp_path / "file.jsonl"))
    assert (given.name, read.name, retrieval_evaluator(rows).name) == ("mine", "file", "pairs")
    assert (given.queries, given.corpus, given.relevant_docs) == (read.queries, read.corpus, read.relevant_docs)
    with pytest.raises(ValueError, match="unknown"):
        retrieval_evaluator(rows.rename_column("query", "anchor"))


def test_rows_of_one_group_answer_each_other(tmp_path):
    path = tmp_path / "pairs.jsonl"
    cats, ants = ["a", "list"], ["ants"]
    rows = [("tiger", "a cat", cats), ("Tiger", "big cat", cats), ("ant", "insect", None), ("ant", "small", ants)]
    rows.append((None, "six legs", ants))
    path.write_text("\n".join(json.dumps(dict(zip(("query", "positive", "group"), row))) for row in rows))
    evaluator = retrieval_evaluator(str(path))
    names = dict(zip(evaluator.corpus_ids, evaluator.corpus))
    found = {
        query: {names[key] for key in evaluator.relevant_docs[asked]}
        for asked, query in zip(evaluator.queries_ids, evaluator.queries)
    }
    assert found == {
        "tiger": {"a cat", "big cat"},
        "Tiger": {"a cat", "big cat"},
        "ant": {"insect", "small", "six legs"},
    }


class Vectors:
    """A model of given vectors. `similarity` counts how many scores it made at once."""

    similarity_fn_name = "cosine"
    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_, **__: None)

    def __init__(self, vector):
        self.vector, self.sizes = vector, []

    def encode_query(self, inputs, **_):
        return torch.tensor(np.array([self.vector(item) for item in inputs]))

    encode_document = encode_query

    def similarity(self, queries, candidates):
        scores = queries @ candidates.T
        self.sizes.append(scores.numel())
        return scores


def test_a_query_is_not_ranked_against_itself():
    """Pairs in both directions: every text is a query and a candidate. Half of them are most similar to themselves."""
    texts = [f"{number} {side}" for number in range(30) for side in "ab"]
    pairs = {text: f"{text.split()[0]} {'b' if text.endswith('a') else 'a'}" for text in texts}
    rows = Dataset.from_dict({"query": list(pairs), "positive": list(pairs.values())})

    def vector(text):
        number, side = text.split()
        return np.eye(30)[int(number)] + 0.01 * (side == "a")

    found = retrieval_evaluator(rows)(Vectors(vector))
    assert found == {**found, **dict.fromkeys(["pairs_cosine_accuracy@1", "pairs_cosine_mrr@60"], 1.0)}
    assert found["pairs_cosine_ndcg@10"] == found["pairs_cosine_map@100"] == 1.0
    # Nor if a group, which is that of a pair here, has it among the right answers of all its queries.
    grouped = rows.add_column("group", [text.split()[0] for text in pairs])
    assert retrieval_evaluator(grouped)(Vectors(vector)) == found
    apart = dict(zip(texts, np.eye(60)))  # the other side is as far as all others
    found = retrieval_evaluator(grouped)(Vectors(apart.get))
    assert found["pairs_cosine_accuracy@1"] < 0.1
    # An input that is its own answer is found.
    found = retrieval_evaluator(Dataset.from_dict({"query": texts[::2], "positive": texts[::2]}))(Vectors(vector))
    assert found["pairs_cosine_accuracy@1"] == 1.0


def test_the_queries_of_a_large_group_share_their_answers():
    """Also if they are candidates themselves: a set for each of them would take memory by the square of the group."""
    one, other = ([f"{side} {number}" for number in range(400)] for side in "ab")
    rows = {"query": one + other, "positive": other + one, "group": ["g"] * 800}
    tracemalloc.start()
    evaluator = retrieval_evaluator(Dataset.from_dict(rows))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6
    for asked, answers in evaluator.relevant_docs.items():
        assert len(answers) == len({*answers}) == 799 and asked not in answers and asked not in {*answers}


def test_metrics_are_those_of_the_base_class_in_little_memory(monkeypatch):
    """Also with several answers and ties, and if the scores are made in parts."""
    rng = np.random.default_rng(0)
    known = {}

    def vector(text):  # of small integers: many candidates are equally similar
        return known.setdefault(text, rng.integers(-1, 2, 4)).astype(np.float32)

    rows = [(f"q{rng.integers(150)}", f"p{rng.integers(300)}") for _ in range(400)]
    rows = Dataset.from_dict(dict(zip(("query", "positive"), map(list, zip(*rows)))))
    evaluator = retrieval_evaluator(rows)
    base = InformationRetrievalEvaluator(
        dict(zip(evaluator.queries_ids, evaluator.queries)),
        dict(zip(evaluator.corpus_ids, evaluator.corpus)),
        evaluator.relevant_docs,
        name="pairs",
        **{f"{name}_at_k": getattr(evaluator, f"{name}_at_k") for name in ("accuracy", "mrr", "ndcg", "map")},
        precision_recall_at_k=evaluator.precision_recall_at_k,
    )
    model = Vectors(vector)
    expected = base(model)
    assert evaluator(model) == expected and len(expected) == 9
    assert evaluator.description == base.description and evaluator.primary_metric == base.primary_metric
    assert 0.02 < expected[f"pairs_cosine_mrr@{len(evaluator.corpus)}"] < 0.5
    model.sizes.clear()
    monkeypatch.setattr("btok_hf.training.evaluator.SCORES_AT_ONCE", 1000)
    assert evaluator(model) == expected and len(model.sizes) > 20 and max(model.sizes) <= 1000
    listed, held = [], []

    def compute(hits):
        held.append(tracemalloc.get_traced_memory()[0] - before)
        listed.extend(hits)
        return base.compute_metrics(hits)

    monkeypatch.setattr(evaluator, "compute_metrics", compute)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    evaluator(model)
    tracemalloc.stop()
    assert max(held) < 2000 * len(listed)  # bytes of objects a query; its 100 dicts are more than 20,000
    assert {len(hits) for hits in listed} == {100}  # and not all candidates


def test_pairs_that_cannot_be_evaluated(tmp_path):
    def evaluator(*rows, name="pairs.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return retrieval_evaluator(str(tmp_path / name))

    good = {"query": "a", "positive": "b"}
    assert len(evaluator(good, {"query": None, "positive": "c"}).corpus) == 2
    with pytest.raises(ValueError, match=r"Row 1 of .*pairs\.jsonl: its positive is empty"):
        evaluator(good, {"query": "c", "positive": None})
    with pytest.raises(ValueError, match=r"Row 2 of .*: its query names 'gone\.png', a file that does not exist"):
        evaluator(good, good, {"query": "gone.png", "positive": "b"})
    with pytest.raises(ValueError, match="no row with a query: there is nothing to evaluate"):
        evaluator({"query": None, "positive": "c"})
    with pytest.raises(ValueError, match="Row 0 of the pairs: its positive is empty"):
        retrieval_evaluator(Dataset.from_list([{"query": "a", "positive": " "}]))


def test_groups_are_words(tmp_path, monkeypatch):
    """Also if files are called like them, which might have equal contents."""
    monkeypatch.chdir(tmp_path)
    rows = [{"query": name, "positive": "of " + name, "group": group} for name, group in zip("ab", ("g1", "g2"))]
    for group in ("g1", "g2"):
        (tmp_path / group).touch()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert [len(found) for found in retrieval_evaluator("pairs.jsonl").relevant_docs.values()] == [1, 1]
