"""The plugin as far as it goes without vLLM. `make test-vllm` serves models with it."""

import json
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.repositories import edit
from transformers import AutoModelForImageTextToText

from btok_hf import BTokForEmbedding
from btok_hf.modeling.modeling_btok import STOCK_CLASSES
from btok_hf.serving import vllm_plugin


def test_vllm_finds_the_plugin():
    (entry,) = entry_points(group="vllm.general_plugins", name="btok")
    assert entry.load() is vllm_plugin.register


def test_it_imports_nothing_heavy():
    """vLLM imports it in each process, and for every model."""
    code = (
        "import sys, btok_hf.serving.vllm_plugin\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_repositories_name_the_architectures_that_it_registers(repos, exported):
    """No engine knows them otherwise, and transformers has no such classes."""
    names = {f"BTok{family}ForEmbedding" for family in vllm_plugin.FAMILIES}
    configs = [json.loads(Path(repo, "config.json").read_text("utf-8")) for repo in [*repos.values(), exported]]
    assert {name for config in configs for name in config["architectures"]} == names
    assert len(names) == len(STOCK_CLASSES) and not any(hasattr(transformers, name) for name in names)


def test_stock_classes_load_and_save_the_architecture_is_kept(exported, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert type(model).__name__ == STOCK_CLASSES["qwen2_vl"]
    BTokForEmbedding.from_pretrained(exported).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["BTokQwen2VLForEmbedding"]


def test_engines_that_run_any_model_are_told_not_to():
    assert not BTokForEmbedding.is_backend_compatible()


def settings(prefill=False, caching=False, chunked=False):
    return SimpleNamespace(
        model_config=SimpleNamespace(pooler_config=SimpleNamespace(enable_chunked_processing=chunked)),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=prefill),
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
    )


def test_settings_that_cut_rows_are_refused():
    check = vllm_plugin.BTokConfig.verify_and_update_config
    check(settings())
    for name, word in (
        ("prefill", "--enable-chunked-prefill"),
        ("caching", "--enable-prefix-caching"),
        ("chunked", "enable_chunked_processing"),
    ):
        with pytest.raises(ValueError, match=rf"needs whole rows, but {word}.*would cut them"):
            check(settings(**{name: True}))


@pytest.mark.parametrize(
    ("dtype", "key", "value", "wrong"),
    [
        ("bfloat16", 128, 128, None),
        ("bfloat16", 64, 64, None),
        ("float16", 128, 128, "--dtype bfloat16 on a CPU.*got float16"),
        ("float32", 128, 128, "--dtype bfloat16 on a CPU.*got float32"),
        ("bfloat16", 32, 32, r"linear heads of 64 or of 128 on a CPU.*got \(32, 32\)"),
        ("bfloat16", 64, 128, r"linear heads of 64 or of 128 on a CPU.*got \(64, 128\)"),
    ],
)
def test_what_the_cpu_kernels_of_recurrent_layers_cannot_run_is_refused(dtype, key, value, wrong):
    text = SimpleNamespace(linear_key_head_dim=key, linear_value_head_dim=value)
    config = SimpleNamespace(dtype=getattr(torch, dtype), hf_text_config=text)
    with pytest.raises(ValueError, match=wrong) if wrong else nullcontext():
        vllm_plugin.BTokRecurrentConfig.check_cpu_kernels(config)


def config(tokenizer, mode="auto", asked=None, positions=4096, **video):
    """What vLLM has read and computed when it calls the plugin. It counts scaled positions twice."""
    reading = {"video": video} if video else {}
    return SimpleNamespace(
        tokenizer_mode=mode,
        multimodal_config=SimpleNamespace(media_io_kwargs=reading),
        tokenizer=str(tokenizer),
        tokenizer_revision=None,
        hf_text_config=SimpleNamespace(max_position_embeddings=positions),
        original_max_model_len=asked,
        max_model_len=2 * positions if asked in (None, -1) else asked,
    )


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [(300, None, 300), (int(1e30), None, 4096), (None, None, 4096), (300, -1, 300), (300, 4096, 4096), (300, 8, 8)],
)
def test_rows_are_as_long_as_in_this_library(tmp_path, saved, asked, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": saved} if saved else {}))
    changed = config(tmp_path, asked=asked)
    vllm_plugin.BTokConfig.verify_and_update_model_config(changed)
    assert changed.max_model_len == expected


def test_rows_are_as_long_as_at_the_revision_that_is_served(hub, copied, tmp_path):
    edit(copied, "tokenizer_config.json", lambda saved: saved.update(model_max_length=300))
    hub.run("-m", "btok_hf", "push", copied, "org/short", "--revision", "v1", home=tmp_path)
    code = (
        "from types import SimpleNamespace as Space; from btok_hf.serving.vllm_plugin import BTokConfig\n"
        "served = Space(tokenizer='org/short', tokenizer_revision='v1', original_max_model_len=None)\n"
        "served.hf_text_config, served.max_model_len = Space(max_position_embeddings=4096), 4096\n"
        "BTokConfig.bound_rows(served); print(served.max_model_len)"
    )
    assert hub.run("-c", code, home=tmp_path).stdout.split()[-1] == "300"


def test_rows_beyond_the_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"within its 4096 positions, got --max-model-len 4097.*Give 4096 at most"):
        vllm_plugin.BTokConfig.verify_and_update_model_config(config(tmp_path, asked=4097))


def test_the_renderer_and_the_defaults_of_videos_are_set(exported):
    update = vllm_plugin.BTokConfig.verify_and_update_model_config
    for given, expected in (({}, vllm_plugin.VIDEO), ({"num_frames": 8}, {**vllm_plugin.VIDEO, "num_frames": 8})):
        changed = config(exported, **given)
        update(changed)
        assert changed.tokenizer_mode == "btok" and changed.multimodal_config.media_io_kwargs == {"video": expected}
    with pytest.raises(ValueError, match="got --tokenizer-mode slow"):
        update(config(exported, "slow"))
