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
from btok_hf.training import CondensationTrainer, mining
from btok_hf.training.cells import decode_cell
from btok_hf.training.data import load_pairs
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
        {"relative_margin": 0.02, "num_negatives": 1},
        {"absolute_margin": 0.0, "num_negatives": 1},
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


def test_draws_are_from_more_than_the_nearest(model, tmp_path):
    def mined(**options):
        mine_hard_negatives(text_pairs(), model, tmp_path / "out.parquet", num_negatives=1, **options)
        return load_pairs(str(tmp_path / "out.parquet"))["negatives"][:]

    draws = [mined(sampling_strategy="random", seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and mined() not in draws


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_rows_without_a_group_have_none_in_any_format(model, tmp_path, kind):
    """These formats turn a group that is missing into NaN."""
    pairs = text_pairs().add_column("group", [7, 7, *[None] * 10])
    reports = [mine_hard_negatives(each, model, tmp_path / "out.parquet") for each in (pairs, pairs.with_format(kind))]
    assert reports[0] == reports[1] and 0 < reports[0].left_out["group"] <= 2


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


def test_groups_that_are_all_null(model, tmp_path):
    """Arrow gives such a column no type."""
    pairs = Dataset.from_dict(
        {"query": WORDS, "positive": [f"a {word}" for word in WORDS], "group": [None] * len(WORDS)}
    )
    mine_hard_negatives(pairs, model, tmp_path / "out.parquet")
    assert load_pairs(str(tmp_path / "out.parquet")).column_names == ["query", "positive", "group", "negatives"]


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


def test_groups_are_equal_as_in_training(model, tmp_path):
    """Also if they are lists, as those of JSON lines may be."""
    names = ["a", "b", "c", "d"]
    pairs = Dataset.from_dict({"query": [f"{name}?" for name in names], "positive": names})
    grouped = pairs.add_column("group", [["x", "y"], ["x", "y"], ["x"], ["z"]])
    report = mine_hard_negatives(grouped, model, tmp_path / "out.parquet", num_negatives=3)
    assert report.left_out["group"] == 2 and report.negatives == {2: 2, 3: 2}
    assert load_pairs(str(tmp_path / "out.parquet"))[0]["negative_groups"] in ([["x"], ["z"]], [["z"], ["x"]])


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
    for given, message in (
        ("pairs.jsonl", r"must be a datasets\.Dataset, got str\. Make a dataset with load_pairs"),
        (pairs.with_transform(lambda rows: rows), "have a transform, which would be lost"),
        (pairs.rename_column("query", "anchor"), r"missing \['query'\]; unknown \['anchor'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_hard_negatives(given, None, out)
    for mined in (["negatives"], ["negative_groups"], ["negatives", "negative_groups"]):
        again = pairs
        for column in mined:
            again = again.add_column(column, [["a"]] * len(pairs))
        with pytest.raises(ValueError, match=f"already have {' and '.join(mined)}.*remove_columns.*{mined[-1]}"):
            mine_hard_negatives(again, None, out)
    for bounds, message in (
        ({"relative_margin": 95}, "a fraction, 0 or more and below 1, got 95"),
        ({"relative_margin": -0.5}, "a fraction, 0 or more and below 1, got -0.5"),
        ({"absolute_margin": -1.0}, "absolute_margin must be 0 or more, got -1.0"),
        ({"absolute_margin": float("nan")}, "absolute_margin must be 0 or more, got nan"),
        ({"max_score": 95}, "between -1 and 1 and the lower first, got None and 95"),
        ({"min_score": -2}, "between -1 and 1 and the lower first, got -2 and None"),
        ({"min_score": 0.9, "max_score": 0.1}, "the lower first, got 0.9 and 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_hard_negatives(pairs, None, out, **bounds)
    with pytest.raises(ValueError, match="no row with a query"):
        mine_hard_negatives(
            Dataset.from_dict({"query": [None], "positive": ["a"]}, features=pairs.features), model, out
        )
    assert not out.exists()


class Random:
    """A model of random vectors, which counts its inputs."""

    def __init__(self, spoil=None):
        self.rng, self.spoil, self.inputs = np.random.default_rng(0), spoil, []

    def encode_query(self, inputs, **_):
        vectors = self.rng.normal(size=(len(inputs), 8)).astype(np.float32)
        for vector, item in zip(vectors, inputs):
            if item == self.spoil:
                vector[3] = np.nan
        self.inputs += inputs
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    encode_document = encode_query


def test_rows_are_checked_before_any_is_embedded(tmp_path):
    rows = [{"query": f"find {i}", "positive": f"thing {i}", "group": None} for i in range(30)]
    for row, changes, message in (
        (29, {"positive": "photos/gone.png"}, r"its positive names 'photos/gone\.png', a file that does not exist"),
        (29, {"query": "gone.png"}, r"its query names 'gone\.png'"),
        (20, {"positive": " "}, "its positive is empty"),
        (20, {"positive": None}, "its positive is empty"),
        (20, {"query": ""}, "its query is empty"),
        (7, {"group": ""}, "its group is empty"),
    ):
        pairs = Dataset.from_list([*rows[:row], {**rows[row], **changes}, *rows[row + 1 :]])
        model = Random()
        with pytest.raises(ValueError, match=f"Row {row} of the pairs: {message}"):
            mine_hard_negatives(pairs, model, tmp_path / "out.parquet")
        assert not model.inputs and not (tmp_path / "out.parquet").exists()


def test_a_row_that_cannot_be_embedded_is_named_by_its_number(model, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "MEDIA_ROWS", 2)
    monkeypatch.setattr(mining, "ROWS", 2)
    image(40, 40).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good, bad = str(tmp_path / "good.png"), str(tmp_path / "bad.png")
    # The picture of rows 0 to 4 is one input, and the bad one the second of a later call.
    rows = [{"query": f"find {i}", "positive": cell} for i, cell in enumerate([good] * 5 + ["a", "b", bad])]
    with pytest.raises(ValueError, match=r"^Row 7 of the pairs, its positive .*bad\.png.*is not an image"):
        mine_hard_negatives(Dataset.from_list(rows), model, tmp_path / "out.parquet")


def test_vectors_that_cannot_be_ranked_are_refused(tmp_path):
    """NaN would be everybody's nearest candidate."""
    with pytest.raises(ValueError, match="The embedding of row 5 holds NaN"):
        mine_hard_negatives(text_pairs(), Random("a grey thing"), tmp_path / "out.parquet")


class Angles:
    """A model of texts that are angles, in degrees."""

    def encode_query(self, inputs, **_):
        return np.array([[np.cos(np.radians(float(a))), np.sin(np.radians(float(a)))] for a in inputs], np.float32)

    encode_document = encode_query


@pytest.mark.parametrize(
    ("positives", "others", "margin", "mined"),
    [
        (["10", "60"], ["30", "70"], {"absolute_margin": 0.1}, ["70"]),
        (["10", "60"], ["30", "63", "70"], {"relative_margin": 0.2}, ["70"]),
        (["100"], ["101", "110"], {"relative_margin": 0.5}, ["110"]),  # a negative cosine
    ],
)
def test_negatives_lie_a_margin_below_the_farthest_positive(tmp_path, positives, others, margin, mined):
    rows = [{"query": "0", "positive": each} for each in positives]
    pairs = Dataset.from_list([*rows, *({"query": None, "positive": each} for each in others)])
    mine_hard_negatives(pairs, Angles(), tmp_path / "out.parquet", **margin)
    assert load_pairs(str(tmp_path / "out.parquet"))["negatives"] == [mined] * len(positives)


def test_negatives_are_written_in_parts_that_arrow_can_hold(tmp_path, monkeypatch):
    """An array of Arrow holds 2 GiB, which 1,024 rows with large pictures exceed."""
    pairs = mixed_pairs()
    mine_hard_negatives(pairs, Random(), tmp_path / "one.parquet", num_negatives=4)
    sizes, combine = [], mining._one_array
    monkeypatch.setattr(mining, "BYTES", 2000)
    monkeypatch.setattr(mining, "_one_array", lambda values: sizes.append(values.nbytes) or combine(values))
    report = mine_hard_negatives(pairs, Random(), tmp_path / "parts.parquet", num_negatives=4)
    one, parts = (load_pairs(str(tmp_path / f"{name}.parquet")) for name in ("one", "parts"))
    assert parts.to_list() == one.to_list() and report.rows == len(parts) == sum(report.negatives.values())
    row = max(sum(len(cell["bytes"]) for cell in cells) for cells in negatives_as_stored(one))
    assert max(sizes) < 2000 + row < sum(sizes) / 2


def negatives_as_stored(pairs):
    return pairs.with_format("arrow")["negatives"].to_pylist()


def test_a_run_without_any_negative_is_told(tmp_path, caplog):
    report = mine_hard_negatives(text_pairs(), Random(), tmp_path / "out.parquet", max_score=-1)
    assert report.negatives == {0: 12} and "No row got a negative. Raise range_max" in caplog.text
    caplog.clear()
    mine_hard_negatives(text_pairs(), Random(), tmp_path / "out.parquet")
    assert not caplog.text


def test_the_output_is_checked_before_anything_is_loaded(tmp_path):
    pairs = tmp_path / "pairs.parquet"
    text_pairs().to_parquet(pairs)
    before = pairs.read_bytes()
    (tmp_path / "link.parquet").symlink_to(pairs)
    for output, message in (
        (pairs, "is the file of the pairs, which mining leaves"),
        (tmp_path / "link.parquet", "is the file of the pairs"),
        (tmp_path / "out.jsonl", "written as parquet"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["mine", str(pairs), str(output), "--model", "no/model"])
    with pytest.raises(SystemExit, match="written as parquet"):
        cli.main(["mine", str(tmp_path / "none.parquet"), str(tmp_path / "out.jsonl"), "--model", "no/model"])
    assert pairs.read_bytes() == before


def test_command(repo, tmp_path, capsys):
    text_pairs().to_json(tmp_path / "pairs.jsonl")
    out = tmp_path / "mined.parquet"
    assert cli.main(["mine", str(tmp_path / "pairs.jsonl"), str(out), "--model", repo, "--num-negatives", "2"]) == 0
    assert "12 rows with 24 negatives" in capsys.readouterr().out
    assert {len(negatives) for negatives in load_pairs(str(out))["negatives"]} == {2}
    with pytest.raises(SystemExit, match="num_negatives must be 1 or more"):
        cli.main(["mine", str(tmp_path / "pairs.jsonl"), str(out), "--model", repo, "--num-negatives", "0"])
