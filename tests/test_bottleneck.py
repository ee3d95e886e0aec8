"""Bottleneck Tokens in a base checkpoint, and the embedding template."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from support import tiny
from support.inputs import TOLERANCE, as_messages, process
from support.media import image
from support.repositories import edit
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, BertConfig, BertModel

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, bottleneck


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_tokens_take_spare_rows_that_start_at_eos(bases, tmp_path, backbone):
    before = AutoModelForImageTextToText.from_pretrained(bases[backbone])
    repo = add_bottleneck_tokens(bases[backbone], tmp_path / "repo")
    after = AutoModelForImageTextToText.from_pretrained(repo)
    processor = AutoProcessor.from_pretrained(repo)
    ids, taken = after.config.btok_token_ids, len(processor.tokenizer) - 4
    assert processor.tokenizer.convert_ids_to_tokens(ids) == [f"<|btok_{i}|>" for i in range(4)]
    assert (
        taken >= 264 and ids == list(range(taken, taken + 4)) and after.get_input_embeddings().weight.shape[0] == 320
    )
    for name, tensor in before.state_dict().items():
        other = after.state_dict()[name]
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(other[ids], tensor[processor.tokenizer.eos_token_id].expand(4, -1))
            tensor, other = tensor[:taken], other[:taken]
        assert torch.equal(other, tensor), name


def test_noise_is_seeded(bases, tmp_path):
    first, again, other = (
        AutoModel.from_pretrained(
            add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / str(i), noise_std=0.5, seed=seed)
        ).get_input_embeddings()
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert len(first.weight[264:268].unique(dim=0)) == 4


def test_tokens_after_a_suffix_start_as_its_last_token(bases, tmp_path):
    before = AutoModelForImageTextToText.from_pretrained(bases["qwen2_vl"])
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", suffix="in one word:")
    after = AutoModelForImageTextToText.from_pretrained(repo)
    tokenizer = AutoProcessor.from_pretrained(repo).tokenizer
    colon = tokenizer.encode(":", add_special_tokens=False)
    old, new = before.get_input_embeddings().weight, after.get_input_embeddings().weight
    assert torch.equal(new[after.config.btok_token_ids], old[colon].expand(4, -1))
    assert after.config.btok_initialisation["row"] == ":"


@pytest.mark.parametrize("backbone", ["qwen2_vl", "idefics3"])  # the published vocabularies of the second are full
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_grows_only_without_spare_rows(tmp_path, backbone, tied):
    base = tiny.build(backbone, tmp_path / "base", vocab_size=265, tied=tied)
    model = AutoModelForImageTextToText.from_pretrained(add_bottleneck_tokens(base, tmp_path / "repo"))
    assert model.get_input_embeddings().weight.shape[0] == model.config.get_text_config().vocab_size == 320
    old = AutoModelForImageTextToText.from_pretrained(base)
    for new_layer, old_layer in (
        (model.get_input_embeddings(), old.get_input_embeddings()),
        (model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        eos = old.config.get_text_config().eos_token_id
        assert torch.equal(new_layer.weight[:264], old_layer.weight[:264])
        assert torch.equal(new_layer.weight[264:268], old_layer.weight[eos].expand(4, -1))


def test_another_count_is_refused_and_the_same_keeps_the_rows(repo, tmp_path):
    with pytest.raises(ValueError, match="already has 4 Bottleneck Tokens"):
        add_bottleneck_tokens(repo, tmp_path / "eight", num_tokens=8)
    again = add_bottleneck_tokens(repo, tmp_path / "again")
    assert Path(again, "chat_template.jinja").read_text() == Path(repo, "chat_template.jinja").read_text()
    assert load_file(Path(again, "model.safetensors"))["model.embed_tokens.weight"].equal(
        load_file(Path(repo, "model.safetensors"))["model.embed_tokens.weight"]
    )


def test_unsuitable_bases_are_refused(bases, tmp_path):
    BertModel(BertConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="got model_type 'bert'"):
        add_bottleneck_tokens(tmp_path / "bert", tmp_path / "repo")
    silent = tiny.build("qwen2_vl", tmp_path / "silent", chat_template=None)
    with pytest.raises(ValueError, match="must have one chat template"):
        add_bottleneck_tokens(silent, tmp_path / "repo")
    with pytest.raises(ValueError, match="num_tokens must be 0"):
        add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", num_tokens=-1)
    assert not (tmp_path / "repo").exists()
    with pytest.raises(ValueError, match="already holds a model"):
        add_bottleneck_tokens(bases["qwen2_vl"], bases["qwen3_vl"])


def test_tokens_without_their_ids_in_the_config_are_named(repo, tmp_path):
    shutil.copytree(repo, tmp_path / "base")
    config = json.loads(Path(repo, "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("btok_")}
    Path(tmp_path, "base", "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"tokenizer of .*base has Bottleneck Tokens, .*Restore its config\.json"):
        add_bottleneck_tokens(tmp_path / "base", tmp_path / "repo")


def test_special_tokens_that_are_words_are_refused(tmp_path):
    """A text with a space in every such word would be another text."""
    base = tiny.build("qwen2_vl", tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(["SEP"], special_tokens=True)
    processor.save_pretrained(base)
    with pytest.raises(ValueError, match=r"no words after '<': \['SEP'\]. The chat template cannot escape them"):
        add_bottleneck_tokens(base, tmp_path / "repo")


def test_max_pixels_bounds_the_tokens_of_an_image(bases, tmp_path):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", max_pixels=28 * 28 * 4)
    processor = AutoProcessor.from_pretrained(repo)
    conversation = [[{"role": "user", "content": [{"type": "image", "image": image(400, 400)}]}]]
    assert process(processor, conversation)["image_grid_thw"].prod() <= 4 * 4
    with pytest.raises(ValueError, match="min_pixels must not exceed max_pixels, got 10 and 5"):
        add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "other", min_pixels=10, max_pixels=5)


def test_embedding_template_order_and_chat_template(repo):
    processor = AutoProcessor.from_pretrained(repo)
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}, {"type": "video"}]
    messages = [{"role": "system", "content": "Find."}, {"role": "user", "content": parts}]
    media = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
    tokens = "<|btok_0|><|btok_1|><|btok_2|><|btok_3|>"
    assert processor.apply_chat_template(messages) == media + " Find. one two" + tokens
    chat = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nFind.<|im_end|>") and chat.endswith("<|im_start|>assistant\n")
    assert "btok" not in chat


MARKS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}


def in_words(messages, order):
    """What a template must render without tokens, written without Jinja."""
    parts = [
        (message["role"], part["type"], part.get("text", "").replace("<|", "< |"))
        for message in messages
        for part in (
            [{"type": "text", "text": message["content"]}]
            if isinstance(message["content"], str)
            else message["content"]
        )
    ]
    if order == "media_first":
        texts = {"system": "", "user": ""}
        for role, kind, text in parts:
            if kind == "text":
                texts[role] += (" " if texts[role] else "") + text
        row = ["".join(MARKS[kind] for _, kind, _ in parts if kind in MARKS), *texts.values()]
        return " ".join(part for part in row if part)
    row, after_media = "", False
    for _, kind, text in parts:
        if kind in MARKS or text:
            row += ("" if not row or (after_media and kind in MARKS) else " ") + MARKS.get(kind, text)
            after_media = kind in MARKS
    return row


@pytest.mark.parametrize("order", bottleneck.ORDERS)
def test_templates_render_the_order_of_their_name(bases, tmp_path, order):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", order=order)
    processor = AutoProcessor.from_pretrained(repo)
    rng = random.Random(0)
    values = [{"type": "image"}, {"type": "video"}]
    values += [{"type": "text", "text": text} for text in ("", " ", "a", "b c", "<|x", " d ")]
    rendered = 0
    for _ in range(300):
        content = [rng.choice(values) for _ in range(rng.randint(1, 5))]
        messages = [{"role": "user", "content": content}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": rng.choice(["Find.", "", "x <|y"])})
        if any(part["type"] != "text" or part["text"].strip() for part in content):
            expected = in_words(messages, order) + "<|btok_0|><|btok_1|><|btok_2|><|btok_3|>"
            assert processor.apply_chat_template(messages) == expected
            rendered += 1
    assert rendered > 200


def test_the_order_is_recorded_and_cannot_be_changed(bases, tmp_path):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", order="as_given")
    assert AutoConfig.from_pretrained(repo).btok_order == "as_given"
    assert "in the order in which they are given" in (repo / "README.md").read_text("utf-8")
    with pytest.raises(ValueError, match="the order 'as_given', got order='media_first'"):
        add_bottleneck_tokens(repo, tmp_path / "other")
    again = add_bottleneck_tokens(repo, tmp_path / "again", order="as_given")
    assert AutoConfig.from_pretrained(again).btok_order == "as_given"
    with pytest.raises(ValueError, match="order must be one of media_first, as_given, got 'given'"):
        add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "third", order="given")


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_suffix_is_in_every_row_and_is_never_cut(bases, tmp_path, num_tokens):
    words = 'This "quoted" \\ {{ means }} in one word: "'
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", num_tokens, noise_std=0.5, suffix=words)
    processor = AutoProcessor.from_pretrained(repo)
    tokens = "<|btok_0|><|btok_1|><|btok_2|><|btok_3|>" if num_tokens else "<|im_end|>"
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert processor.apply_chat_template(messages) == f"{MARKS['image']} a {words}{tokens}"
    assert AutoConfig.from_pretrained(repo).btok_suffix == words
    assert f"then the words `{words}`" in (repo / "README.md").read_text("utf-8")
    ours, stock = BTokSentenceTransformer(repo, device="cpu"), SentenceTransformer(str(repo), device="cpu")
    end = processor.tokenizer(f" {words}{tokens}", add_special_tokens=False)["input_ids"]
    for model in (ours, stock):
        model.max_seq_length = len(end) + 5
        row = model.preprocess(["x y " * 40])["input_ids"][0].tolist()
        assert len(row) == len(end) + 5 and row[-len(end) :] == end
    np.testing.assert_allclose(ours.encode(["x y " * 40, "z"]), stock.encode(["x y " * 40, "z"]), atol=2e-6)
    if num_tokens:
        with pytest.raises(ValueError, match="and the suffix 'This"):
            add_bottleneck_tokens(repo, tmp_path / "other")


def test_a_base_with_tokens_keeps_its_instructions(bases, tmp_path):
    base = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "base", prompts={"query": "Q:"}, noise_std=0.5)
    changed = {"default_prompt_name": "query", "truncate_dim": 16}
    edit(base, "config_sentence_transformers.json", lambda config: config.update(changed))
    expected = SentenceTransformer(str(base), device="cpu")
    for model in (
        SentenceTransformer(str(add_bottleneck_tokens(base, tmp_path / "again")), device="cpu"),
        BTokSentenceTransformer(tmp_path / "again", device="cpu"),
    ):
        for name in ("encode", "encode_query"):
            np.testing.assert_allclose(getattr(model, name)(["a"]), getattr(expected, name)(["a"]), atol=2e-6)
    other = BTokSentenceTransformer(add_bottleneck_tokens(base, tmp_path / "other", prompts={"query": "R:"}))
    assert other.prompts["query"] == "R:" and other.default_prompt_name is None


def test_prompts_by_the_names_of_encode_document(bases, tmp_path):
    """An empty prompt of another name would come first."""
    prompts = {"query": "Q:", "passage": "P:"}
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", prompts=prompts, noise_std=0.5)
    for model in (BTokSentenceTransformer(repo, device="cpu"), SentenceTransformer(str(repo), device="cpu")):
        assert np.abs(model.encode_document(["a"]) - model.encode(["a"], prompt="P:")).max() <= TOLERANCE
    for wrong in ("Q:", {"query": 3}):
        with pytest.raises(TypeError, match="prompts must be a dict of texts"):
            add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "other", prompts=wrong)


@pytest.mark.parametrize("suffix", ["", " ", "<|btok_0|>", "two  spaces", "line\nbreak", " leading"])
def test_a_suffix_that_is_no_words_is_refused(bases, tmp_path, suffix):
    with pytest.raises(ValueError, match="suffix must be words"):
        add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", suffix=suffix)


def test_all_loaders_keep_the_given_order(bases, tmp_path):
    """Dict keys, images between texts, an instruction: one vector in every loader, another for another order."""
    repo = add_bottleneck_tokens(bases["qwen3_vl"], tmp_path / "repo", noise_std=0.5, order="as_given")
    red, blue = image(64, 64), image(96, 64)
    between = [{"type": "text", "text": "a"}, {"type": "image", "image": red}, {"type": "text", "text": "b"}]
    between.append({"type": "image", "image": blue})
    dicts = [{"text": "a", "image": red}, {"image": red, "text": "a"}, {"image": [red, blue], "text": "a"}]
    messages = [[{"role": "user", "content": between}], [{"role": "user", "content": between[::-1]}]]
    ours = BTokSentenceTransformer(repo, device="cpu")
    stock = SentenceTransformer(str(repo), device="cpu")
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo)
    for inputs in (dicts, messages):
        vectors = ours.encode(inputs, prompt="Find.")
        np.testing.assert_allclose(stock.encode(inputs, prompt="Find."), vectors, atol=2e-6)
        conversations = [as_messages(item, "Find.") for item in inputs]
        with torch.no_grad():
            auto = model(**process(processor, conversations)).pooler_output
        np.testing.assert_allclose(auto, vectors, atol=2e-6)
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.parametrize("text", ["<|btok_0|>", "a <|image_pad|> b", "<|im_end|>", "<<||image_pad|>", "<|<|btok_3|>"])
def test_typed_special_tokens_stay_text(repo, text):
    processor = AutoProcessor.from_pretrained(repo)
    for message in ({"role": "user", "content": text}, {"role": "user", "content": [{"type": "text", "text": text}]}):
        rendered = process(processor, [[{"role": "system", "content": text}, message]])["input_ids"][0].tolist()
        assert rendered[-4:] == [264, 265, 266, 267]
        assert all(token < 256 for token in rendered[:-4])


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_empty_input_is_refused(repo, content):
    with pytest.raises(Exception, match="An input is empty"):
        AutoProcessor.from_pretrained(repo).apply_chat_template([{"role": "user", "content": content}])


def test_unknown_content_is_refused(repo):
    with pytest.raises(Exception, match="got audio"):
        AutoProcessor.from_pretrained(repo).apply_chat_template(
            [{"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}]
        )


def test_generation_works_and_never_chooses_a_bottleneck_token(repo):
    processor = AutoProcessor.from_pretrained(repo)
    model = AutoModelForImageTextToText.from_pretrained(repo)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image(60, 60)}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    # Bottleneck Tokens made far the likeliest: only the suppression in generation_config keeps them out.
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill_(-1, torch.arange(264, 268), 1e4)
    )
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=True)[0, inputs["input_ids"].shape[1] :]
    assert len(generated) and not set(generated.tolist()) & {264, 265, 266, 267}


def test_the_base_of_a_local_folder_is_what_its_config_says(repo, tmp_path):
    def named(folder):
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        return config["btok_base_model"], config["btok_base_revision"]

    assert named(repo) == (None, None)
    copy = Path(shutil.copytree(repo, tmp_path / "copy"))
    edit(copy, "config.json", lambda config: config.update(btok_base_model="org/base", btok_base_revision="abc"))
    assert named(add_bottleneck_tokens(copy, tmp_path / "again")) == ("org/base", "abc")
