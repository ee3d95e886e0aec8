"""The loss against its definition: GradCache, copies, frozen vision, Matryoshka, several processes."""

import re

import pytest
import torch
from support import tiny
from support.gradients import assert_same_gradients, named_gradients
from support.media import image, video
from support.processes import run_two
from support.training import batch_features, collator, reference_loss
from torch.nn import functional as F

from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense
from btok_hf.training import CondensationConfig, CondensationLoss
from btok_hf.training.condensation_collator import CondensationCollator


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mini_batch_size", [1, 2, 4, 6, 100])
def test_gradcache_equals_the_full_batch(repo, mini_batch_size, symmetric):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    infonce, condensation, total = reference_loss(model, batch_features(model), 0.7, symmetric=symmetric)
    total.backward()
    expected = named_gradients(model)
    model.zero_grad()
    loss = CondensationLoss(model, mini_batch_size=mini_batch_size, condensation_weight=0.7, symmetric=symmetric)
    (loss(batch_features(model)) * 3).backward()  # as a gradient scaler or accumulation would
    torch.testing.assert_close(loss.infonce, infonce.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.condensation, condensation.detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients({name: g / 3 for name, g in named_gradients(model).items()}, expected)


@pytest.mark.parametrize(
    ("last", "size", "rows_of_forwards"),
    [
        ("b b b", {"mini_batch_size": 5}, [5]),
        ("b b b", {"mini_batch_size": 4}, [1, 2, 2]),  # each fits, but not all
        ("b b b", {"mini_batch_num_tokens": 0}, [5]),  # more than the tokens of the batch
        ("b b b", {"mini_batch_num_tokens": -1}, [1, 2, 2]),
        ({"image": image(40, 40), "text": "b"}, {"mini_batch_size": 5}, [1, 2, 2]),
    ],
)
def test_texts_of_a_batch_that_fits_share_a_forward(repo, tmp_path, last, size, rows_of_forwards, monkeypatch):
    """With targets on one side, copies on the other, and a side of another length; gradients as one by one."""
    collate, _ = collator(repo, tmp_path, condense="positive")
    rows = [{"query": query, "positive": "the same", "negative": n} for query, n in (("a", "c d e"), (last, "f"))]
    batch = collate(rows)
    sides = [
        {key.removeprefix(f"{side}_"): value for key, value in batch.items() if key.startswith(f"{side}_")}
        for side in ("query", "positive", "negative")
    ]
    assert "target_ids" in sides[0] and "rows" in sides[1] and len(sides[1]["input_ids"]) == 1
    tokens = sum(side["attention_mask"].sum() for side in sides) + sides[0]["target_labels"].shape[2] * 2
    size = {name: value + int(tokens) * (name == "mini_batch_num_tokens") for name, value in size.items()}
    model = BTokSentenceTransformer(repo, device="cpu").train()
    seen = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]["input_ids"])))
    found = []
    for sizes in ({"mini_batch_size": 1}, size):
        loss = CondensationLoss(model, condensation_weight=0.7, **sizes)
        seen.clear()
        loss([dict(side) for side in sides]).backward()
        found.append((loss.infonce, loss.condensation, named_gradients(model)))
        model.zero_grad()
    assert seen == rows_of_forwards and not loss.cached
    one_by_one, once = found
    for one, other in zip(one_by_one[:2], once[:2]):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert_same_gradients(once[2], one_by_one[2])
    # Several processes must run equally many.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seen.clear()
    loss._embed_once([{**side, "cu_seq_lens_q": torch.tensor([0, 1])} for side in map(without_rows, sides)])
    assert seen == [1, 2, 2]


def without_rows(side):
    return {key: value for key, value in side.items() if key not in ("rows", "hashes")}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_gradcache_with_checkpointing_and_without_mask(either, checkpointing, mask):
    model = BTokSentenceTransformer(either, device="cpu").train()
    _, _, total = reference_loss(model, batch_features(model, condense="query"), 2.0, mask=mask)
    total.backward()
    expected = named_gradients(model)
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = CondensationLoss(model, mini_batch_size=4, condensation_weight=2.0, condensation_mask=mask)
    loss(batch_features(model, condense="query")).backward()
    assert_same_gradients(named_gradients(model), expected)


def test_evaluation_gives_the_same_value_without_gradients(either):
    model = BTokSentenceTransformer(either, device="cpu").eval()
    _, _, total = reference_loss(model, batch_features(model), 0.7)
    for mini_batch_size in (2, 100):
        loss = CondensationLoss(model, mini_batch_size=mini_batch_size, condensation_weight=0.7)
        with torch.no_grad():
            torch.testing.assert_close(loss(batch_features(model)), total.detach(), atol=1e-4, rtol=1e-5)


def test_weight_zero_runs_no_targets(repo):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    loss = CondensationLoss(model, mini_batch_size=2, condensation_weight=0.0)
    loss(batch_features(model)).backward()
    assert loss.condensation is None and loss.infonce is not None


@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_copies_of_the_right_answer_are_no_negatives(repo, mini_batch_size):
    """Masked by content, by group and by identical queries. A query's own positive stays."""
    picture = image(40, 40)
    rows = [
        {"query": "q0", "positive": "same", "negative": "other"},
        {"query": "q1", "positive": "same", "negative": None},
        {
            "query": "q2",
            "positive": {"image": picture},
            "group": "cats",
            "negatives": ["same", None, "a cat"],
            "negative_groups": [None, "dogs", "cats"],
        },
        {"query": {"text": "q3"}, "positive": "b", "group": "cats", "negative": "one more"},
        {"query": {"text": "q1"}, "positive": {"image": picture.copy()}, "negative": "b"},
    ]
    rows = [{"group": None, "negative": None, "negatives": [], "negative_groups": None, **row} for row in rows]
    # positives: same, same, picture, b, picture; negatives: other, one more, b, same, a cat
    false = torch.zeros(5, 10, dtype=torch.bool)
    for query, candidates in {0: [1, 8], 1: [0, 2, 4, 8], 2: [3, 4, 7, 9], 3: [2, 4, 7, 9], 4: [0, 1, 2, 8]}.items():
        false[query, candidates] = True
    backwards = torch.zeros(5, 5, dtype=torch.bool)  # of positives: the queries of their right rows
    for positive, queries in {0: [1, 4], 1: [0, 4], 2: [1, 3, 4], 3: [2], 4: [1, 2, 3]}.items():
        backwards[positive, queries] = True
    model = BTokSentenceTransformer(repo, device="cpu").train()

    def trained(**kwargs):
        args = CondensationConfig(output_dir="unused", condense="none", report_to="none", use_cpu=True, **kwargs)
        collate = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
        batch = collate(rows)
        sides = ("query_", "positive_", "negative_")
        features = [{k[len(side) :]: v for k, v in batch.items() if k.startswith(side)} for side in sides]
        loss = CondensationLoss(model, mini_batch_size=mini_batch_size, symmetric=True)
        model.zero_grad()
        loss(features).backward()
        return loss.infonce, named_gradients(model), features

    def expected(false, features):
        queries, positives, negatives = (
            condense(model[0].model, feature).embeddings[feature.get("rows", slice(None))] for feature in features
        )
        scores = queries @ torch.cat([positives, negatives]).T / 0.02
        forth = F.cross_entropy(scores.masked_fill(false, -torch.inf), torch.arange(5))
        back = scores[:, :5].T.masked_fill(backwards & false.any(), -torch.inf)
        back = F.cross_entropy(back, torch.arange(5))
        model.zero_grad()
        ((forth + back) / 2).backward()
        return (forth + back).detach() / 2, named_gradients(model)

    for masked, kwargs in ((false, {}), (false & False, {"mask_false_negatives": False})):
        infonce, gradients, features = trained(**kwargs)
        value, right = expected(masked, features)
        torch.testing.assert_close(infonce, value, atol=1e-4, rtol=1e-5)
        assert_same_gradients(gradients, right)


@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_what_a_batch_holds_twice_is_encoded_once(repo, mini_batch_size):
    """Equal labels and images are encoded once, with their targets. Loss and gradients do not change."""
    picture = image(60, 40)
    rows = [
        {"query": {"image": picture, "text": "which"}, "positive": "cat", "target": "a cat", "negative": "dog"},
        {"query": "q1", "positive": "cat", "target": "a cat", "negative": "dog"},
        {"query": {"image": picture, "text": "which"}, "positive": "cat", "target": "another", "negative": None},
        {"query": "q3", "positive": {"image": picture}, "target": "a cat", "negative": "owl"},
        {"query": "q4", "positive": {"image": picture}, "target": "a cat", "negative": "dog"},
    ]
    args = CondensationConfig(output_dir="unused", condense="query", report_to="none", use_cpu=True)
    found = {}
    for copies in (False, True):
        model = BTokSentenceTransformer(repo, device="cpu").train()
        collator = CondensationCollator(
            preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args, deduplicate=not copies
        )
        batch = collator(rows)
        prefixes = ("query_", "positive_", "negative_")
        features = [{k[len(p) :]: v for k, v in batch.items() if k.startswith(p)} for p in prefixes]
        assert [len(f["input_ids"]) for f in features] == ([5, 5, 4] if copies else [4, 3, 2])
        loss = CondensationLoss(model, mini_batch_size=mini_batch_size, condensation_weight=0.7)
        value = loss(features)
        value.backward()
        found[copies] = value.detach(), loss.infonce, loss.condensation, named_gradients(model)
    for actual, expected in zip(found[False][:3], found[True][:3]):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(found[False][3], found[True][3])


@pytest.mark.parametrize("mini_batch_size", [1, 2])
def test_intervals_of_frames_stay_with_their_videos(repos, mini_batch_size):
    """Qwen2.5-VL takes one interval per video, and rows have none, one or two videos."""
    model = BTokSentenceTransformer(repos["qwen2_5_vl"], device="cpu").train()
    clips = [
        {"array": video(4, 56, i)["array"], "video_metadata": {**video()["video_metadata"], "fps": 2.0 / (i + 1)}}
        for i in range(4)
    ]
    queries = ["text", {"video": clips[:2]}, {"video": clips[2]}, {"video": clips[3], "text": "see"}]
    losses = []
    for size in (mini_batch_size, 8):
        features = [model.preprocess(queries), model.preprocess(["a", "b", "c", "d"])]
        assert len(features[0]["second_per_grid_ts"]) == 4 and len(set(features[0]["second_per_grid_ts"].tolist())) > 1
        loss = CondensationLoss(model, mini_batch_size=size)
        losses.append(loss(features).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_vision_tower_runs_once(repos, checkpointing):
    """GradCache's second pass uses the vision outputs of the first, for images and videos of all backbones."""
    for name, repo in repos.items():
        model = BTokSentenceTransformer(repo, device="cpu").train()
        backbone, calls = model[0].model, []
        towers = ("visual", "vision_tower", "vision_model")
        tower = next(backbone.get_submodule(name) for name in towers if hasattr(backbone, name))
        tower.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model[0].vision_tower.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        features = batch_features(model)
        clip = {"image": image(40, 40), "text": "both kinds"}
        if name in tiny.WITH_VIDEO:
            clip["video"] = video(4, 56)
        features[1] |= model.preprocess([clip] * 6)
        with torch.no_grad():
            once = CondensationLoss(model, mini_batch_size=100)(features)
        whole = CondensationLoss(model, mini_batch_size=100)
        whole(features).backward()
        expected = named_gradients(model)
        model.zero_grad()
        del calls[:]
        loss = CondensationLoss(model, mini_batch_size=2)
        value = loss(features)
        first = len(calls)
        value.backward()
        assert len(calls) == first > 0, name
        torch.testing.assert_close(value.detach() + 5 * loss.condensation, once, atol=1e-4, rtol=1e-5)
        assert_same_gradients(named_gradients(model), expected)
        assert "get_image_features" not in vars(backbone)

        model[0].vision_tower.requires_grad_(True)  # gradients of the tower need a second forward
        del calls[:]
        CondensationLoss(model, mini_batch_size=2)(features).backward()
        assert len(calls) == 2 * first


def test_a_token_budget_bounds_every_forward_and_changes_nothing_else(repo):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    _, _, total = reference_loss(model, batch_features(model), 0.7)
    total.backward()
    expected = named_gradients(model)
    model.zero_grad()
    loss = CondensationLoss(model, mini_batch_num_tokens=210, condensation_weight=0.7)
    sizes = []
    model[0].model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((kwargs["inputs_embeds"].shape[1], torch.is_grad_enabled())),
        with_kwargs=True,
    )
    loss(batch_features(model)).backward()
    assert_same_gradients(named_gradients(model), expected)
    second = [size for size, with_grad in sizes if with_grad]
    assert max(second) <= 210 and len(second) > 3
    # The same budget without targets takes fewer forwards: their tokens were counted.
    sizes.clear()
    CondensationLoss(model, mini_batch_num_tokens=210, condensation_weight=0.0)(batch_features(model)).backward()
    assert 0 < len([size for size, with_grad in sizes if with_grad]) < len(second)


@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_matryoshka_dimensions_are_trained_through_gradcache(repo, mini_batch_size):
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model, condense="none")
    embeddings = [condense(model[0].model, feature).embeddings for feature in features]
    value = 0
    for dim in (64, 16, 8):
        queries, *candidates = (F.normalize(embedding[:, :dim], dim=1) for embedding in embeddings)
        value = value + F.cross_entropy(queries @ torch.cat(candidates).T / 0.02, torch.arange(6)) / 3
    value.backward()
    expected = named_gradients(model)
    model.zero_grad()
    loss = CondensationLoss(model, mini_batch_size=mini_batch_size, matryoshka_dims=[64, 16, 8])
    assert model.config.matryoshka_dimensions == [8, 16, 64]  # what vLLM may cut to
    loss(batch_features(model, condense="none")).backward()
    torch.testing.assert_close(loss.infonce, value.detach(), atol=1e-4, rtol=1e-5)
    assert_same_gradients(named_gradients(model), expected)
    for wrong in ([128], [64, 0], [32, 16], [64, 16, 16]):
        with pytest.raises(
            ValueError, match=rf"largest of them the .* 64 dimensions, got \[{wrong[0]}.*\[64, 32, 16\]"
        ):
            CondensationLoss(model, matryoshka_dims=wrong)


@pytest.fixture(scope="module")
def two_processes(repo, tmp_path_factory):
    """Folder of what two processes wrote: gradients with DDP and FSDP2, and the error for unequal work."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_two("two_processes.py", repo, folder)
    return folder


@pytest.mark.parametrize("mini_batch_size", [2, 100])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_equal_one(repo, two_processes, how, mini_batch_size):
    """The processes have different numbers of candidates, images and targets."""
    two = torch.load(two_processes / f"{how}-{mini_batch_size}.pt")
    model = BTokSentenceTransformer(repo, device="cpu").train()
    features = batch_features(model)
    if how == "ddp":
        features[2] = {k: v[[0, 1, 3, 4, 5]] for k, v in features[2].items() if isinstance(v, torch.Tensor)}
    loss = CondensationLoss(model, mini_batch_size=2, condensation_weight=0.5)
    loss(features).backward()
    torch.testing.assert_close(two["loss"], loss.infonce + 0.5 * loss.condensation, atol=1e-5, rtol=1e-5)
    assert_same_gradients(two["gradients"], named_gradients(model))
    if how == "fsdp2" and mini_batch_size == 2:
        saved = BTokSentenceTransformer(two_processes / "fsdp2_model", device="cpu").state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_sharded_processes_need_equally_many_mini_batches(two_processes):
    for rank in range(2):
        refusal = (two_processes / f"refusal_{rank}.txt").read_text()
        assert re.search(r"processes have \[5, 6\] mini-batches .* equally many negatives", refusal)
