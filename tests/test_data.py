"""Pair files, their cells, and the evaluator over them."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from support.media import image
from support.training import collator

from btok_hf import BTokSentenceTransformer
from btok_hf.training.data import load_pairs, retrieval_evaluator


def test_dicts_are_what_they_were_before_arrow(repo, tmp_path):
    """Arrow gives all dicts of a column the same keys, and `datasets` encodes the images in them."""
    pairs = [
        {"query": {"text": "a"}, "positive": "x"},
        {"query": {"image": [image(60, 40), image(56, 84)], "text": "both"}, "positive": "y"},
        {"query": {"image": [image(60, 40)]}, "positive": "z"},
    ]
    dataset = Dataset.from_list(pairs)
    assert dataset[0]["query"]["image"] is None and dataset[2]["query"]["text"] is None
    assert set(dataset[2]["query"]["image"][0]) == {"bytes", "path"}
    collate, _ = collator(repo, tmp_path)
    actual, expected = collate(list(dataset)), collate(pairs)
    tensors = {key for key, value in expected.items() if torch.is_tensor(value)}
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in tensors)
    dataset.to_parquet(tmp_path / "pairs.parquet")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.parquet"))
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0


def test_images_in_dicts_are_told_apart_by_their_pixels(tmp_path):
    """Images are compared by pixels, not by the object or the file name."""
    cells = [{"image": image(40, 40, i % 10), "text": "a"} for i in range(30)]
    features = Features({"query": Value("string"), "positive": {"image": Image(), "text": Value("string")}})
    pairs = {"query": [f"q{i}" for i in range(30)], "positive": cells}
    Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / "pairs.parquet")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.parquet"))
    assert (len(evaluator.queries), len(evaluator.corpus)) == (30, 10)


def test_pair_files(tmp_path, repo):
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "a", "positive": "c"}\n')
    (tmp_path / "pairs.csv").write_text("query,positive\nx,y\n")
    assert load_pairs(str(tmp_path / "pairs.jsonl"))[1] == {"query": "a", "positive": "c"}
    assert load_pairs(str(tmp_path / "pairs.csv"))[0] == {"query": "x", "positive": "y"}
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        load_pairs(str(tmp_path / "none.parquet"))
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(ValueError, match="unknown format"):
        load_pairs(str(tmp_path / "pairs.txt"))
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.jsonl"))
    assert len(evaluator.queries) == 1 and len(evaluator.corpus) == 2
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0
