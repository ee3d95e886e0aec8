"""Model, columns and rows of pairs, checked before the training."""

import numpy as np
import pytest
from datasets import Array3D, Dataset, DatasetDict, Features, Image, Json, List, Value
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense
from support.media import image
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer
from btok_hf.media import video_input
from btok_hf.training import CondensationConfig, CondensationLoss, CondensationTrainer
from btok_hf.training.checks import (
    check_columns,
    check_rows,
    check_targets,
    checked_datasets,
    first_rows,
    group_hash,
    most_negatives,
)

MIXED = {"query": Value("string"), "positive": Json()}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"query": ["a", None], "positive": ["x", "y"]}, "Row 1 of p: its query is empty"),
        ({"query": ["a", "b"], "positive": ["x", " "]}, "Row 1 of p: its positive is empty"),
        (
            {"query": ["a", "b"], "positive": ["x", "no/such.png"]},
            "Row 1 of p: its positive names 'no/such.png', a file",
        ),
        (
            {"query": ["a", "b"], "positive": ["x", "长" * 200 + ".png"]},
            "not exist.*text that looks like a path",
        ),
        ({"query": ["a", "b"], "positive": [{"text": "x"}, None]}, "Row 1 of p: its positive is empty"),
        ({"query": ["a", "b"], "positive": ["x", " no.png\n"]}, r"Row 1 of p: its positive has white space around a"),
        ({"query": ["a", "b"], "positive": ["x", "http://h/a.png\n"]}, "white space around a path or address, 'http"),
        ({"query": ["a", "b"], "positive": ["x", '{"image": "a.png"}']}, "is a dict written as a text, as CSV files"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        check_rows(Dataset.from_dict(rows), "p")
    with pytest.raises(ValueError, match=message.replace("Row 1", "Row 0")):
        check_rows(Dataset.from_dict(rows).select([1]), "p")
    check_rows(Dataset.from_dict(rows).select([0]), "p")
    check_rows(Dataset.from_dict({"query": ["https://host/a.png"] * 2, "positive": ["not a.png", "b"]}), "p")


def test_numbers_are_no_inputs():
    for cells in ([1, 2], [0.5, None], [True, True], [b"a", b"b"]):
        with pytest.raises(ValueError, match="Row 0 of p: its positive is a number or bytes"):
            check_rows(Dataset.from_dict({"query": ["a", "b"], "positive": cells}), "p", required=())
    mixed = Dataset.from_dict({"query": ["a", "b"], "positive": ["x", 7]}, features=Features(MIXED))
    with pytest.raises(ValueError, match="Row 1 of p: its positive is a number"):
        check_rows(mixed, "p")


def test_arrays_are_inputs():
    arrays = np.zeros((2, 28, 28, 3), np.uint8)
    features = Features({"query": Array3D((28, 28, 3), "uint8"), "positive": Value("string")})
    for stored in (features, None):
        rows = {"query": list(arrays), "positive": ["a", "b"]}
        check_rows(Dataset.from_dict(rows, features=stored), "p")
    check_rows(Dataset.from_list([{"query": frames, "positive": "a"} for frames in arrays[None]]), "p")
    negatives = [[[[[0, 0, 0]]]], [[[[1, 1, 1]]]]]
    check_rows(Dataset.from_dict({"query": ["a"], "positive": ["b"], "negatives": [negatives]}), "p")
    with pytest.raises(ValueError, match="its negatives is a number"):
        check_rows(Dataset.from_dict({"query": ["a"], "positive": ["b"], "negatives": [[1, 2]]}), "p")


def test_files_with_spaces_that_do_not_exist_are_no_silent_texts(tmp_path, caplog):
    """Names of photographs have spaces, and texts may end as they do."""
    image(40, 40).save(tmp_path / "a cat.png")

    def check(*cells):
        check_rows(Dataset.from_dict({"query": ["a"] * len(cells), "positive": cells}), "p")

    check(f"{tmp_path}/a cat.png", str(tmp_path / "a cat.png"))
    lost = f"{tmp_path}/no cat.JPG"
    for cells in ([f"{tmp_path}/a cat.png", lost], [lost, lost]):
        with pytest.raises(ValueError, match=r"its positive '.*no cat\.JPG' looks like a file, which does not exist"):
            check(*cells)
    check("a text", "b", "c " * 200 + ".png")
    assert not caplog.records
    check("a text", lost, "turn a.png into b.png")
    assert "Row 1 of p: its positive" in caplog.text and "Texts like it in this column: 2" in caplog.text


@pytest.mark.parametrize(
    ("groups", "row"),
    [([1.0, None, float("nan")], 2), (["a", " ", None], 1), (["a", None, "a"], None), ([1, None, 1], None)],
)
def test_groups_without_meaning_are_named(groups, row):
    """Rows of one group answer each other's queries: NaN, or an empty text, would be one group of many rows."""
    dataset = Dataset.from_dict({"query": ["a"] * 3, "positive": ["b"] * 3, "group": groups})
    if row is None:
        return check_rows(dataset, "p")
    with pytest.raises(ValueError, match=rf"Row {row} of p: its group is empty or not a number.*None"):
        check_rows(dataset, "p")
    check_rows(dataset.select([0]), "p")


def test_the_most_negatives_of_a_row():
    lists = Dataset.from_dict({"query": ["a"] * 3, "positive": ["b"] * 3, "negatives": [None, ["c"] * 3, []]})
    mixed = [[{"text": "c"}], [{"text": "c", "image": None}, "d"], None]
    mixed = Dataset.from_dict({"negatives": mixed}, features=Features({"negatives": Json()}))
    assert most_negatives(None) == most_negatives(lists.remove_columns("negatives")) == 1
    assert most_negatives(lists) == most_negatives({"a": lists, "b": lists.select([0])}) == 3
    assert most_negatives(lists.add_column("negative", ["d"] * 3)) == 4 and most_negatives(mixed) == 2


def _with(cells, column="positive", feature=None):
    """A dataset whose column has these cells."""
    rows = {"query": ["q"] * len(cells), "positive": ["p"] * len(cells), column: cells}
    features = None if feature is None else Features({**dict.fromkeys(rows, Value("string")), column: feature})
    return Dataset.from_dict(rows, features=features)


def _chat(path):
    return [{"role": "user", "content": [{"type": "text", "text": "b.png"}, {"type": "image", "image": path}]}]


@pytest.mark.parametrize(
    ("column", "cell", "feature"),
    [
        ("positive", {"image": "{}"}, None),  # in a dict any string is a file
        ("positive", {"text": "b.png", "image": ["{}.png", "https://host/b"]}, None),
        ("query", {"image": {"bytes": None, "path": "{}"}, "text": "x"}, {"image": Image(), "text": Value("string")}),
        ("positive", "{}", Image()),
        ("positive", _chat("{}"), None),
        ("positive", [{"role": "user", "content": [{"type": "video", "url": "{}"}]}], None),
        ("negative_2", "{}.png", None),
        ("negatives", ["x", "{}.png", "b"], None),
        ("negatives", [{"video": "{}"}, "x"], List(Json())),
    ],
)
def test_files_that_do_not_exist_are_named_wherever_they_stand(tmp_path, column, cell, feature):
    def filled(path):
        def fill(value):
            if isinstance(value, dict):
                return {key: fill(part) for key, part in value.items()}
            return [fill(part) for part in value] if isinstance(value, list) else str(value).format(path)

        return {**fill(cell), "image": {"bytes": None, "path": path}} if column == "query" else fill(cell)

    for name in ("a", "a.png"):
        image(40, 40).save(tmp_path / name, format="PNG")
    there, gone = filled(str(tmp_path / "a")), filled(str(tmp_path / "gone"))
    check_rows(_with([there, there], column, feature), "p")
    dataset = _with([there, there, gone], column, feature)
    for rows in (dataset, dataset.select([0, 2])):
        with pytest.raises(ValueError, match=f"Row {len(rows) - 1} of p: its {column} names '.*gone.*does not exist"):
            check_rows(rows, "p")


def test_media_that_lie_in_the_dataset_are_not_empty_and_missing_ones_are():
    video = video_input(np.zeros((2, 40, 40, 3), np.uint8), 2.0)
    for key, value in (("image", image(40, 40)), ("video", video), ("video", {"bytes": b"x", "path": None})):
        check_rows(_with([{key: value, "text": "x"}, {key: None, "text": "x"}, {key: value, "text": None}]), "p")
        with pytest.raises(ValueError, match="Row 1 of p: its positive is empty"):
            check_rows(_with([{key: value, "text": "x"}, {key: None, "text": " "}]), "p")
    for cells in ([image(40, 40), None], [{"video": {"bytes": each, "path": None}} for each in (b"x", None)]):
        with pytest.raises(ValueError, match="Row 1 of p: its query is empty"):
            check_rows(_with(cells, "query"), "p")


def test_a_row_needs_no_negative_but_one_with_content():
    for column, none, empty in (("negative", None, " "), ("negatives", [None], ["x", ""])):
        full = "x" if column == "negative" else ["x", "y"]
        check_rows(_with([full, none, None], column), "p")
        check_rows(_with([None, None], column), "p")  # as JSON lines have it; Arrow has a type for it
        with pytest.raises(ValueError, match=f"Row 1 of p: its {column} is empty"):
            check_rows(_with([full, empty], column), "p")


def test_lists_are_inputs_of_no_column_but_negatives():
    with pytest.raises(ValueError, match=r"Row 1 of p: its negative is a list.*lists of hard negatives is called neg"):
        check_rows(_with([None, ["b", "c"]], "negative"), "p")
    check_rows(_with([["b", "c"], None], "negatives"), "p")
    check_rows(_with([None, _chat("https://host/b.png")], "negative"), "p")


def test_files_of_no_bytes_are_empty():
    whole, none = ({"bytes": content, "path": "a.png"} for content in (b"x", b""))
    for feature in (Image(), {"image": [Image()], "text": Value("string")}):
        cells = [cell if isinstance(feature, Image) else {"image": [cell], "text": "x"} for cell in (whole, none)]
        with pytest.raises(ValueError, match=r"Row 1 of p: its positive (is empty|holds a file of 0 bytes)\. Correct"):
            check_rows(_with(cells, "positive", feature), "p")


def test_splits_to_evaluate_on_are_not_trained_on():
    splits = DatasetDict({"train": text_pairs(2), "test": text_pairs(2)})
    with pytest.raises(ValueError, match=r"train_dataset has the splits train, test, and each would .*\['train'\]"):
        checked_datasets("train_dataset", splits, None)
    for name in ("dev", "val", "valid", "eval", "validation_matched"):
        with pytest.raises(ValueError, match=f"has the splits train, {name}, and each"):
            checked_datasets("train_dataset", DatasetDict({"train": text_pairs(2), name: text_pairs(2)}), None)
    sources = DatasetDict({"validated": text_pairs(2), "devices": text_pairs(2)})
    assert list(checked_datasets("train_dataset", sources, None)) == ["validated", "devices"]
    assert list(checked_datasets("eval_dataset", splits, None)) == ["train", "test"]
    assert list(checked_datasets("train_dataset", dict(splits), None)) == ["train", "test"]


def test_groups_are_equal_in_all_formats():
    assert group_hash(1) == group_hash(1.0) == group_hash("1") != group_hash(1.5)
    assert group_hash("a") != group_hash("b")


def test_rows_made_on_the_way_are_not_checked():
    check_rows(_with(["no/such.png"]).with_transform(lambda rows: rows), "p")


def test_other_columns_are_left_to_the_check_of_columns():
    check_rows(_with([0, None], "query_id"), "p")


def test_columns():
    assert check_columns(["negative_1", "positive", "target", "query"]) == ["query", "positive", "negative_1"]
    with pytest.raises(ValueError, match=r"'d' has the columns .*missing \['positive'\]; unknown \['anchor'\]"):
        check_columns(["query", "anchor"], "d")
    assert check_columns(["query", "positive", "negatives", "negative_groups"])[2:] == ["negatives"]
    with pytest.raises(ValueError, match=r"unknown \['negative_id', 'negative_image'\]"):
        check_columns(["query", "positive", "negative", "negative_id", "negative_image"])
    with pytest.raises(ValueError, match="negative_groups, but not negatives"):
        check_columns(["query", "positive", "negative_groups"])


def test_columns_are_named_before_texts_to_generate():
    """Else the first error would be about a column that the second one asks to be renamed."""
    rows = Dataset.from_dict({"anchor": ["a"], "positive": [{"image": "a.png"}]})
    with pytest.raises(ValueError, match=r"Dataset 'd' has .*missing \['query'\]; unknown \['anchor'\]"):
        checked_datasets("train_dataset", {"d": rows}, CondensationConfig("unused", report_to="none", use_cpu=True))


def test_negatives_with_groups_are_a_list():
    rows = {"query": ["a"], "positive": ["b"], "negatives": ["c"], "negative_groups": [["g"]]}
    with pytest.raises(ValueError, match="Row 0 of the data: 'negatives' must be a list of inputs, got str"):
        check_rows(Dataset.from_dict(rows), "the data")


def test_negatives_have_a_group_each():
    rows = {"query": ["a"] * 3, "positive": ["b"] * 3, "negatives": [["c", "d"], [], ["e"]]}
    check_rows(Dataset.from_dict({**rows, "negative_groups": [["g", None], None, ["h"]]}), "the data")
    with pytest.raises(ValueError, match=r"Row 2 of the data: negative_groups .* its 1 negatives, got 2 groups"):
        check_rows(Dataset.from_dict({**rows, "negative_groups": [[None, 1], [], [1, 2]]}), "the data")


def test_streamed_datasets_are_refused():
    with pytest.raises(ValueError, match=r"'a' is streamed .IterableDataset.*Load it without streaming"):
        first_rows({"a": Dataset.from_list([{"query": "a"}]).to_iterable_dataset()})


@pytest.mark.parametrize("loss", [MultipleNegativesRankingLoss, MultipleNegativesRankingLoss(None)])
def test_other_losses_are_refused_with_a_way_out(repo, tmp_path, loss):
    model = BTokSentenceTransformer(repo, device="cpu")
    says = r"got MultipleNegativesRankingLoss\. .*matryoshka_dims.*SentenceTransformerTrainer"
    with pytest.raises(ValueError, match=says):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs(4), loss=loss)


def test_what_would_train_something_else_is_refused(repo, tmp_path):
    model, pairs = BTokSentenceTransformer(repo, device="cpu"), text_pairs(4)
    loss = CondensationLoss(model, condensation_weight=2.0)
    with pytest.raises(ValueError, match=r"condensation_weight=2\.0, but that of args is 0"):
        CondensationTrainer(
            model=model, args=config(tmp_path, condensation_weight=0.0), train_dataset=pairs, loss=loss
        )
    for given in ([{"query": "a", "positive": "b"}], {"a": [{"query": "a", "positive": "b"}]}):
        with pytest.raises(
            ValueError, match=r"must be a datasets\.Dataset, got list\. Make a dataset with load_pairs"
        ):
            CondensationTrainer(model=model, args=config(tmp_path), train_dataset=given)
    with pytest.raises(ValueError, match="model_init cannot be used"):
        CondensationTrainer(args=config(tmp_path), train_dataset=pairs, model_init=lambda: model)
    with_dropout = BTokSentenceTransformer(repo, device="cpu")
    with_dropout.transformer.model.add_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    with pytest.raises(
        ValueError, match=r"lora_dropout must be 0, got 0\.1.*of saved adapters, in their adapter_config"
    ):
        CondensationTrainer(model=with_dropout, args=config(tmp_path), train_dataset=pairs)
    model.config.get_text_config().attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout in config\.json must be 0, got 0\.1"):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=pairs)


def test_models_of_get_peft_model_are_refused(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    model[0].model = get_peft_model(model[0].model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"holds a PeftModel.*by peft_config of the trainer or model\.add_adapter"):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs(4))


@pytest.mark.parametrize("target", [None, ["t", None]])
def test_a_row_without_a_text_to_generate_is_named_before_the_training(repo, tmp_path, target):
    image(56, 56).save(tmp_path / "a picture.png")
    pairs = {"query": ["a", "b"], "positive": ["x", str(tmp_path / "a picture.png")]}
    pairs |= {"target": target} if target else {}
    model = BTokSentenceTransformer(repo, device="cpu")
    with pytest.raises(
        ValueError, match="Row 1 of train_dataset: condensation generates the text of its positive, wh"
    ):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=Dataset.from_dict(pairs))
    CondensationTrainer(
        model=model, args=config(tmp_path, condense={"p": "query"}), train_dataset={"p": Dataset.from_dict(pairs)}
    )
    check_targets(Dataset.from_dict(pairs | {"target": [None, "t"]}), "p", ["positive"])
    check_targets(Dataset.from_dict(pairs), "p", ["query"])
    check_targets(Dataset.from_dict({"query": ["a"], "positive": [{"image": None, "text": "x"}]}), "p", ["positive"])
    with pytest.raises(ValueError, match="Row 1 of train_dataset: condensation"):  # by the defaults of the arguments
        CondensationTrainer(model=model, train_dataset=Dataset.from_dict(pairs))
    with pytest.raises(ValueError, match="CondensationConfig"):
        CondensationTrainer(
            model=model, args=SentenceTransformerTrainingArguments("out"), train_dataset=Dataset.from_dict(pairs)
        )


@pytest.mark.parametrize(
    ("column", "cell", "feature"),
    [
        ("target", None, Value("float64")),
        ("target", "README.md", Value("string")),  # words, also if a file is called so
        ("positive", {"text": ["x", "y"]}, {"text": List(Value("string"), length=2)}),
        ("positive", "x", Value("string_view")),
        ("positive", "x", Value("large_string")),
    ],
)
def test_texts_are_found_in_every_type(tmp_path, monkeypatch, column, cell, feature):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    row = {"query": "a", "positive": "x", "target": None} | {column: cell}
    features = Features(
        {"query": Value("string"), "positive": Value("string"), "target": Value("string")} | {column: feature}
    )
    dataset = Dataset.from_list([row], features=features)
    check_rows(dataset, "p")
    check_targets(dataset, "p", ["positive"])


def test_further_modules_are_refused(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    model.append(Dense(64, 8))
    with pytest.raises(ValueError, match="only the first would be saved"):
        CondensationTrainer(model=model, args=config(tmp_path), train_dataset=text_pairs())
