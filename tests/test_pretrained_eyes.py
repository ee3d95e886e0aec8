"""Eyes for the pretrained base: the training pictures, what trains tower and projector, the tasks with pictures."""

import argparse
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks.pretrained import base, eyes, model, pictures, run, tower, views
from benchmarks.pretrained.tasks import rows
from benchmarks.unified.inputs import CATEGORIES, emoji
from benchmarks.unified.tasks import Task
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.condensation import condense
from tests.support.pretrained import random_tower, write_llama

SEEING = "--word-steps 40 --steps 80 --learning-rate 1e-2 --weight 3"
TAUGHT = "--steps 2 --batch 8 --rank 2 --every 1"
COLOURS = ("red", "lime", "blue", "black", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model with the prompts of a run, and what its tower learned."""
    folder = tmp_path_factory.mktemp("eyes")
    base.build(write_llama(folder)[0], random_tower(), folder / "base")
    run.add_tokens(folder / "base", folder / "model", run.ARMS["btok-condensation"], seed=0)
    made = tower.train(loaded(folder), tower.arguments(["--model", "x", *TAUGHT.split()]))
    save_file(made, folder / tower.WEIGHTS)
    return folder


def loaded(folder):
    return BTokSentenceTransformer(folder / "model", device="cpu")


@pytest.fixture(scope="module")
def found():
    """Two pictures of each colour."""
    return [
        views.Picture(
            views.SOURCES[number % len(views.SOURCES)],
            [Image.new("RGB", (size, size), colour)],
            [("term", colour), ("caption", f"all {colour}")],
            colour,
        )
        for number, colour in enumerate(COLOURS)
        for size in (64, 96)
    ]


def options(folder, *words):
    where = ["--model", "x", "--output", str(folder), "--cache", str(folder)]
    return eyes.arguments([*where, "--batch", "5", "--word-batch", "5", "--word-rate", "1e-2", *words])


@pytest.fixture(scope="module")
def seeing(folder, found):
    """The projector, trained for some steps of both stages, behind the tower with what it learned."""
    seen = loaded(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(eyes, "pictures", lambda: found)
        losses = eyes.train(seen, options(folder, *SEEING.split()))
    return folder, seen, found, losses


def test_only_tower_and_projector_learn_to_see(seeing):
    folder, after, found, losses = seeing
    before = loaded(folder)
    tower.merge(before.transformer.model.vision_tower, load_file(folder / tower.WEIGHTS))
    changed = {
        name
        for name, tensor in after.transformer.model.state_dict().items()
        if not torch.equal(tensor, before.transformer.model.state_dict()[name])
    }
    assert changed and all(name.startswith("multi_modal_projector.") for name in changed)
    names = after.encode(COLOURS, prompt_name="term")
    assert np.array_equal(names, before.encode(COLOURS, prompt_name="term"))
    images = after.encode([part.images[0] for part in found[::2]], prompt_name="picture")
    assert (images @ names.T).argmax(1).tolist() == list(range(len(COLOURS)))
    assert losses[-1]["infonce"] < 0.5 * losses[0]["infonce"]
    first, last = (np.mean([entry["condensation"] for entry in part]) for part in (losses[:10], losses[-10:]))
    assert last < first - 0.1
    saved = load_file(folder / model.PROJECTOR)
    assert all(torch.equal(saved[n], t) for n, t in after.transformer.model.multi_modal_projector.state_dict().items())


def recorded(folder, found):
    """A model that takes recorded states, and its pictures with them."""
    fresh = loaded(folder)
    states = eyes.tower_states(fresh, [image for part in found for image in part.images], folder)
    fresh.requires_grad_(False)
    fresh.transformer.model.multi_modal_projector.requires_grad_(True)
    fresh.transformer.model.vision_tower = eyes.Recorded()
    return fresh, eyes.Album(found, states)


def test_pictures_become_the_embeddings_of_their_words(folder, found):
    fresh, album = recorded(folder, found)
    backbone = fresh.transformer.model
    losses = eyes.words_first(fresh, album, options(folder, "--word-steps", "60"))
    assert losses[-1]["words"] < 0.5 * losses[0]["words"]
    table = backbone.get_input_embeddings().weight
    ids = [fresh.tokenizer(f" {colour}", add_special_tokens=False)["input_ids"] for colour in COLOURS]
    words = torch.stack([table[row].mean(0) for row in ids])
    words, mean = words - words.mean(0), words.mean(0)
    with torch.no_grad():
        tokens = eyes.tokens_of(backbone, album.states[::2].float()) - mean
    near = F.cosine_similarity(tokens.mean(1)[:, None], words[None], dim=2)
    assert near.argmax(1).tolist() == list(range(len(COLOURS)))


def test_features_are_standardised_by_the_norm_of_the_projector(folder, found):
    fresh, album = recorded(folder, found)
    backbone, seen = fresh.transformer.model, []
    eyes.standardise(backbone, album.states)
    backbone.multi_modal_projector.layer_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    eyes.tokens_of(backbone, album.states.float())
    features = seen[0].flatten(0, 1)
    varied = features.std(0) > 0.5  # the others are nearly the same in all pictures
    assert features.mean(0).abs().max() < 1e-3 and varied.float().mean() > 0.5
    assert (features.std(0)[varied] - 1).abs().max() < 1e-3


def test_tokens_of_an_image_are_in_reading_order(folder, found):
    fresh, album = recorded(folder, found)
    backbone = fresh.transformer.model
    backbone.multi_modal_projector = torch.nn.Identity()
    states = torch.zeros_like(album.states[:1]).float()
    side = int((states.shape[1] - 1) ** 0.5)
    for row in range(side):
        for column in range(side):
            states[0, 1 + row * side + column] = row // 4 * 2 + column // 4
    tokens = eyes.tokens_of(backbone, states)[0]
    assert tokens.shape[0] == 4 and all((tokens[token] == token).all() for token in range(4))


def test_recorded_states_give_the_vectors_of_the_pictures(seeing):
    _, seen, found, _ = seeing
    backbone = seen.transformer.model
    expected = seen.encode([part.images[0] for part in found], prompt_name="picture")
    features = seen.preprocess([part.images[0] for part in found], prompt=seen.prompts["picture"])
    with torch.no_grad():
        states = backbone.vision_tower(features["pixel_values"]).last_hidden_state
        tower, backbone.vision_tower = backbone.vision_tower, eyes.Recorded()
        actual = condense(backbone, {**features, "pixel_values": states}).embeddings.numpy()
        backbone.vision_tower = tower
    assert np.abs(actual - expected).max() < 1e-6


def test_states_of_other_pictures_are_not_taken_for_these(seeing, tmp_path):
    folder, seen, found, _ = seeing
    images = [part.images[0] for part in found]
    first = eyes.tower_states(seen, images, tmp_path)
    other = eyes.tower_states(seen, images[::-1], tmp_path)
    assert torch.equal(first, other.flip(0)) and not torch.equal(first, other)
    untaught = eyes.tower_states(loaded(folder), images, tmp_path)
    assert not torch.equal(first, untaught) and len(list(tmp_path.glob("states-*"))) == 3


def test_what_was_made_of_something_else_is_not_taken(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return {"x": torch.tensor([value])}

    for key, value in ((b"a", 1.0), (b"b", 2.0), (b"a", 3.0)):
        found = eyes.kept(tmp_path / "cache", "name", key, partial(make, value))["x"].item()
        assert found == (1.0 if key == b"a" else 2.0)
    assert made == [1.0, 2.0] and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_second_run_takes_the_first_stage_as_it_is(seeing, monkeypatch):
    folder, seen, found, _ = seeing
    monkeypatch.setattr(eyes, "pictures", lambda: found)
    monkeypatch.setattr(eyes, "words_first", None)
    monkeypatch.setattr(eyes, "text_vectors", None)
    again = loaded(folder)
    eyes.train(again, options(folder, *SEEING.split()))
    projectors = [model.transformer.model.multi_modal_projector.state_dict() for model in (seen, again)]
    assert all(torch.equal(tensor, projectors[1][name]) for name, tensor in projectors[0].items())
    with pytest.raises(TypeError):  # other options, another first stage
        eyes.train(loaded(folder), options(folder, *SEEING.split(), "--seed", "1"))


def test_texts_of_each_kind_are_read_with_its_prompt(seeing):
    _, seen, _, _ = seeing
    vectors = eyes.text_vectors(seen, [("term", "red"), ("caption", "red"), ("term", "blue")]).numpy()
    expected = [seen.encode(text, prompt_name=kind) for kind, text in (("term", "red"), ("caption", "red"))]
    assert np.abs(vectors[:2] - expected).max() < 0.02 < np.abs(vectors[0] - vectors[1]).max()  # bf16


def test_a_killed_recording_goes_on(seeing, tmp_path):
    _, seen, found, _ = seeing
    images = [part.images[0] for part in found]
    expected = eyes.tower_states(seen, images, tmp_path).clone()
    [file] = tmp_path.glob("states-*")
    partial = torch.from_file(str(file), shared=True, size=expected.numel(), dtype=torch.bfloat16).view_as(expected)
    partial[2:] = 0
    partial[:2] = 7  # is kept
    file.rename(file.with_suffix(".part"))
    again = eyes.tower_states(seen, images, tmp_path)
    assert (again[:2] == 7).all() and torch.equal(again[2:], expected[2:])


def test_a_model_without_the_prompts_is_refused(folder, tmp_path):
    add_bottleneck_tokens(folder / "base", tmp_path / "repo")
    with pytest.raises(ValueError, match=r"must have the prompts.*got query, document.*run --save"):
        eyes.train(BTokSentenceTransformer(tmp_path / "repo"), argparse.Namespace())


def test_training_pictures_are_of_the_training_splits():
    found = views.pictures()
    by_source = {source: [part for part in found if part.source == source] for source in views.SOURCES}
    assert all(by_source.values()) and sum(map(len, by_source.values())) == len(found)
    unseen = {row["emoji"] for row in emoji(None)["unseen_concepts"]}
    assert not {part.group for source in ("drawings", "clips") for part in by_source[source]} & unseen
    assert all(text for part in found for _, text in part.texts)
    captions = {row["caption"] for row in rows("figures", "test")}
    assert not captions & {text for part in by_source["figures"] for _, text in part.texts}
    assert all(len(part.images) == 1 + views.VARIANTS for part in by_source["drawings"])
    [tiger] = {tuple(part.words) for part in by_source["drawings"] if part.texts[0][1] == "tiger face"}
    assert "tiger" in tiger and "face" in tiger


def test_pictures_are_drawn_by_their_shares(found):
    states = torch.arange(len(found))[:, None].expand(-1, 3)
    album, rng = eyes.Album(found, states), random.Random(0)
    drawn = [album.draw(rng) for _ in range(2000)]
    for source, share in eyes.SHARES.items():
        assert np.mean([found[index].source == source for index in drawn]) == pytest.approx(share, abs=0.04)
    assert torch.equal(album.pixels(rng, drawn)[:, 0], torch.tensor(drawn).float())


def test_pictures_are_scored_with_the_prompts_of_what_they_are(seeing, monkeypatch):
    _, seen, found, _ = seeing
    found = found[::2]
    names, images = [part.texts[0][1] for part in found], [part.images[0] for part in found]
    right = list(range(len(found)))
    asked = {
        "name → drawing, 56 pixels": Task("", names, images, right, names),
        "drawing → name": Task("", images, names, right, names),
    }
    monkeypatch.setattr(pictures, "asked", lambda: asked)
    assert pictures.ranks(seen) == {name: [1] * len(found) for name in asked}
    monkeypatch.setattr(pictures, "PROMPTS", {"name": "picture"})  # other words, other ranks
    assert pictures.ranks(seen) != {name: [1] * len(found) for name in asked}


def test_what_is_right_too_is_no_negative():
    def loss(*right):
        return eyes.info_nce(vectors[:2], vectors, torch.tensor([0, 1]), torch.tensor(right) > 0).item()

    vectors = F.normalize(torch.tensor([[1.0, 0.2], [1.0, 0.3], [1.0, 0.1]]), dim=1)
    alone, both, all_three = loss([1, 0, 0], [0, 1, 0]), loss([1, 1, 0], [1, 1, 0]), loss([1, 1, 1], [1, 1, 1])
    assert alone > both > all_three == pytest.approx(0, abs=1e-6)
    similar = vectors[:2] @ vectors.T / eyes.TEMPERATURE
    forth, back = (F.cross_entropy(part, torch.tensor([0, 1])).item() for part in (similar, similar[:, :2].T))
    assert alone == pytest.approx((forth + back) / 2)


def test_eyes_need_the_tower_s_training(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tower.safetensors does not exist. Train the tower first"):
        eyes.train(loaded(folder), options(tmp_path))


def test_the_tower_learns_names_of_drawings(folder, capsys):
    """On a random tower of two layers the training drawings are told apart a little better with every step."""
    words = "--model x --steps 30 --batch 32 --rank 4 --learning-rate 1e-2 --every 10"
    before = loaded(folder)
    factors = tower.train(loaded(folder), tower.arguments(words.split()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 10", "step 20", "step 30"]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[2] < losses[0] - 0.2
    assert all("drawings" in line and "concepts" in line for line in lines)
    own = before.transformer.model.vision_tower
    name = "encoder.layer.0.mlp.fc1"
    kept, added = own.get_submodule(name).weight.clone(), factors[f"{name}.B"] @ factors[f"{name}.A"]
    tower.merge(own, factors)
    assert added.abs().max() > 0.01 and torch.allclose(own.get_submodule(name).weight, kept + added)
    with pytest.raises(
        ValueError, match=r"do not fit the tower at encoder\.layer\.0\.mlp\.fc1: .* Train them on this base"
    ):
        tower.merge(own, {f"{name}.A": torch.ones(2, 3), f"{name}.B": torch.ones(3, 2)})


def test_left_out_drawings_are_found_among_their_own(folder):
    model = loaded(folder)
    watch = tower.Watch(model, torch.zeros(model.get_embedding_dimension()))
    assert watch.scores(watch.names) == {"drawings": 100, "concepts": 100}
    drawings, asked = tower.left_out("unseen_drawings")
    assert all(drawings[index]["category"] not in CATEGORIES for index in asked) and 200 < len(asked) < len(drawings)
    assert len(watch.images) == len(watch.rows) == len(drawings) + len(tower.left_out("unseen_concepts")[0])
