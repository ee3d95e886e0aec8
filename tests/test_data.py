"""Pair files and their cells."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from support.media import image
from support.training import collator

from btok_hf import BTokSentenceTransformer
from btok_hf.media import video_input
from btok_hf.training.cells import as_input
from btok_hf.training.data import load_pairs
from btok_hf.training.evaluator import retrieval_evaluator


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
    # The hashes are those of files here, and those of pixels there.
    tensors = {key for key, value in expected.items() if torch.is_tensor(value) and not key.endswith("hashes")}
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in tensors)
    dataset.to_parquet(tmp_path / "pairs.parquet")
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.parquet"))
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0


def test_images_beside_a_path_keep_their_bytes(tmp_path, own_cache):
    """`datasets` would decode a JPEG in a dict and encode it again, with loss."""
    content = io.BytesIO()
    image(40, 40).save(content, "JPEG", quality=30)
    image(40, 40, 7).save(tmp_path / "a.png")
    feature = {"image": Image(), "text": Value("string")}
    features = Features({"query": feature, "positive": Image()})
    stored = {"bytes": content.getvalue(), "path": "a.png"}
    rows = [{"query": {"image": stored, "text": "x"}, "positive": {"bytes": None, "path": "a.png"}}]
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "pairs.parquet")
    pairs = load_pairs(str(tmp_path / "pairs.parquet"))
    assert pairs.features == features
    (row,) = pairs.data.to_pylist()
    assert row["query"]["image"]["bytes"] == content.getvalue()
    assert row["positive"] == {"bytes": None, "path": str(tmp_path / "a.png")}
    assert pairs[0]["positive"].size == (40, 40)


def test_a_dataset_has_configurations_splits_and_columns(tmp_path, own_cache):
    for name, split, word in (("en", "train", "a"), ("en", "validation", "b"), ("de", "train", "c")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        rows = {"anchor": [word] * 4, "answer": ["x"] * 4, "id": [1] * 4}
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / name / f"{split}.parquet")
    card = "configs:\n- {config_name: en, data_dir: en}\n- {config_name: de, data_dir: de}\n"
    (tmp_path / "data" / "README.md").write_text(f"---\n{card}---\n")
    folder, columns = str(tmp_path / "data"), {"query": "anchor", "positive": "answer"}
    assert load_pairs(folder, name="de", columns=columns)[0] == {"query": "c", "positive": "x"}
    part = load_pairs(folder, name="en", split="validation[:50%]", columns=columns)
    assert part["query"][:] == ["b", "b"]
    with pytest.raises(ValueError, match=r"Config name is missing.*\n?.*'(en|de)'"):
        load_pairs(folder, columns=columns)
    with pytest.raises(ValueError, match=r"has no columns \['question'\], which columns names. It has \['anchor'"):
        load_pairs(folder, name="en", columns={"query": "question", "positive": "answer"})
    with pytest.raises(ValueError, match="names a column twice"):
        load_pairs(folder, name="en", columns={"query": "answer", "positive": "answer"})
    with pytest.raises(ValueError, match=r"must map columns of pairs to its own, got \['query'\]"):
        load_pairs(folder, name="en", columns=["query"])
    with pytest.raises(ValueError, match="has no revision, got 'main'"):
        load_pairs(folder, name="en", revision="main")
    (tmp_path / "pairs.csv").write_text("a,b\nx,y\n")
    assert load_pairs(str(tmp_path / "pairs.csv"), columns={"query": "b", "positive": "a"})[0]["query"] == "y"
    with pytest.raises(ValueError, match=r"pairs\.csv' has no split: only datasets have"):
        load_pairs(str(tmp_path / "pairs.csv"), split="test")


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


def test_commas_in_csv_files_are_found_by_line(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('query,positive\n"a, b",c\nred, round,apple\n')
    with pytest.raises(ValueError, match=r"line 3 has 3 cells and the header 2: texts with commas need quotation"):
        load_pairs(str(path))
    path.write_text('query,positive\nq0,p0\n"q1 5 inch,p1\nq2,p2\n"q3",p3\n')  # would be two rows
    with pytest.raises(
        ValueError, match=r"line 5: ',' expected after '\"'\. A text that begins with a quotation mark"
    ):
        load_pairs(str(path))
    path.write_text('"query,positive\na,b\n')
    with pytest.raises(ValueError, match=r"line 2: unexpected end of data\. A text that begins"):
        load_pairs(str(path))
    path.write_text('query,positive\n"a ""b"", c\nd",5" disk\n')
    assert list(load_pairs(str(path))) == [{"query": 'a "b", c\nd', "positive": '5" disk'}]
    long = "x" * 200_000  # more than the csv module takes by default
    path.write_text(f'query,positive\n"a, b",{long}\nonly\n')
    rows = list(load_pairs(str(path)))
    assert rows == [{"query": "a, b", "positive": long}, {"query": "only", "positive": None}]


def test_the_index_of_pandas_in_csv_files_is_named(tmp_path):
    path = tmp_path / "pairs.csv"
    for header in (",query,positive", "query,positive,"):
        path.write_text(f"{header}\n0,a,b\n")
        with pytest.raises(ValueError, match=rf"header has a column without a name: {header}\. .*index=False"):
            load_pairs(path)
    path.write_text("query,positive\na,b\n")
    assert list(load_pairs(path)) == [{"query": "a", "positive": "b"}]
    assert retrieval_evaluator(path).name == "pairs"
    for given in ([{"query": "a"}], pa.table({"query": ["a"]})):
        for read in (load_pairs, retrieval_evaluator):
            with pytest.raises(
                ValueError, match=r"takes a path or an id of the Hub, got (list|Table)\. Make a dataset"
            ):
                read(given)


def test_csv_files_leave_the_limit_of_the_process(tmp_path):
    (tmp_path / "pairs.csv").write_text("query,positive\na,b\n")
    before = csv.field_size_limit(1000)
    try:
        load_pairs(str(tmp_path / "pairs.csv"))
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_a_file_is_read_once_and_again_when_its_pictures_come(tmp_path, own_cache):
    """`datasets` caches what is made of a file, by the function and not by the pictures beside it."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"query": "q", "positive": {"image": f"{name}.png"}}) for name in "ab"))
    image(40, 40).save(tmp_path / "b.png")
    assert load_pairs(str(path))["positive"] == [{"image": "a.png"}, {"image": str(tmp_path / "b.png")}]
    image(40, 40).save(tmp_path / "a.png")
    assert load_pairs(str(path))[0]["positive"] == {"image": str(tmp_path / "a.png")}
    before = sorted((tmp_path / "cache").rglob("*.arrow"))
    assert load_pairs(str(path))[0]["positive"] == {"image": str(tmp_path / "a.png")}
    assert before and sorted((tmp_path / "cache").rglob("*.arrow")) == before
    cell = {"bytes": None, "path": "b.png"}
    Dataset.from_list([{"query": "q", "positive": {"image": cell}}]).to_parquet(tmp_path / "pairs.parquet")
    found = load_pairs(str(tmp_path / "pairs.parquet"))[0]["positive"]["image"]
    assert found == {"bytes": None, "path": str(tmp_path / "b.png")}


def test_a_file_of_a_dict_needs_no_suffix(tmp_path, monkeypatch):
    image(40, 40).save(tmp_path / "0001", "png")
    cells = [{"image": "0001", "text": "0001"}, {"image": ["0001", "0002"]}, "0001"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"query": "q", "positive": cell}) for cell in cells))
    there = str(tmp_path / "0001")
    found = [{"image": there, "text": "0001"}, {"image": [there, "0002"]}, {"text": "0001"}]
    assert load_pairs(str(path))["positive"] == found


TEXTS = ["0001", "null", "true", "1e5", "[1]", '{"image": "a.png"}', '"quoted"', "NaN", "plain", "a.png"]


@pytest.mark.parametrize("other", [[{"image": "a.png"}], [{"image": "7"}, {"image": ["a.png", "b.png"]}]])
def test_a_text_beside_dicts_stays_a_text_whatever_it_looks_like(tmp_path, other):
    """`datasets` stores such columns as JSON, and texts that are JSON as what they stand for."""
    path = tmp_path / "pairs.jsonl"
    cells = [*other, *TEXTS]
    rows = [{"query": "q", "positive": cell, "negatives": [cell, "x"]} for cell in cells]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    expected = [*other, *({"text": text} for text in TEXTS[:-2]), *TEXTS[-2:]]
    for found in (load_pairs(str(path)), load_pairs(str(path)).map(lambda row: {"target": "t"})):
        assert list(found["positive"]) == expected
        assert list(found["negatives"]) == [[cell, "x"] for cell in expected]


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
        assert as_input(pairs[0]["negatives"]) == [None, expected]
    if suffix == "jsonl":  # a space in a name, messages, and dicts of different keys
        image(56, 56).save(folder / "images" / "my cat.PNG")
        part = {"type": "image", "image": "images/a.png"}
        cells = ["images/my cat.PNG", {"text": "x"}, {"image": "images/a.png"}, [{"role": "user", "content": [part]}]]
        for name, chosen in (("0", cells[:1]), ("mixed", cells[1:3]), ("3", cells[3:])):
            lines = [json.dumps({"query": "q", "positive": cell}) + "\n" for cell in chosen]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        assert load_pairs("../data/0.jsonl")["positive"] == [str(folder / "images" / "my cat.PNG")]
        mixed = as_input(load_pairs("../data/mixed.jsonl")[1]["positive"])
        assert mixed == {"image": str(folder / "images" / "a.png")}
        content = load_pairs("../data/3.jsonl")[0]["positive"][0]["content"]
        assert content[0]["image"] == str(folder / "images" / "a.png")
        negatives = [[{"image": "images/a.png"}, {"text": "x"}]]  # Arrow has no type for lists of them
        (folder / "4.jsonl").write_text(json.dumps({"query": "q", "positive": "p", "negatives": negatives[0]}))
        assert load_pairs("../data/4.jsonl")[0]["negatives"][0]["image"] == str(folder / "images" / "a.png")
    evaluator = retrieval_evaluator(f"../data/pairs.{suffix}")
    assert evaluator(BTokSentenceTransformer(repo, device="cpu"))["pairs_cosine_accuracy@10"] == 1.0


def test_videos_in_columns_are_videos_again():
    video = video_input(np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), 2.0)
    stored = Dataset.from_list(
        [{"positive": {"video": video, "text": "t"}}, {"positive": {"video": None, "text": "u"}}]
    )
    cell = as_input(stored[0]["positive"])
    assert cell["video"]["array"].dtype == np.uint8 and np.array_equal(cell["video"]["array"], video["array"])
    assert cell["video"]["video_metadata"] == video["video_metadata"]
    assert as_input(stored[1]["positive"]) == {"text": "u"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("latin.csv", "query,positive\nä,b\n".encode("latin-1")),
        ("latin.jsonl", '{"query": "ä", "positive": "b"}\n'.encode("latin-1")),
        ("dates.jsonl", '{"query": "2026-11-26", "positive": "ä"}\n'.encode("latin-1")),
        ("empty.csv", b"query,positive\n"),
        ("large.jsonl", b'{"query": 1e400000, "positive": ' + b"9" * 5000 + b"}"),
        ("cut.json", b'[{"query": "a", "pos'),
        ("cut.parquet", b"PAR1cut"),
        ("comma.csv", b"query,positive\nred, round fruit,apple\nlong, yellow fruit,banana\n"),
        ("once.csv", b"query,positive\na,b\nred, round fruit,apple\n"),
        ("twice.csv", b"query,positive,positive\na,b,c\n"),
    ],
)
def test_damaged_pair_files_are_named(tmp_path, own_cache, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^Pair file '.*{name}' cannot be read"):
        load_pairs(str(tmp_path / name))
