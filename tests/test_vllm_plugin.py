"""The plugin as far as it goes without vLLM. `make test-vllm` serves models with it."""

import json
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def settings(prefill=False, caching=False, chunked=False, threshold=0, transfer=None, offloading=None):
    return SimpleNamespace(
        model_config=SimpleNamespace(pooler_config=SimpleNamespace(enable_chunked_processing=chunked)),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=prefill, long_prefill_token_threshold=threshold),
        cache_config=SimpleNamespace(enable_prefix_caching=caching, kv_offloading_size=offloading),
        kv_transfer_config=transfer,
    )


def test_settings_that_cut_rows_are_refused():
    check = vllm_plugin.BTokConfig.verify_and_update_config
    check(settings())
    for name, word in (
        ("prefill", "--enable-chunked-prefill"),
        ("threshold", "--long-prefill-token-threshold"),
        ("caching", "--enable-prefix-caching"),
        ("transfer", "--kv-transfer-config"),
        ("offloading", "--kv-offloading-size"),
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


def config(repo, mode="auto", asked=None, positions=4096, dimensions=None, media=None, model_type="qwen2_vl", **video):
    """What vLLM has read and computed when it calls the plugin. It counts scaled positions twice."""
    return SimpleNamespace(
        model=str(repo),
        revision=None,
        hf_config=SimpleNamespace(matryoshka_dimensions=[16, 64], model_type=model_type),
        pooler_config=SimpleNamespace(dimensions=dimensions),
        tokenizer_mode=mode,
        multimodal_config=SimpleNamespace(
            media_io_kwargs=media or {},
            mm_processor_kwargs=video.get("processor"),
            video_pruning_rate=video.get("pruning"),
        ),
        tokenizer=str(repo),
        tokenizer_revision=None,
        hf_text_config=SimpleNamespace(max_position_embeddings=positions, hidden_size=64),
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


def test_the_renderer_and_the_reading_of_videos_are_set(exported):
    update = vllm_plugin.BTokConfig.verify_and_update_model_config
    changed = config(exported)
    for _ in range(2):  # vLLM may call it again
        update(changed)
        assert changed.tokenizer_mode == "btok" and changed.pooler_config.dimensions is None
        assert changed.multimodal_config.media_io_kwargs == {"video": vllm_plugin.VIDEO}
    with pytest.raises(ValueError, match="got --tokenizer-mode slow"):
        update(config(exported, "slow"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"media": {"video": {"num_frames": 4}}}, "--media-io-kwargs {'video': {'num_frames': 4}} changes that"),
        ({"media": {"image": {"rgba_background_color": [0, 0, 0]}}}, "--media-io-kwargs {'image'"),
        ({"processor": {"fps": 1}}, "but fps in --mm-processor-kwargs may leave some out"),
        ({"processor": {"max_pixels": 9}, "model_type": "qwen3_vl"}, "but max_pixels in --mm-.*or bound images alone"),
        ({"processor": {"videos_kwargs": {"do_sample_frames": True}}}, "but do_sample_frames in"),
        ({"pruning": 0.5}, "but --video-pruning-rate may"),
    ],
)
def test_other_frames_and_colours_are_refused(exported, given, says):
    with pytest.raises(ValueError, match=f"needs .*{says}"):
        vllm_plugin.BTokConfig.verify_and_update_model_config(config(exported, **given))
    vllm_plugin.BTokConfig.verify_and_update_model_config(config(exported, processor={"max_pixels": 501_760}))


@pytest.mark.parametrize(
    ("saved", "asked", "expected", "sizes"),
    [
        (8, None, 8, [8, 16, 64]),
        (8, 16, 16, [8, 16, 64]),  # --pooler-config
        (None, None, None, [16, 64]),
        (64, None, None, [16, 64]),
    ],
)
def test_vectors_are_cut_as_the_repository_says(tmp_path, saved, asked, expected, sizes):
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": saved}))
    changed = config(tmp_path, dimensions=asked)
    vllm_plugin.BTokConfig.set_dimensions(changed)
    assert changed.pooler_config.dimensions == expected and changed.hf_config.matryoshka_dimensions == sizes


# ---------------------------------------------------------------- other releases of vLLM


@pytest.fixture
def vllm(monkeypatch):
    """Stands in for the names that the plugin takes from vLLM, which is not installed here."""
    registries = {
        "vllm": {"__version__": "0.32.1", "ModelRegistry": SimpleNamespace(register_model=lambda *names: None)},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": {}},
        "vllm.multimodal.video": {"VIDEO_LOADER_REGISTRY": SimpleNamespace(name2class={})},
        "vllm.renderers.registry": {"RENDERER_REGISTRY": SimpleNamespace(renderers={})},
        "vllm.tokenizers.registry": {"TokenizerRegistry": SimpleNamespace(tokenizers={})},
    }
    modules = {name: ModuleType(name) for name in registries}
    for name, module in modules.items():
        vars(module).update(registries[name])
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(
        root=modules["vllm"],
        renderers=modules["vllm.renderers.registry"].RENDERER_REGISTRY,
        configs=modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP,
    )


@pytest.mark.parametrize("release", ["0.32.1", "0.33.0"])
def test_every_part_is_registered(vllm, caplog, release):
    vllm.root.__version__ = release
    vllm_plugin.register()
    assert set(vllm.renderers.renderers) == {"btok"} and len(vllm.configs) == len(vllm_plugin.FAMILIES)
    assert not caplog.records


def test_another_release_of_vllm_is_left_as_it_is(vllm, caplog):
    vllm.root.__version__ = "0.34.0"
    vllm_plugin.register()
    assert not vllm.renderers.renderers and not vllm.configs
    (line,) = caplog.messages
    assert line.startswith("btok-hf does not support vLLM 0.34.0 (it is written for vLLM 0.32 and 0.33)")
    assert "install vLLM 0.33 for them. Other models are not affected." in line


@pytest.mark.parametrize("missing", ["module", "attribute"])
def test_a_vllm_without_what_the_plugin_needs_is_left_as_it_is(vllm, monkeypatch, caplog, missing):
    if missing == "module":
        monkeypatch.setitem(sys.modules, "vllm.tokenizers.registry", None)  # its import fails
    else:
        del vllm.renderers.renderers
    vllm_plugin.register()
    assert not vllm.configs and "btok-hf does not support vLLM 0.32.1 (" in caplog.text


def test_options_that_choose_frames_are_found_wherever_they_stand():
    nested = {"fps": None, "videos_kwargs": {"fps": 1, "size": 2}}
    find = vllm_plugin.options_of_videos
    assert find(nested, "qwen2_vl") == ["fps"] == find({"fps": 1}, "qwen3_vl")
    assert find({"size": 3, "videos_kwargs": None}, "qwen2_vl") == [] == find(None, "qwen3_vl")


def test_pixels_of_videos_are_refused_where_loaders_do_not_bound_them():
    find = vllm_plugin.options_of_videos
    nested = {"images_kwargs": {"max_pixels": 1}, "videos_kwargs": {"min_pixels": 1}}
    for model_type in vllm_plugin.BOUNDED_AS_A_WHOLE:
        assert find({"max_pixels": 1}, model_type) == ["max_pixels"] and find(nested, model_type) == ["min_pixels"]
        assert not find({"images_kwargs": {"max_pixels": 1}}, model_type)
    assert not find({"max_pixels": 1}, "qwen2_vl")
