"""The table of a batch's keys is complete, and the sides of a batch can be stacked."""

import torch
from support import tiny
from support.media import image, video
from support.training import collator

from btok_hf import BTokSentenceTransformer
from btok_hf.features import IGNORED, TEXT_KEYS, BatchFeatures, stacked
from btok_hf.training import CondensationLoss


def test_the_table_holds_every_key_that_is_added_to_the_processors(repos, tmp_path, monkeypatch):
    """Keys of the collator, of the loss and of the module, over one step with a frozen vision tower."""
    rows = [
        {"query": {"image": image(56, 56), "text": "a"}, "positive": "same", "negative": "x", "group": "g"},
        {"query": "b", "positive": "same", "negative": "y", "group": "g"},
        {"query": "c", "positive": {"image": image(60, 40), "text": "d"}, "negative": "x", "group": None},
    ]
    found, processors = set(), set()
    embed = CondensationLoss.embed_minibatch

    def watched(self, sentence_feature, *args, **kwargs):
        found.update(sentence_feature)
        return embed(self, sentence_feature, *args, **kwargs)

    monkeypatch.setattr(CondensationLoss, "embed_minibatch", watched)
    for backbone, path in repos.items():
        rows[1]["query"] = {"video": video(), "text": "b"} if backbone in tiny.WITH_VIDEO else "b"
        collate, _ = collator(path, tmp_path, condense="both")
        batch = collate(rows)
        sides = [
            {key.removeprefix(f"{side}_"): value for key, value in batch.items() if key.startswith(f"{side}_")}
            for side in ("query", "positive", "negative")
        ]
        model = BTokSentenceTransformer(path, device="cpu").train()
        processors.update(model.preprocess([row["query"] for row in rows]))
        model[0].vision_tower.requires_grad_(False)
        model[0].register_forward_pre_hook(lambda module, inputs: found.update(inputs[0]))
        model[0].register_forward_hook(lambda module, inputs, output: found.update(output))
        found.update(*sides)
        CondensationLoss(model, mini_batch_size=2)(sides).backward()
    assert found - processors == set(BatchFeatures.__annotations__)


def test_sides_of_texts_are_stacked_with_and_without_targets_and_copies(repo, tmp_path):
    collate, _ = collator(repo, tmp_path, condense="positive")  # the query encodes, the positive is generated
    rows = [{"query": "a long query of more words", "positive": "p"}, {"query": "b", "positive": "p"}]
    batch = collate(rows)
    query, positive = (
        {key.removeprefix(f"{side}_"): value for key, value in batch.items() if key.startswith(f"{side}_")}
        for side in ("query", "positive")
    )
    positive["copies"] = torch.tensor([2])
    for side in (query, positive):
        for name in ("hashes", "rows"):
            side.pop(name, None)
        assert side.keys() <= TEXT_KEYS
    tokenizer = BTokSentenceTransformer(repo, device="cpu").tokenizer
    both = stacked([query, positive], tokenizer)
    length, short = query["input_ids"].shape[1], positive["input_ids"].shape[1]
    assert both["input_ids"].shape == (3, length) and short < length
    assert both["input_ids"][2].tolist() == [
        *positive["input_ids"][0].tolist(),
        *[tokenizer.pad_token_id] * (length - short),
    ]
    assert both["attention_mask"].sum(1).tolist() == [length, query["attention_mask"][1].sum().item(), short]
    assert torch.equal(both["target_labels"][:2], query["target_labels"])
    assert both["target_labels"].shape[1] == 1 and (both["target_labels"][2] == IGNORED).all()
    assert both["copies"].tolist() == [1, 1, 2] and both["modality"] == query["modality"]
