"""Hard negatives: compared with Sentence-Transformers on texts, and with plain numpy on everything else."""

import re

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value
from sentence_transformers.util import mine_hard_negatives as of_sentence_transformers
from support.media import image
from support.pictures import colours
from support.training import config

from btok_hf import cli
from btok_hf.content import content_hash
from btok_hf.training import CondensationTrainer
from btok_hf.training.data import decode_cell, load_pairs
from btok_hf.training.mining import mine_hard_negatives

WORDS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown", "gold", "lime", "navy", "teal"]


def text_pairs():
    return Dataset.from_dict({"query": [f"find {w}" for w in WORDS], "positive": [f"a {w} thing" for w in WORDS]})


@pytest.mark.parametrize("use_faiss", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"range_max": 3},
        {"range_max": 8, "range_min": 2, "num_negatives": 2},
        {"range_max": 11, "max_score": 0.9, "min_score": 0.2},
        {"range_max": 11, "absolute_margin": 0.01},
        {"range_max": 11, "relative_margin": 0.02},
    ],
)
def test_texts_as_in_sentence_transformers(model, tmp_path, options, use_faiss):
    pairs = text_pairs()
    expected = of_sentence_transformers(pairs, model, output_format="triplet", verbose=False, **options)
    mine_hard_negatives(pairs, model, tmp_path / "out.parquet", use_faiss=use_faiss, **options)
    mined = load_pairs(str(tmp_path / "out.parquet"))
    triplets = [(row["query"], row["positive"], other) for row in mined for other in row["negatives"]]
    assert triplets == [tuple(row.values()) for row in expected] and triplets
    assert mined["query"] == pairs["query"]  # rows with fewer negatives are kept


def mixed_pairs():
    """Texts to images, with copies of a positive, groups, a query with two positives, and candidates only."""
    images = [colours(56 + 28 * i, 56) for i in range(7)]
    rows = [(f"find {word}", image, None) for word, image in zip(WORDS, images)]
    rows += [("find red", images[1], None), ("find teal", images[2].copy(), "g"), ("find navy", images[3], "g")]
    rows += [(None, colours(56, 84), "g"), (None, images[5].copy(), "h")]
    features = Features({"query": Value("string"), "positive": Image(), "group": Value("string")})
    return Dataset.from_dict(dict(zip(features, map(list, zip(*rows)))), features=features)


def brute_force(pairs, model, count):
    """The nearest candidates by row that are neither the query's positives nor of their groups."""
    rows = [{key: decode_cell(value) for key, value in row.items()} for row in pairs]
    known = [content_hash(row["positive"]) for row in rows]
    vectors = model.encode_document([row["positive"] for row in rows])
    for row in rows:
        if row["query"] is None:
            continue
        same = {h for h, other in zip(known, rows) if other["query"] == row["query"]}
        groups = {other["group"] for other in rows if other["query"] == row["query"]} - {None}
        same |= {h for h, other in zip(known, rows) if other["group"] in groups}
        order = np.argsort(-(vectors @ model.encode_query([row["query"]])[0]), kind="stable")
        yield list(dict.fromkeys(known[i] for i in order if known[i] not in same))[:count]


def test_images_groups_and_copies_as_by_brute_force(model, tmp_path):
    pairs = mixed_pairs()
    report = mine_hard_negatives(pairs, model, tmp_path / "out.parquet", num_negatives=4)
    mined = load_pairs(str(tmp_path / "out.parquet"))
    assert len(mined) == report.rows == len(pairs) - 2
    assert mined["query"] == [query for query in pairs["query"] if query is not None]
    expected = list(brute_force(pairs, model, 4))
    assert [[content_hash(decode_cell(x)) for x in row["negatives"]] for row in mined] == expected
    assert len({tuple(part) for part in expected}) > 3
    of = {content_hash(decode_cell(row["positive"])): row["group"] for row in pairs if row["group"]}
    assert mined["negative_groups"] == [[of.get(content) for content in part] for part in expected]
    assert any(group for part in mined["negative_groups"] for group in part)
    assert report.left_out["group"] > 0 and report.left_out["content"] > 0
    text = str(report)
    assert re.search(r"10 rows with \d+ negatives", text) and "left out by group" in text


def test_dicts_and_paths_stay_what_they_are_and_train(model, repo, tmp_path):
    for index, word in enumerate(WORDS):
        PIL.Image.fromarray(colours(56 + 28 * (index % 5), 56)).save(tmp_path / f"{word}.png")
    pairs = Dataset.from_dict(
        {
            "query": [{"text": f"find {word}", "image": str(tmp_path / f"{word}.png")} for word in WORDS],
            "positive": [f"a {word} thing" for word in WORDS],
            "target": WORDS,
        }
    )
    mine_hard_negatives(pairs, model, tmp_path / "out.parquet", sampling_strategy="random", range_max=8, seed=3)
    mined = load_pairs(str(tmp_path / "out.parquet"))
    assert mined.column_names == ["query", "positive", "target", "negatives"]
    assert mined["query"] == pairs["query"] and mined["target"] == WORDS
    mine_hard_negatives(pairs, model, tmp_path / "same.parquet", sampling_strategy="random", range_max=8, seed=3)
    mine_hard_negatives(pairs, model, tmp_path / "other.parquet", sampling_strategy="random", range_max=8, seed=4)
    same, other = (load_pairs(str(tmp_path / f"{name}.parquet"))["negatives"] for name in ("same", "other"))
    assert same == mined["negatives"] != other
    args = config(tmp_path / "run", per_device_train_batch_size=6, max_steps=1)
    CondensationTrainer(model=type(model)(repo, device="cpu"), args=args, train_dataset=mined).train()


def test_a_picture_is_no_negative_of_its_copy(model, tmp_path):
    """Files are compared by content, whichever way a cell names them."""
    for name, colour in (("red", 0), ("copy", 0), ("blue", 5)):
        image(40, 40, colour).save(tmp_path / f"{name}.png")
    named = {name: str(tmp_path / f"{name}.png") for name in ("red", "copy", "blue")}
    rows = [
        {"query": "red", "positive": named["red"]},
        {"query": "a red one", "positive": named["copy"]},
        {"query": named["red"], "positive": named["blue"]},
    ]
    mine_hard_negatives(Dataset.from_list(rows), model, tmp_path / "out.parquet", num_negatives=2)
    mined = load_pairs(str(tmp_path / "out.parquet"))
    assert [row["negatives"] for row in mined] == [[named["blue"]], [named["blue"]], []]


def test_options_are_checked_before_anything_is_read(model, tmp_path):
    pairs, out = text_pairs(), tmp_path / "out.parquet"
    with pytest.raises(ValueError, match=r"written as parquet, got '.*mined\.jsonl'"):
        mine_hard_negatives(pairs, None, tmp_path / "mined.jsonl")
    for options, message in (
        ({"num_negatives": 0}, "num_negatives must be 1 or more"),
        ({"range_min": 3, "range_max": 5}, "3 negatives do not fit"),
        ({"sampling_strategy": "best"}, "got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_hard_negatives(pairs, None, out, **options)
    with pytest.raises(ValueError, match="already have a column 'negatives'"):
        mine_hard_negatives(pairs.add_column("negatives", [["a"]] * len(pairs)), None, out)
    with pytest.raises(ValueError, match="no row with a query"):
        mine_hard_negatives(
            Dataset.from_dict({"query": [None], "positive": ["a"]}, features=pairs.features), model, out
        )
    assert not out.exists()


def test_command(repo, tmp_path, capsys):
    text_pairs().to_json(tmp_path / "pairs.jsonl")
    out = tmp_path / "mined.parquet"
    assert cli.main(["mine", str(tmp_path / "pairs.jsonl"), str(out), "--model", repo, "--num-negatives", "2"]) == 0
    assert "12 rows with 24 negatives" in capsys.readouterr().out
    assert {len(negatives) for negatives in load_pairs(str(out))["negatives"]} == {2}
    with pytest.raises(SystemExit, match="num_negatives must be 1 or more"):
        cli.main(["mine", str(tmp_path / "pairs.jsonl"), str(out), "--model", repo, "--num-negatives", "0"])
