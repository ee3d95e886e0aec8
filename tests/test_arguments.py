"""Wrong arguments are told from damaged files, before anything is loaded or embedded."""

import numpy as np
import pytest
from peft import LoraConfig

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.arguments import named_source


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokenizer_kwargs": {}}, TypeError, "no argument 'tokenizer_kwargs'. Use processor_kwargs"),
        ({"config_kwargs": {}}, TypeError, "no argument 'config_kwargs'. The configuration belongs to the weights"),
        ({"backend": "onnx"}, TypeError, "no argument 'backend'. The model runs in torch, and not in ONNX"),
        ({"cache": "a"}, TypeError, "no argument 'cache'. Leave it out, or use revision, token"),
        ({"prompts": ["Find it."]}, TypeError, r"prompts must be a dict of texts by name.*got \['Find it\.'\]"),
        ({"prompts": {"query": 3}}, TypeError, "prompts must be a dict of texts"),
        ({"model_kwargs": {"foo": 1}}, TypeError, "unexpected keyword argument 'foo'"),
        ({"max_seq_length": 0}, ValueError, "max_seq_length must be a whole number of tokens, and at least 5, got 0"),
        ({"processor_kwargs": {"max_pixels": 0}}, ValueError, "max_pixels must be 1 or more, got 0. Leave it out"),
        ({"processor_kwargs": {"min_pixels": -5}}, ValueError, "min_pixels must be 1 or more, got -5"),
        (
            {"processor_kwargs": {"min_pixels": 9, "max_pixels": 8}},
            ValueError,
            "must not exceed max_pixels, got 9 and",
        ),
        ({"truncate_dim": 0}, ValueError, "truncate_dim must be a number of dimensions above 0, got 0"),
        ({"truncate_dim": True}, ValueError, "truncate_dim must be .* got True"),
        ({"truncate_dim": -1}, ValueError, "truncate_dim must be .* got -1"),
        ({"max_seq_length": "64"}, ValueError, "max_seq_length must be .* got '64'"),
    ],
)
def test_arguments_of_loading(repo, options, error, message):
    with pytest.raises(error, match=message) as raised:
        BTokSentenceTransformer(repo, device="cpu", **options)
    assert "damaged" not in str(raised.value)


def test_arguments_of_other_methods_of_sentence_transformers(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    with pytest.raises(TypeError, match=r"no argument 'replace_model_card'. Leave it out: a card goes in files="):
        model.push_to_hub("a/b", replace_model_card=True)
    for refused in (model.save, model.push_to_hub):
        with pytest.raises(ValueError, match="saved only as safetensors"):
            refused("a/b", safe_serialization=False)
    with pytest.raises(ValueError, match="saved by the name 'default', got adapter_name='mine'"):
        model.add_adapter(LoraConfig(), adapter_name="mine")
    model.add_adapter(LoraConfig(r=2), adapter_name="default")


def test_options_of_a_call_that_change_rows_are_named(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    image = {"image": np.zeros((56, 56, 3), np.uint8)}
    with pytest.raises(
        ValueError, match=r"or leave out processing_kwargs={'text': {'max_length': 8}}, which may change"
    ):
        model.encode([image], processing_kwargs={"text": {"max_length": 8}})
    with pytest.raises(ValueError, match=r"does not end in .*; or leave out processing_kwargs={'chat_template'"):
        model.encode(["a"], processing_kwargs={"chat_template": {"add_generation_prompt": True}})


def test_a_row_keeps_its_suffix_and_some_of_its_content(bases, tmp_path):
    folder = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "start", 4, suffix="in a word:", noise_std=1.0)
    model = BTokSentenceTransformer(folder, device="cpu")
    least = len(" in a word:") + 4 + 1  # a token is a byte
    for length in (least - 1, None):
        with pytest.raises(ValueError, match=f"at least {least}, got {length}: every row ends in {least - 1} tokens"):
            model.max_seq_length = length
    model.max_seq_length = np.int64(least)
    vectors = model.encode(["a cat", "a dog"])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_arguments_of_encoding(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    with pytest.raises(ValueError, match=r"prompt must be a text, got 3.*prompt_name"):
        model.encode(["a"], prompt=3)
    for one in ("abc", {"text": "abc"}):
        with pytest.raises(ValueError, match=r"takes a list of inputs, got .*abc.*Put it into a list"):
            model.reconstruct(one)
    assert model.reconstruct([]) == []


@pytest.mark.parametrize("value", [np.float64("nan"), np.array(3.0), np.array([1, 2, 3]), np.zeros((0, 0, 3), "u1")])
@pytest.mark.parametrize("backbone", ["qwen2_vl", "internvl"])
def test_values_that_are_no_inputs_are_named_or_skipped(repos, backbone, value):
    model = BTokSentenceTransformer(repos[backbone], device="cpu")
    with pytest.raises(ValueError, match=r"^Input 1 "):
        model.encode(["a", value])
    result = model.encode(["a", value, "b"], on_error="skip")
    assert list(result.errors) == [1] and result.kept.tolist() == [0, 2]


def test_the_folder_of_a_run_is_no_model(repo, tmp_path):
    (tmp_path / "checkpoint-100.tar.gz").touch()
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "start"):
        (tmp_path / name).mkdir()
    with named_source(str(tmp_path)):
        pass  # none is complete
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "config.json").touch()
    with (
        pytest.raises(OSError, match=r"holds checkpoints and is no model itself\. Name one .*/checkpoint-10$"),
        named_source(str(tmp_path)),
    ):
        BTokSentenceTransformer(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with named_source(str(tmp_path)), named_source(repo):
        pass
