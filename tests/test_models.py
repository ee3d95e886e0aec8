"""Models to evaluate: how they are loaded, and which cannot embed what MMEB-V2 consists of."""

import json

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from support import tiny
from support.mmeb_tree import looks
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from btok_hf import BTokSentenceTransformer
from btok_hf.evaluation.mmeb import evaluate
from btok_hf.evaluation.models import check_inputs, load_model, name_of, settings_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A model that embeds texts and images, and not both at once."""
    path = tmp_path_factory.mktemp("models") / "clip"
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


def test_models_with_tokens_get_the_wrapper(repo, bases):
    model = load_model(repo, max_pixels=6272, dtype="bfloat16", device="cpu")
    assert isinstance(model, BTokSentenceTransformer) and model.dtype == torch.bfloat16
    settings = settings_of(model)
    assert settings["max_pixels"] == 6272 and settings["dtype"] == "bfloat16" and "image_size" not in settings
    stock = load_model(bases["qwen2_vl"], max_pixels=6272, device="cpu")
    assert type(stock) is SentenceTransformer and settings_of(stock)["image_size"]["longest_edge"] == 6272
    assert name_of(model) == "qwen2_vl"


def test_pixels_that_would_have_no_effect_are_refused(bases, clip):
    for number in (0, -5):
        with pytest.raises(ValueError, match=rf"max_pixels must be 1 or more, got {number}\. Leave it out"):
            load_model("nowhere", max_pixels=number)
    for other in (bases["idefics3"], clip):
        with pytest.raises(ValueError, match=r"max_pixels has no effect on .*: its processor sizes images by {'"):
            load_model(other, max_pixels=6272, device="cpu")
    assert "shortest_edge" in settings_of(load_model(clip, device="cpu"))["image_size"]


def test_code_of_a_repository_runs_only_if_it_is_trusted(bases, tmp_path):
    SentenceTransformer(bases["qwen2_vl"], device="cpu").save(str(tmp_path))
    code = (
        "from sentence_transformers.sentence_transformer.modules import Pooling\n\n\nclass Own(Pooling):\n    pass\n"
    )
    (tmp_path / "custom.py").write_text(code)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["type"] = "custom.Own"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path, device="cpu")
    assert type(load_model(tmp_path, device="cpu", trust_remote_code=True)[1]).__name__ == "Own"


def test_models_that_cannot_embed_the_benchmark_are_refused_at_once(repos, clip, tmp_path):
    model = load_model(clip, device="cpu")
    assert model.encode(["a text"]).shape == model.encode([Image.new("RGB", (32, 32))]).shape
    with pytest.raises(ValueError, match=r"together with an image, which MMEB-V2 asks for: .*[^.]\. Choose other"):
        evaluate(model, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    still = BTokSentenceTransformer(repos["idefics3"], device="cpu")
    check_inputs(still, ["image", "visdoc"], "Find it.")
    with pytest.raises(ValueError, match=r"together with a video.*Choose other modalities"):
        check_inputs(still, ["video"], None)
    for backbone in sorted(tiny.WITH_VIDEO):
        check_inputs(BTokSentenceTransformer(repos[backbone], device="cpu"), ["image", "video"], None)


def test_other_objects_with_encode_are_refused(tmp_path):
    class Client:
        def encode(self, inputs, **kwargs):
            return looks(inputs)

    with pytest.raises(ValueError, match=r"must be a SentenceTransformer or a function, got Client\. Pass a function"):
        evaluate(Client(), tmp_path, tmp_path / "out", name="client")
