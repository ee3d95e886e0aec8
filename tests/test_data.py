"""Pair files, their cells, and the evaluator over them."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from support.media import image
from support.training import collator

from btok_hf import BTokSentenceTransformer
from btok_hf.media import video_input
from btok_hf.training.data import decode_cell, first_rows, load_pairs, retrieval_evaluator


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


def test_cells_of_csv_files_are_texts(tmp_path):
    path = tmp_path / "a[1].csv"
    path.write_text(
        "query,positive,group\nnull,NA,007\n12,2026-11-26,None\n,only a candidate,x\n", encoding="utf-8-sig"
    )
    rows = list(load_pairs(str(path)))
    assert rows[0] == {"query": "null", "positive": "NA", "group": "007"}
    assert rows[1] == {"query": "12", "positive": "2026-11-26", "group": "None"}
    assert rows[2]["query"] is None


def test_texts_of_json_lines_that_look_like_dates_are_texts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"query": "2026-11-26", "positive": {"text": "2026-11-26T10:00:00"}, "negatives": ["2020-01-02"]}\n'
        '\n{"query": "2026-01-02", "positive": {"text": "1999-12-31T00:00:00"}, "negatives": []}\n'
    )
    rows = list(load_pairs(str(path)))
    assert rows[0] == {
        "query": "2026-11-26",
        "positive": {"text": "2026-11-26T10:00:00"},
        "negatives": ["2020-01-02"],
    }
    path.write_text('{"query": "2026-11-27", "positive": {"text": "1999-12-31T00:00:00"}}\n')
    assert load_pairs(str(path))[0]["query"] == "2026-11-27"  # a changed file is read again
    path = tmp_path / "list.json"
    path.write_text('[{"query": "2026-11-26", "positive": "a"}, {"query": "2026-11-26", "positive": "b"}]')
    assert load_pairs(str(path))["query"] == ["2026-11-26"] * 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_relative_paths_start_at_the_pair_file(repo, tmp_path, monkeypatch, suffix):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place, width in ((folder, 56), (elsewhere, 84)):
        (place / "images").mkdir(parents=True)
        image(width, 56).save(place / "images" / "a.png")
    image(112, 56).save(elsewhere / "images" / "b.png")
    queries = ["a text", "images/b.png", "images/a.png"]
    rows = Dataset.from_dict({"query": queries, "positive": ["x", "y", "z"], "target": ["images/a.png"] * 3})
    if suffix != "csv":
        rows = rows.add_column("negatives", [[None, {"image": ["images/a.png"], "text": "images/a.png"}]] * 3)
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](folder / f"pairs.{suffix}")
    monkeypatch.chdir(elsewhere)
    pairs = load_pairs(f"../data/pairs.{suffix}")
    assert pairs["query"] == ["a text", "images/b.png", str(folder / "images" / "a.png")]
    assert pairs["target"] == ["images/a.png"] * 3  # a text
    if suffix != "csv":
        expected = {"image": [str(folder / "images" / "a.png")], "text": "images/a.png"}
        assert decode_cell(pairs[0]["negatives"]) == [None, expected]
    if suffix == "jsonl":  # a space in a name, messages, and dicts of different keys
        image(56, 56).save(folder / "images" / "my cat.PNG")
        part = {"type": "image", "image": "images/a.png"}
        cells = ["images/my cat.PNG", {"text": "x"}, {"image": "images/a.png"}, [{"role": "user", "content": [part]}]]
        for name, chosen in (("0", cells[:1]), ("mixed", cells[1:3]), ("3", cells[3:])):
            lines = [json.dumps({"query": "q", "positive": cell}) + "\n" for cell in chosen]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        assert load_pairs("../data/0.jsonl")["positive"] == [str(folder / "images" / "my cat.PNG")]
        mixed = decode_cell(load_pairs("../data/mixed.jsonl")[1]["positive"])
        assert mixed == {"image": str(folder / "images" / "a.png")}
        content = load_pairs("../data/3.jsonl")[0]["positive"][0]["content"]
        assert content[0]["image"] == str(folder / "images" / "a.png")
    evaluator = retrieval_evaluator(f"../data/pairs.{suffix}")
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0


def test_videos_in_columns_are_videos_again():
    video = video_input(np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), 2.0)
    stored = Dataset.from_list(
        [{"positive": {"video": video, "text": "t"}}, {"positive": {"video": None, "text": "u"}}]
    )
    cell = decode_cell(stored[0]["positive"])
    assert cell["video"]["array"].dtype == np.uint8 and np.array_equal(cell["video"]["array"], video["array"])
    assert cell["video"]["video_metadata"] == video["video_metadata"]
    assert decode_cell(stored[1]["positive"]) == {"text": "u"}


def test_streamed_datasets_are_refused():
    with pytest.raises(ValueError, match=r"'a' is streamed .IterableDataset.*Load it without streaming"):
        first_rows({"a": Dataset.from_list([{"query": "a"}]).to_iterable_dataset()})


@pytest.mark.parametrize(
    "name, content",
    [
        ("latin.csv", "query,positive\nä,b\n".encode("latin-1")),
        ("empty.csv", b"query,positive\n"),
        ("large.jsonl", b'{"query": 1e400000, "positive": ' + b"9" * 5000 + b"}"),
        ("cut.json", b'[{"query": "a", "pos'),
        ("cut.parquet", b"PAR1cut"),
    ],
)
def test_damaged_pair_files_are_named(tmp_path, own_cache, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^Pair file '.*{name}' cannot be read"):
        load_pairs(str(tmp_path / name))
