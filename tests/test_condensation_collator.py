"""The collator: targets, equal inputs, pixels."""

import pytest
import torch
from datasets import Dataset
from support.media import image
from support.source_tree import all_sources
from support.training import batch_features, collator, config

from btok_hf import BTokSentenceTransformer
from btok_hf.content import content_hash
from btok_hf.training import CondensationConfig, CondensationLoss, CondensationTrainer
from btok_hf.training.condensation_collator import CondensationCollator
from btok_hf.training.mixture import load_mixture


def test_pixels_in_bf16_are_what_the_vision_tower_sees(repo, tmp_path):
    """bf16 pixels take half the memory and give exactly the same loss."""
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model, bf16=True)
    assert features[0]["pixel_values"].dtype == torch.bfloat16
    losses = []
    for inputs in (features, batch_features(model)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(CondensationLoss(model, mini_batch_size=2)(inputs).item())
    assert losses[0] == losses[1]


def test_no_target_holds_a_placeholder(repos):
    """Special tokens have the form `<image>` in some families."""
    model = BTokSentenceTransformer(repos["idefics3"], device="cpu")
    args = CondensationConfig(output_dir="unused", condense="both", report_to="none", use_cpu=True)
    collator = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
    batch = collator([{"query": {"text": "q", "image": image(40, 40)}, "positive": "typed <image>"}])
    assert "typed < image>" in model.tokenizer.decode(batch["query_target_ids"][0, 0])
    assert model.config.image_token_id not in batch["query_target_ids"]
    assert batch["query_pixel_attention_mask"].dtype == torch.bool


def test_a_file_and_its_name_as_a_text_are_not_copies(repo, tmp_path):
    path = str(tmp_path / "photo.png")
    image(60, 40).save(path)
    model = BTokSentenceTransformer(repo, device="cpu")
    args = CondensationConfig(output_dir="unused", condense="none", report_to="none", use_cpu=True)
    collator = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
    batch = collator([{"query": path, "positive": "a"}, {"query": {"text": path}, "positive": "b"}])
    assert len(batch["query_input_ids"]) == 2 and "query_rows" not in batch


def test_targets_are_the_other_sides_text(repo, tmp_path):
    collate, tokenizer = collator(repo, tmp_path, condense="both", max_target_length=10)
    rows = [
        {"query": "q <|im_end|>", "positive": "a positive that is too long"},
        {"query": {"text": "with text", "image": image(40, 40)}, "positive": "p"},
    ]
    batch = collate(rows)
    decoded = {}
    for side in ("query", "positive"):
        ids, labels = batch[f"{side}_target_ids"][:, 0], batch[f"{side}_target_labels"][:, 0]
        decoded[side] = [tokenizer.decode(row[label != -100]) for row, label in zip(ids, labels)]
        prompts = [tokenizer.decode(row[: len(row) - len(label[label != -100])]) for row, label in zip(ids, labels)]
        assert prompts[0].startswith("<|im_start|>assistant\n")
        assert all((label[:11] == -100).all() for label in labels)
    # A text that is cut has no end, and one of exactly the most tokens has.
    assert decoded["query"] == ["a positive", "p<|im_end|>"]
    assert decoded["positive"] == ["q < |im_en", "with text<|im_end|>"]
    (labels,) = collator(repo, tmp_path, max_target_length=5)[0]([{"query": "q", "positive": "exact"}])[
        "query_target_labels"
    ]
    assert tokenizer.decode(labels[labels != -100]) == "exact<|im_end|>"
    collate, tokenizer = collator(repo, tmp_path, condense="positive")
    batch = collate([{"query": image(40, 40), "positive": image(30, 30), "target": "instead"}])
    assert "positive_target_ids" not in batch
    assert tokenizer.decode(batch["query_target_ids"][0, 0]).endswith("instead<|im_end|>")


def test_every_layout_collates(repo, tmp_path):
    names = all_sources(tmp_path)
    loaded, _, condense, _ = load_mixture(dict.fromkeys(names), tmp_path)
    model = BTokSentenceTransformer(repo, device="cpu")
    collate = CondensationCollator(
        preprocess_fn=model.preprocess,
        tokenizer=model.tokenizer,
        args=config(tmp_path, condense=condense, max_target_length=400),
    )
    targets = {
        "A-OKVQA": ("query", "cab 1"),
        "video_caption_300k": ("query", "caption 1"),
        "video_caption_300k-video": ("positive", "following visual content: caption 1"),
        "video_qa_240k": ("query", "caption 1"),
        "colpali_train_set": ("query", "a1"),
        "visrag-indomain": ("positive", "the query: q1"),
        "WebQA": ("positive", "that answers this question: 1?"),
    }
    for name, dataset in loaded.items():
        batch = collate([{**row, "dataset_name": name} for row in dataset.select(range(2))])
        if name not in targets:
            assert not any(key.endswith("target_ids") for key in batch)
            continue
        side, text = targets[name]
        ids, labels = batch[f"{side}_target_ids"][1, 0], batch[f"{side}_target_labels"][1, 0]
        assert model.tokenizer.decode(ids[labels != -100]).endswith(text + "<|im_end|>"), name


@pytest.mark.parametrize("negatives", ["one text", {"text": "one"}])
def test_negatives_are_a_list(repo, tmp_path, negatives):
    rows = [{"query": "a", "positive": "b", "negatives": negatives}]
    with pytest.raises(ValueError, match=r"'negatives' must be a list of inputs, got (str|dict).*'negative'"):
        CondensationTrainer(
            model=BTokSentenceTransformer(repo, device="cpu"),
            args=config(tmp_path),
            train_dataset=Dataset.from_list(rows),
        )


def test_negatives_keep_the_order_of_their_columns(repo, tmp_path):
    """In every process: the order of a set of names is another one in each."""
    collate, _ = collator(repo, tmp_path, condense="none")
    names = ["negative", *(f"negative_{number}" for number in range(1, 8))]
    row = {"query": "a", "positive": "b", **{name: name for name in names}}
    assert collate([row])["negative_hashes"][:, 0].tolist() == [content_hash(name) for name in names]


def test_groups_of_negatives_that_do_not_fit_are_named(repo, tmp_path):
    collate, _ = collator(repo, tmp_path)
    row = {"query": "a", "positive": "b", "negatives": ["c", "d"]}
    with pytest.raises(ValueError, match=r"A row of the dataset: negative_groups .* its 2 negatives, got 1 groups"):
        collate([{**row, "negative_groups": ["g"]}])


def test_an_input_that_cannot_be_embedded_is_named(repo, tmp_path):
    """With the number that `NumberedRows` gives its row; equal inputs before it are encoded once."""
    collate, _ = collator(repo, tmp_path, condense="none")
    broken = {"bytes": b"no picture", "path": None}
    rows = [{"query": "a", "positive": "b", "negatives": ["c"], "dataset_name": "d", "row": row} for row in (5, 8, 3)]
    rows[2]["positive"] = {"image": broken}
    with pytest.raises(
        ValueError, match=r"^Row 3 of 'd', its positive \{'image': .*not an image that Pillow can read"
    ):
        collate(rows)
    rows[2] |= {"positive": "b", "negatives": ["c", broken]}
    with pytest.raises(ValueError, match=r"^Row 3 of 'd', its negatives {'bytes': b'no picture'"):
        collate(rows)
    rows[0]["query"], rows[2]["negatives"] = "", []
    del rows[0]["row"], rows[0]["dataset_name"]
    with pytest.raises(ValueError, match=r"^A row of the dataset, its query '': An input is empty"):
        collate(rows[:1])


def test_stored_images_are_decoded_as_by_encode(repo, tmp_path):
    """A large JPEG too, which `encode` decodes at a part of its size."""
    path = tmp_path / "a.jpg"
    image(900, 700).save(path)
    collate, _ = collator(repo, tmp_path, condense="none")
    rows = [{"query": cell, "positive": "b"} for cell in (str(path), {"bytes": path.read_bytes(), "path": None})]
    batch = collate(rows)
    assert "query_rows" not in batch and len(batch["query_image_grid_thw"]) == 2  # another kind of value
    first, second = batch["query_pixel_values"].chunk(2)
    assert torch.equal(first, second)
    assert batch["query_hashes"][0].tolist() == batch["query_hashes"][1].tolist()


def test_groups_are_equal_in_all_formats(repo, tmp_path):
    collate, _ = collator(repo, tmp_path)
    rows = [{"query": "a", "positive": p, "group": group} for p, group in (("b", 1), ("c", 1.0), ("d", "1"))]
    assert len(set(collate(rows)["positive_hashes"][:, 1].tolist())) == 1


def test_a_query_with_another_prompt_is_another_query(repo, tmp_path):
    collate, _ = collator(repo, tmp_path, condense="none")
    collate.prompts = {"a": {"query": "Find it."}, "b": {"query": "Find another."}}
    found = [collate([{"query": "x", "positive": "y", "dataset_name": name}])["query_hashes"][0] for name in "aab"]
    (content, query), (_, again), (same, other) = (hashes.tolist() for hashes in found)
    assert content == same and query == again != other


def test_a_target_that_is_no_text_is_named(repo, tmp_path):
    collate, _ = collator(repo, tmp_path)
    with pytest.raises(ValueError, match="A row of the dataset: a target must be a text, got 3"):
        collate([{"query": "a", "positive": "b", "target": 3}])
