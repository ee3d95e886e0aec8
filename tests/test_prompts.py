"""Prompts in training are those of `encode_query` and `encode_document`, before and after."""

import pytest
from datasets import Dataset
from support.training import config, text_pairs

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.training import CondensationTrainer
from btok_hf.training.prompts import training_prompts

ROWS = Dataset.from_dict({"query": ["dog"], "positive": ["it barks"], "negatives": [["it flies", "it swims"]]})


@pytest.fixture
def model(bases, tmp_path):
    prompts = {"query": "Find:", "document": "Doc:"}
    return BTokSentenceTransformer(
        add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", prompts=prompts), device="cpu"
    )


def seen(model, tmp_path, data=ROWS, row=0, **options):
    """What a batch puts before the texts of each side."""
    trainer = CondensationTrainer(model=model, args=config(tmp_path, condense="none", **options), train_dataset=data)
    rows = data if isinstance(data, Dataset) else trainer.train_dataset["a"]
    name = {} if isinstance(data, Dataset) else {"dataset_name": "a"}
    batch = trainer.data_collator([{**rows[row], **name}])
    texts = {
        side: model.tokenizer.batch_decode(batch[f"{side}_input_ids"]) for side in ("query", "positive", "negative")
    }
    starts = ("dog", "it barks", "it flies")
    found = {side: texts[side][0].partition(start)[0].split("user\n")[-1] for side, start in zip(texts, starts)}
    assert all(word in "".join(texts["negative"]) for word in ("it flies", "it swims"))
    return {side: text.split("system\n")[-1].strip() for side, text in found.items()}


def test_without_any_they_are_those_of_the_model(model, tmp_path):
    found = seen(model, tmp_path)
    assert "Find:" in found["query"] and "Doc:" in found["positive"] and found["negative"] == found["positive"]
    query, document = (encode(["dog"], output_value=None)[0] for encode in (model.encode_query, model.encode_document))
    trainer = CondensationTrainer(model=model, args=config(tmp_path, condense="none"), train_dataset=ROWS)
    batch = trainer.data_collator([{**ROWS[0], "positive": "dog"}])
    assert batch["query_input_ids"][0].tolist() == query["input_ids"].tolist()
    assert batch["positive_input_ids"][0].tolist() == document["input_ids"].tolist()


def test_given_ones_are_trained_and_kept(model, tmp_path):
    found = seen(model, tmp_path, prompts={"query": "Q:", "positive": "P:"})
    assert ("Q:" in found["query"], "P:" in found["positive"], "P:" in found["negative"]) == (True, True, True)
    assert model.prompts == {"query": "Q:", "document": "P:"}
    found = seen(model, tmp_path, prompts={"query": "Q:", "positive": "P:", "negative": "N:"})
    assert "N:" in found["negative"] and "P:" not in found["negative"]
    seen(model, tmp_path, prompts="Both:")
    assert model.prompts == {"query": "Both:", "document": "Both:"}


def test_each_dataset_may_have_its_own(model, tmp_path):
    data = {"a": ROWS, "b": ROWS}
    found = seen(model, tmp_path, data, prompts={"a": {"query": "A:", "positive": "P:"}, "b": "B:"})
    assert "A:" in found["query"] and "P:" in found["negative"]
    assert model.prompts == {"query": "Find:", "document": "Doc:"}  # there is no one prompt of all
    found = seen(model, tmp_path, data, prompts={"b": "B:", "query": "Q:", "positive": "P:"})
    assert "Q:" in found["query"] and "P:" in found["negative"]


def test_names_without_effect_are_refused(model, tmp_path):
    for name in ("negatives", "negative_1", "document", "anchor"):
        with pytest.raises(ValueError, match=f"prompts name '{name}'.*columns query, positive, negative"):
            seen(model, tmp_path, prompts={"query": "Q:", name: "P:"})
    with pytest.raises(ValueError, match=r"prompts name 'anchor'.*datasets, of which a, b has a name"):
        training_prompts({"a": {"anchor": "Q:"}}, model, ["a", "b"])


def test_a_dataset_without_one_of_the_prompts_by_dataset_is_refused(repo, tmp_path):
    """Sentence-Transformers would evaluate it without a prompt, and so another task than the one that was trained."""
    data = {"a": text_pairs(2), "b": text_pairs(2)}
    args = config(tmp_path, condense="positive", prompts={"a": "A:", "b": {"query": "B:"}})
    model = BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, train_dataset=data)
    trainer.evaluate({"b": text_pairs(2)})
    for other, name in ((text_pairs(2), "one without a name"), ({"c": text_pairs(2)}, "c")):
        with pytest.raises(ValueError, match=rf"for the datasets \['a', 'b'\], got '{name}'"):
            trainer.evaluate(other)


def test_other_datasets_have_the_prompts_that_are_for_all(repo, tmp_path):
    args = config(tmp_path, condense="positive", prompts={"a": "A:", "query": "Q:"})
    model = BTokSentenceTransformer(repo, device="cpu")
    data = {"a": text_pairs(2), "b": text_pairs(2)}
    trainer = CondensationTrainer(model=model, args=args, train_dataset=data, eval_dataset=text_pairs(2))
    for name in ({}, {"dataset_name": "b"}, {"dataset_name": "c"}):
        assert trainer.data_collator._resolve_prompts(name) == {"query": "Q:"}
    assert trainer.data_collator._resolve_prompts({"dataset_name": "a"}) == "A:"
    trainer.evaluate()
    trainer.evaluate({"c": text_pairs(2)})


def test_a_model_without_prompts_has_none(repo):
    model = BTokSentenceTransformer(repo, device="cpu", prompts={"query": "", "document": "", "passage": "P:"})
    assert training_prompts(None, model, []) is None
    del model.prompts["document"]
    assert training_prompts(None, model, []) == {"positive": "P:", "negative": "P:"}
