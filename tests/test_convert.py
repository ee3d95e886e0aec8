"""Checkpoints of the public reproduction: the same vectors as a repository, or a refusal that says what to do."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from support import reproduction
from support.repositories import differences, edit
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from btok_hf import BTokSentenceTransformer, cli, convert_checkpoint
from btok_hf.hub_card.card import CardArguments

INPUTS = [given for _, _, given in reproduction.ROWS]
WORDS = "What is this?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run, with the vectors of its model."""
    folder = tmp_path_factory.mktemp("reproduction")
    return folder, reproduction.build(folder)


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory):
    card = CardArguments(model_license="apache-2.0", base_license="apache-2.0")
    return convert_checkpoint(made[0] / "full", tmp_path_factory.mktemp("converted") / "repo", card=card)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(made[0], tmp_path / "copied")


def test_the_vectors_are_those_of_the_original_layout(made, converted):
    ours, stock = (kind(str(converted), device="cpu") for kind in (BTokSentenceTransformer, SentenceTransformer))
    for model in (ours, stock):
        np.testing.assert_allclose(model.encode(INPUTS), made[1], atol=2e-6)
    # A space for the line break would be another row.
    row = AutoProcessor.from_pretrained(converted).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": WORDS}, {"type": "image"}]}]
    )
    assert row == f"{reproduction.IMAGE}\n{WORDS}<|btok_0|><|btok_1|><|btok_2|><|btok_3|>"
    assert np.abs(ours.encode([{**INPUTS[1], "text": f" {WORDS}"}]) - made[1][2]).max() > 1e-3


def test_the_golden_vectors_hold_in_stock_loaders(converted):
    found = differences(converted)
    assert len(found) >= 18 and max(found.values()) < 1e-5


def test_names_of_tensors_of_the_pinned_release(made, copied, tmp_path):
    """transformers 4.57.3 saves a custom class with other names inside the backbone than transformers 5."""
    path, stock = copied / "full" / "model.safetensors", "_modules_dict.backbone.model."
    named = {}
    for name, tensor in load_file(path).items():
        inner = name.removeprefix(stock)
        inner = re.sub(r"^visual\.", "model.visual.", inner)
        named[stock + re.sub(r"^model\.(?!visual|language_model)", "model.language_model.", inner)] = tensor
    assert f"{stock}model.language_model.embed_tokens.weight" in named
    assert f"{stock}model.visual.patch_embed.proj.weight" in named
    save_file(named, path, {"format": "pt"})
    repo = convert_checkpoint(copied / "full", tmp_path / "repo")
    np.testing.assert_allclose(BTokSentenceTransformer(str(repo), device="cpu").encode(INPUTS), made[1], atol=2e-6)


def test_adapters_are_merged_and_the_head_stays_tied(made, tmp_path):
    repo = convert_checkpoint(made[0] / "run" / "checkpoint-10", tmp_path / "repo")
    np.testing.assert_allclose(BTokSentenceTransformer(str(repo), device="cpu").encode(INPUTS), made[1], atol=2e-6)
    assert "lm_head.weight" not in load_file(repo / "model.safetensors")
    stock = AutoModelForImageTextToText.from_pretrained(repo)
    assert stock.lm_head.weight is stock.get_input_embeddings().weight


def test_the_base_of_adapters_can_be_named(copied, tmp_path):
    checkpoint = copied / "run" / "checkpoint-10"
    edit(
        copied / "run" / "base_model",
        "config.json",
        lambda content: content["modules"]["backbone"].update(model_name_or_path=str(copied / "gone" / "base")),
    )
    with pytest.raises(OSError, match=r"base model '.*gone/base' of the adapters .* cannot be read .*--base"):
        convert_checkpoint(checkpoint, tmp_path / "repo")
    repo = convert_checkpoint(checkpoint, tmp_path / "repo", base=str(copied / "base"))
    assert (repo / "golden.json").exists()


def test_card_and_configuration_name_the_origin_and_no_folder(made, converted, tmp_path):
    card = (converted / "README.md").read_text("utf-8")
    assert "[siryuson/BottleneckTokens](https://github.com/siryuson/BottleneckTokens)" in card
    assert "converted, and not evaluated" in card and "No training is recorded for these weights" not in card
    assert "license: apache-2.0" in card and "Its licence: apache-2.0" in card and "then a line break" in card
    assert "Apache License" in (converted / "LICENSE").read_text("utf-8")
    config = AutoConfig.from_pretrained(converted)
    assert config.btok_converted_from == {"checkpoint": None, "revision": None} and config.btok_base_model is None
    for path in converted.rglob("*.json"):
        assert str(made[0]) not in path.read_text("utf-8"), path


def test_the_base_is_named_if_it_is_on_the_hub(copied, tmp_path):
    edit(
        copied / "full",
        "config.json",
        lambda content: content["modules"]["backbone"]["backbone_config"]["text_config"].update(
            _name_or_path="Qwen/Qwen2-VL-2B-Instruct"
        ),
    )
    repo = convert_checkpoint(copied / "full", tmp_path / "repo")
    assert AutoConfig.from_pretrained(repo).btok_base_model == "Qwen/Qwen2-VL-2B-Instruct"


def test_the_dtype_is_that_of_the_weights(copied, tmp_path):
    path = copied / "full" / "model.safetensors"
    edit(
        copied / "full",
        "config.json",
        lambda content: content["modules"]["backbone"]["backbone_config"].update(dtype="float16"),
    )
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    repo = convert_checkpoint(copied / "full", tmp_path / "repo")
    assert json.loads((repo / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_a_checkpoint_on_the_hub_is_named_with_its_revision(hub, made, tmp_path):
    code = (
        "import sys, huggingface_hub as hub; hub.create_repo('org/original')\n"
        "hub.upload_folder(repo_id='org/original', folder_path=sys.argv[1])\n"
    )
    hub.run("-c", code, made[0] / "full", home=tmp_path / "home")
    hub.run("-m", "btok_hf", "convert", "org/original", tmp_path / "repo", home=tmp_path / "home")
    origin = AutoConfig.from_pretrained(tmp_path / "repo").btok_converted_from
    assert origin["checkpoint"] == "org/original" and re.fullmatch("[0-9a-f]{40}", origin["revision"])
    card = (tmp_path / "repo" / "README.md").read_text("utf-8")
    assert f"(https://huggingface.co/org/original), revision {origin['revision']}" in card


def modules(**changes):
    """A change of modules in `config.json`: settings by name, `None` to remove the module."""

    def change(content):
        for name, settings in changes.items():
            content["modules"].setdefault(name, {})
            if settings is None:
                del content["modules"][name]
                content["_module_order"].remove(name)
            else:
                content["modules"][name].update(settings)

    return change


def add_dense(content):
    content["modules"]["dense"] = {"type": "Dense", "out_features": 32}
    content["_module_order"].insert(3, "dense")


def move_tokens(content):
    content["_module_order"] = ["backbone", "injector", "pooling", "normalize"]


def other_family(content):
    content["modules"]["backbone"].update(type="LlavaBackbone", backbone_config={"model_type": "llava"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content.update(model_type="qwen2_vl", modules=None), "model_type 'qwen2_vl' and no modules"),
        (lambda content: content.update(modules=[]), "a list of modules"),
        (modules(injector={"num_tokens": 8}), r"K = 8 Bottleneck Tokens, but its tokenizer has 4: <\|btok_0\|>"),
        (modules(injector={"num_tokens": 0}), "num_tokens of at least 1, got 0"),
        (modules(injector={"place": "front"}), r"'injector' .* has the settings place"),
        (modules(pooling={"type": "BToksAttentionPooling"}), "got .*BToksAttentionPooling, Normalize"),
        (modules(pooling={"type": "LastTokenPooling"}), "got .*LastTokenPooling"),
        (modules(normalize=None), "must have the modules .* got .*BToksPooling. Other"),
        (add_dense, "got .*BToksPooling, Dense, Normalize"),
        (move_tokens, "got Qwen2VLBackbone, BToksTokenInjector"),
        (other_family, "support the backbones .*got model_type 'llava'"),
        (modules(backbone={"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}), "holds no weights.*checkpoint-5000"),
    ],
)
def test_what_does_not_fit_is_refused(copied, tmp_path, change, message):
    edit(copied / "full", "config.json", change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(copied / "full", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_tokens_that_do_not_fit_are_refused(copied, tmp_path):
    template = copied / "full" / "chat_template.jinja"
    template.write_text("<|btok_0|>" + template.read_text("utf-8"), "utf-8")
    with pytest.raises(ValueError, match=r"chat template of .* already has Bottleneck Tokens"):
        convert_checkpoint(copied / "full", tmp_path / "repo")
    processor = reproduction.make_processor()
    processor.save_pretrained(copied / "full")
    with pytest.raises(ValueError, match=r"its tokenizer has 0\. Put the tokenizer of the same training run"):
        convert_checkpoint(copied / "full", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_missing_rows_and_tensors_are_refused(copied, tmp_path):
    edit(
        copied / "run" / "checkpoint-10",
        "adapter_config.json",
        lambda content: content.update(trainable_token_indices=[260, 261, 262, 263]),
    )
    with pytest.raises(ValueError, match=r"hold the embedding rows \[260.*their rows are missing"):
        convert_checkpoint(copied / "run" / "checkpoint-10", tmp_path / "repo")
    path = copied / "full" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, "misses 2 tensor.*embed_tokens"),
        ({**tensors, name: tensors[name][:264].clone()}, "has wrongly shaped .*embed_tokens"),
        ({**tensors, "_modules_dict.pooling.attention.weight": tensors[name][:1].clone()}, "unexpected 1 tensor"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(copied / "full", tmp_path / "repo")
    small = {**tensors, name: tensors[name][:264].clone()}
    save_file(small, path, {"format": "pt"})
    edit(
        copied / "full",
        "config.json",
        lambda content: content["modules"]["backbone"]["backbone_config"]["text_config"].update(vocab_size=264),
    )
    with pytest.raises(ValueError, match=r"has 264 embedding rows, but the Bottleneck Tokens have the ids \[263"):
        convert_checkpoint(copied / "full", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_the_command(made, tmp_path, capsys):
    words = ["convert", str(made[0] / "full"), str(tmp_path / "repo"), "--license", "apache-2.0", "--base", "org/base"]
    assert cli.main(words) == 0 and "Converted to" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "repo").btok_base_model == "org/base"
    with pytest.raises(SystemExit, match=r"^error: .* already holds a model"):
        cli.main(words)
