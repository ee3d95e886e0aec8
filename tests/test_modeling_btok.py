"""The remote-code class: checkpoint layouts, embeddings, and inputs that are refused."""

import gc
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import ROOT, forks, tiny
from support.inputs import process, rows, text_inputs
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    PreTrainedModel,
    SmolVLMConfig,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import btok_hf
from btok_hf import BTokForEmbedding, add_bottleneck_tokens
from btok_hf.modeling.modeling_btok import FILES, LOADING, load_stock_model, needed_release


def state(path):
    return {name: t for file in sorted(Path(path).glob("*.safetensors")) for name, t in load_file(file).items()}


def relayout(repo, path, rename):
    """A copy of `repo` whose tensors are named by `rename(name in the current ...ForConditionalGeneration)`."""
    shutil.copytree(repo, path)
    tensors = AutoModelForImageTextToText.from_pretrained(repo).state_dict()
    tensors = {rename(name): t.clone() for name, t in tensors.items() if name != "lm_head.weight"}
    save_file(tensors, Path(path, "model.safetensors"), metadata={"format": "pt"})
    return path


LAYOUTS = {
    # As published for Qwen2-VL and Qwen2.5-VL before transformers 4.52.
    "published": lambda n: n.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    # As published for InternVL3.
    "internvl": lambda n: n.replace("model.language_model.", "language_model.model.").removeprefix("model."),
    # As written for LFM2-VL before transformers 5.
    "vision_model": lambda n: n.replace(".vision_tower.", ".vision_tower.vision_model."),
    # As transformers names the modules of ...ForConditionalGeneration today (and Qwen3-VL was published).
    "current": lambda n: n,
    # As AutoModel saves the backbone alone.
    "backbone": lambda n: n.removeprefix("model."),
}


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_completely(repos, tmp_path, backbone, layout):
    published_for = {
        "published": ("qwen2_vl", "qwen2_5_vl"),
        "internvl": ("internvl",),
        "vision_model": ("lfm2_vl",),
    }
    if backbone not in published_for.get(layout, tiny.BACKBONES):
        pytest.skip("It was never published in this layout")
    path = relayout(repos[backbone], tmp_path / "repo", LAYOUTS[layout])
    expected = AutoModelForImageTextToText.from_pretrained(repos[backbone]).model.state_dict()
    loaded = {
        "class": BTokForEmbedding.from_pretrained(path).model,
        "auto": AutoModel.from_pretrained(path, trust_remote_code=True).model,
        "wrapper": btok_hf.BTokSentenceTransformer(path, device="cpu")[0].model,
        "again": AutoModel.from_pretrained(add_bottleneck_tokens(path, tmp_path / "again")),
    }
    for how, model in loaded.items():
        actual = model.state_dict()
        assert actual.keys() == expected.keys(), how
        assert all(torch.equal(actual[name], expected[name]) for name in expected), how


def test_the_heads_that_predict_several_tokens_are_left_out(repos, tmp_path):
    """Published Qwen3.5 checkpoints have `mtp` tensors, which no class of transformers reads."""
    path = relayout(repos["qwen3_5"], tmp_path / "repo", lambda name: name)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.ones(2)}, path / "model.safetensors", metadata={"format": "pt"})
    for loaded in (BTokForEmbedding.from_pretrained(path), BTokForEmbedding.from_pretrained(repos["qwen3_5"])):
        assert not any("mtp" in name for name in loaded.state_dict())
    add_bottleneck_tokens(path, tmp_path / "again")
    assert not any("mtp" in name for name in load_file(tmp_path / "again" / "model.safetensors"))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_incomplete_checkpoints_are_refused_by_name(repo, tmp_path, fault):
    path = relayout(repo, tmp_path / "repo", lambda name: name)
    tensors = load_file(path / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["model.language_model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 64)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    load = {
        "class": lambda: BTokForEmbedding.from_pretrained(path),
        "auto": lambda: AutoModel.from_pretrained(path, trust_remote_code=True),
        "wrapper": lambda: btok_hf.BTokSentenceTransformer(path, device="cpu"),
        "add": lambda: add_bottleneck_tokens(path, tmp_path / "out"),
    }
    for how in load.values():
        with pytest.raises((ValueError, RuntimeError), match=r"layers\.[19]\.mlp\.up_proj"):
            how()


def test_a_config_by_its_path(repo, tmp_path):
    model = BTokForEmbedding.from_pretrained(repo, config=repo)
    assert model.config.btok_num_tokens == 4 and model.input_modalities == model.model.input_modalities
    with pytest.raises(TypeError, match="positional"):
        model.save_pretrained(tmp_path, True)  # is_main_process in stock models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_save_load_is_bit_equal(repo, tmp_path, dtype, shard):
    model = BTokForEmbedding.from_pretrained(repo, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100KB")
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "BTokForEmbedding" and again.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = text_inputs(repo, ["one", "another"])
    assert torch.equal(again(**inputs).pooler_output, model(**inputs).pooler_output)
    assert again(**inputs).pooler_output.dtype == torch.float32
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(stock.model.language_model.norm.weight, model.model.language_model.norm.weight)


def test_fresh_process_loads_by_auto_map_alone(repo, tmp_path):
    """The process has only transformers and the repository, not btok_hf."""
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, json\n"
        "sys.modules['btok_hf'] = None\n"
        "from transformers import AutoModel, AutoProcessor\n"
        f"model = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({repo!r})\n"
        "inputs = processor.apply_chat_template([{'role': 'user', 'content': 'hello'}], tokenize=True,\n"
        "    return_dict=True, return_tensors='pt')\n"
        "print(json.dumps([type(model).__name__, model(**inputs).pooler_output[0].tolist()]))\n"
    )
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    name, embedding = json.loads(output.strip().splitlines()[-1])
    expected = BTokForEmbedding.from_pretrained(repo)(**text_inputs(repo, ["hello"])).pooler_output[0]
    assert name == "BTokForEmbedding"
    torch.testing.assert_close(torch.tensor(embedding), expected, atol=1e-6, rtol=0)


def test_threads_load_at_once(repo):
    """By every loader of this library. The remote code is a module of its own and shares the lock."""
    tie_weights = PreTrainedModel.tie_weights
    remote = AutoModel.from_pretrained(repo, trust_remote_code=True)
    assert sys.modules[type(remote).__module__].LOADING is LOADING
    loaders = (
        BTokForEmbedding.from_pretrained,
        lambda path: AutoModel.from_pretrained(path, trust_remote_code=True),
        lambda path: btok_hf.BTokSentenceTransformer(path, device="cpu")[0],
    )
    # Before Python 3.11.8, threads that parse remote code may fail while garbage is collected (python/cpython#106905).
    gc.disable()
    try:
        with ThreadPoolExecutor(8) as pool:
            loaded = list(pool.map(lambda number: loaders[number % 3](repo), range(24)))
    finally:
        gc.enable()
    weights = remote.model.state_dict()
    for model in loaded:
        state = model.model.state_dict()
        assert state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)
    assert PreTrainedModel.tie_weights is tie_weights  # without the lock, its replacement often stays


def test_stock_loaders_get_stock_classes(repo):
    assert type(AutoModel.from_pretrained(repo)).__name__ == "Qwen2VLModel"
    assert type(AutoModelForImageTextToText.from_pretrained(repo)).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(AutoConfig.from_pretrained(repo)).__name__ == "Qwen2VLConfig"


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_padding_side_and_batch_size_do_not_matter(repos, backbone, kind):
    if kind == "video" and backbone not in tiny.WITH_VIDEO:
        pytest.skip("It takes no video")
    processor = AutoProcessor.from_pretrained(repos[backbone])
    model = BTokForEmbedding.from_pretrained(repos[backbone])
    conversations = rows(kind)
    one_by_one = torch.cat([model(**process(processor, [row])).pooler_output for row in conversations])
    for side in ("left", "right"):
        output = model(**process(processor, conversations, side))
        torch.testing.assert_close(output.pooler_output, one_by_one, atol=2e-6, rtol=0)
        torch.testing.assert_close(output.pooler_output.norm(dim=1), torch.ones(4))
    assert (one_by_one @ one_by_one.T - torch.eye(4)).abs().max() < 0.999  # the rows do differ


def test_pooling_is_the_mean_of_the_last_hidden_states(repo):
    model = BTokForEmbedding.from_pretrained(repo)
    inputs = text_inputs(repo, ["hello"])
    hidden = AutoModel.from_pretrained(repo).eval()(**inputs).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[:, -4:].mean(1), dim=-1)
    output = model(**inputs)
    torch.testing.assert_close(output.pooler_output, expected, atol=1e-6, rtol=0)
    assert torch.equal(output.last_hidden_state, hidden)
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[1], output.pooler_output)
    half = torch.nn.functional.normalize(hidden[:, -4:].mean(1)[:, :32], dim=-1)
    torch.testing.assert_close(model(**inputs, truncate_dim=32).pooler_output, half, atol=1e-6, rtol=0)
    assert model(**inputs, truncate_dim=np.int64(32)).pooler_output.shape == (1, 32)
    for wrong in (0, 65, True, 32.0):
        with pytest.raises(
            ValueError, match=f"truncate_dim must be a number from 1 to the hidden size 64, got {wrong}"
        ):
            model(**inputs, truncate_dim=wrong)


def test_zero_tokens_is_last_token_pooling(bases, tmp_path):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", num_tokens=0)
    model = BTokForEmbedding.from_pretrained(repo)
    inputs = text_inputs(repo, ["hello", "a longer one"], "left")
    eos = AutoProcessor.from_pretrained(repo).tokenizer.eos_token_id
    assert (inputs["input_ids"][:, -1] == eos).all()
    hidden = AutoModel.from_pretrained(bases["qwen2_vl"]).eval()(**inputs).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[:, -1], dim=-1)
    torch.testing.assert_close(model(**inputs).pooler_output, expected, atol=1e-6, rtol=0)
    stock = btok_hf.BTokSentenceTransformer(repo, device="cpu").encode(
        ["hello", "a longer one"], convert_to_tensor=True
    )
    torch.testing.assert_close(stock, expected, atol=1e-6, rtol=0)


def test_wrong_token_ids_in_the_config_are_refused(repo, bases, tmp_path):
    with pytest.raises(ValueError, match="btok_token_ids is missing"):
        BTokForEmbedding.from_pretrained(bases["qwen2_vl"])
    with pytest.raises(ValueError, match="btok_token_ids is missing"):
        btok_hf.BTokSentenceTransformer(bases["qwen2_vl"])
    shutil.copytree(repo, tmp_path / "repo")
    config = json.loads(Path(repo, "config.json").read_text())
    for ids, message in (([264, 265, 266], "K"), ([264, 264, 265, 266], "distinct"), ([264, 265, 266, 999], "below")):
        Path(tmp_path, "repo", "config.json").write_text(json.dumps({**config, "btok_token_ids": ids}))
        with pytest.raises(ValueError, match=message):
            model = BTokForEmbedding.from_pretrained(tmp_path / "repo")
            model(**text_inputs(repo, ["hello"]))
        with pytest.raises(ValueError, match=message):
            btok_hf.BTokSentenceTransformer(tmp_path / "repo", device="cpu")


@pytest.mark.parametrize("side", [27, 32])  # patches of a tile of SmolVLM-2.2B and of the smaller ones
@pytest.mark.parametrize(
    ("kind", "layer"), [(Idefics3Config, Idefics3VisionEmbeddings), (SmolVLMConfig, SmolVLMVisionEmbeddings)]
)
def test_a_release_that_moves_patches_is_too_old(kind, layer, side, tmp_path, monkeypatch):
    """By what the installed release computes, whichever it is."""
    config = kind(vision_config={"hidden_size": 8, "image_size": 2 * side, "patch_size": 2})
    embed, positions = layer(config.vision_config), []
    embed.position_embedding.register_forward_pre_hook(lambda module, ids: positions.append(*ids))
    for dtype in (torch.float32, torch.bfloat16):
        pixels = torch.zeros(1, 3, 2 * side, 2 * side, dtype=dtype)
        embed.to(dtype)(pixel_values=pixels, patch_attention_mask=torch.ones(1, side, side, dtype=torch.bool))
    assert torch.equal(positions[0][0], torch.arange(side * side))
    enough = Version(transformers.__version__) >= Version(needed_release(config))
    assert torch.equal(*positions) == enough
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.20.0")
    refused = (ImportError, rf"5.21 is required(?s:.*)this {config.model_type}")
    error, message = (OSError, "no file named") if side == 32 else refused
    with pytest.raises(error, match=message):
        load_stock_model(tmp_path, config)


def test_push_through_save_pretrained_is_refused(repo, tmp_path):
    with pytest.raises(ValueError, match="push_to_hub"):
        BTokForEmbedding.from_pretrained(repo).save_pretrained(tmp_path, push_to_hub=True)


def test_adapters_go_to_the_backbone(repo, tmp_path):
    """Those of the wrapper would be saved in names that no loader knows."""
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    for add in (model.add_adapter, model.load_adapter):
        with pytest.raises(ValueError, match=r"would have unknown names\. Add or load them in its \.model"):
            add(LoraConfig(r=2, target_modules=["q_proj"]))
    model.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert not list(tmp_path.glob("model*.safetensors"))


def test_remote_code_is_flat_and_imports_torch_and_transformers_only():
    assert {file.name for file in (ROOT / "modeling").glob("*.py")} == {"__init__.py", *FILES}
    for name in FILES:
        source = (ROOT / "modeling" / name).read_text("utf-8")
        imported = set(re.findall(r"^(?:from|import) ([\w.]+)", source, flags=re.M))
        others = {module for module in imported if module.partition(".")[0] not in sys.stdlib_module_names}
        assert {module.partition(".")[0] for module in others} <= {"torch", "transformers", ""}
        assert {module for module in others if module.startswith(".")} <= {".inputs_btok"}


def test_an_older_transformers_is_told_what_is_needed(tmp_path):
    """Before a name that it lacks."""
    for name in FILES:
        shutil.copy(ROOT / "modeling" / name, tmp_path)
    script = (
        "import importlib.metadata, transformers\n"
        "importlib.metadata.version = lambda name: '4.57.1'\n"
        "del transformers._class_to_module['PreTrainedConfig']\n"
        "import remote.modeling_btok\n"
    )
    shutil.copytree(tmp_path, tmp_path / "remote")
    done = forks.run("-c", script, cwd=tmp_path)
    assert "transformers>=5.17 is required" in done.stderr, done.stderr


def test_what_loading_notes_is_kept(repo, tmp_path):
    """Saving, Trainer and PEFT ask the model whether it is quantized, and on which devices it lies."""

    class Config(QuantizationConfigMixin):
        def __init__(self, **kwargs):
            self.quant_method = "btok-test"

    class Quantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = False

        def is_serializable(self, *args, **kwargs):
            return False

    register_quantization_config("btok-test")(Config)
    register_quantizer("btok-test")(Quantizer)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, quantization_config=Config())
    wrapper = btok_hf.BTokSentenceTransformer(repo, device="cpu", model_kwargs={"quantization_config": Config()})
    for part in (model, model.model, wrapper[0].model):
        assert part.is_quantized and part.hf_quantizer is not None and part.quantization_method == "btok-test"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"quantized when it was loaded.*load it without quantization_config"):
        wrapper.save_pretrained(str(tmp_path / "saved"))
    layers = "model.language_model.layers"
    rest = ("model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head", f"{layers}.0")
    devices = {**dict.fromkeys((*rest, "model.language_model.rotary_emb"), "cpu"), f"{layers}.1": "disk"}
    model = AutoModel.from_pretrained(
        repo, trust_remote_code=True, device_map=devices, offload_folder=tmp_path / "offloaded"
    )
    assert model.hf_device_map == devices
    options = {"device_map": devices, "offload_folder": tmp_path / "offloaded too"}
    wrapper = btok_hf.BTokSentenceTransformer(repo, device="cpu", model_kwargs=options)
    expected = btok_hf.BTokSentenceTransformer(repo, device="cpu").encode("hello")
    torch.testing.assert_close(wrapper.encode("hello"), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"12 tensors of the model are offloaded.*layers\.1\..*load it without"):
        wrapper.save_pretrained(str(tmp_path / "saved"))
    options["device_map"] = {"": "disk"}
    with pytest.raises(ValueError, match=r"embedding table of .* is offloaded to disk.*or use SentenceTransformer"):
        btok_hf.BTokSentenceTransformer(repo, device="cpu", model_kwargs=options)


def test_adapters_beside_weights_are_refused(repo, tmp_path):
    """transformers would load them into the model, and they would be saved under names that nothing reads."""
    shutil.copytree(repo, tmp_path / "both")
    model = AutoModelForImageTextToText.from_pretrained(repo)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapters")
    for file in (tmp_path / "adapters").glob("adapter_*"):
        shutil.copy(file, tmp_path / "both")
    for load in (BTokForEmbedding.from_pretrained, lambda path: add_bottleneck_tokens(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"both holds adapters beside its weights"):
            load(tmp_path / "both")


def test_adapters_are_refused_where_only_their_base_would_be_loaded(with_adapters, tmp_path):
    with_adapters.save(str(tmp_path / "adapters"))
    with pytest.raises(ValueError, match=r"adapters holds adapters\. If btok-hf saved them, load"):
        AutoModel.from_pretrained(tmp_path / "adapters", trust_remote_code=True)


@pytest.mark.parametrize("backbone", ["qwen2_vl", "qwen3_vl"])
def test_gathered_weights_are_saved_in_stock_names(repos, backbone, tmp_path):
    model = AutoModel.from_pretrained(repos[backbone], trust_remote_code=True)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    model.save_pretrained(tmp_path / "expected")
    read = [load_file(tmp_path / name / "model.safetensors") for name in ("saved", "expected")]
    assert read[0].keys() == read[1].keys() and all(torch.equal(read[0][key], read[1][key]) for key in read[0])
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not list((tmp_path / "other rank").iterdir())
