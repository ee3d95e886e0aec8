"""The table of a batch's keys is complete."""

from support.media import image, video
from support.training import collator

from btok_hf import BTokSentenceTransformer
from btok_hf.features import BatchFeatures
from btok_hf.training import CondensationLoss


def test_the_table_holds_every_key_that_is_added_to_the_processors(repos, tmp_path, monkeypatch):
    """Keys of the collator, of the loss and of the module, over one step with a frozen vision tower."""
    rows = [
        {"query": {"image": image(56, 56), "text": "a"}, "positive": "same", "negative": "x", "group": "g"},
        {"query": {"video": video(), "text": "b"}, "positive": "same", "negative": "y", "group": "g"},
        {"query": "c", "positive": {"image": image(60, 40), "text": "d"}, "negative": "x", "group": None},
    ]
    found, processors = set(), set()
    embed = CondensationLoss.embed_minibatch

    def watched(self, sentence_feature, *args, **kwargs):
        found.update(sentence_feature)
        return embed(self, sentence_feature, *args, **kwargs)

    monkeypatch.setattr(CondensationLoss, "embed_minibatch", watched)
    for path in repos.values():
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
