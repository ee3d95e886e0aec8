"""The plugin for vLLM: with btok-hf installed beside it, `vllm serve REPO --runner pooling` gives the golden vectors.

vLLM calls `register` in each of its processes, for any model that it serves. So this file imports nothing heavy.

- `vllm_models.py`: the stock models with a pooler over the Bottleneck Tokens.
- `vllm_renderer.py`: plain texts go through the chat template, and a row without its tokens is refused.
- `vllm_video.py`: files of videos are read as in this library.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btok_hf.serving import MODE, SETTINGS

RELEASES = ("0.32", "0.33")  # those that this code is tested with: it uses names that are not public
FAMILIES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5", "InternVL", "Idefics3", "SmolVLM", "Lfm2Vl")
RECURRENT = ("Qwen3_5",)
# Frames without times count as two per second in this library, and none is left out. vLLM would count one per second
# and drop those after the 32nd. Files are read by this library.
FPS = 2.0
VIDEO = {"num_frames": -1, "fps": FPS, "video_backend": MODE}
# Options of processors that choose among the frames of a video.
SAMPLING = ("do_sample_frames", "fps", "num_frames", "min_frames", "max_frames")
# Other loaders bound images alone by these, where a processor bounds a video as a whole. vLLM bounds both.
PIXELS = ("min_pixels", "max_pixels")
BOUNDED_AS_A_WHOLE = ("qwen3_vl", "qwen3_5")


def register() -> None:
    """Register the architectures, their configuration checks and the renderer. May be called several times.

    In another release of vLLM nothing is registered, so that vLLM serves its own models as ever, and does not
    know the architectures of those with Bottleneck Tokens. An error here would end vLLM for all models.
    """
    found = "of an unknown version"
    try:
        import vllm

        found = vllm.__version__
        if ".".join(found.split(".")[:2]) not in RELEASES:
            raise ImportError(f"it is written for vLLM {' and '.join(RELEASES)}")
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry

        # All of them before the first change: a model without its renderer would give other vectors.
        register_model, tokenizers = ModelRegistry.register_model, TokenizerRegistry.tokenizers
        renderers, loaders = RENDERER_REGISTRY.renderers, VIDEO_LOADER_REGISTRY.name2class
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm").warning(
            "btok-hf does not support vLLM %s (%s). Serve no models with Bottleneck Tokens with it: install vLLM %s "
            "for them. Other models are not affected.",
            found,
            error,
            RELEASES[-1],
        )
        return
    tokenizers[MODE] = ("vllm.tokenizers.hf", "CachedHfTokenizer")
    renderers[MODE] = ("btok_hf.serving.vllm_renderer", "BTokRenderer")
    loaders[MODE] = _video_loader
    for family in FAMILIES:
        name = f"BTok{family}ForEmbedding"
        # No subclasses of vLLM's, which is imported late.
        MODELS_CONFIG_MAP[name] = BTokRecurrentConfig if family in RECURRENT else BTokConfig
        register_model(name, f"btok_hf.serving.vllm_models:{name}")


def _video_loader() -> Any:
    from btok_hf.serving.vllm_video import BTokVideoLoader

    return BTokVideoLoader()


def unwanted_token(config: Any) -> int | None:
    """The token that the tokenizer of LFM2-VL alone puts before a text. Its models were trained without it."""
    return config.get_text_config().bos_token_id if config.model_type == "lfm2_vl" else None


def options_of_videos(options: Mapping[str, Any] | None, model_type: str) -> list[str]:
    """Which of these options of a processor choose among the frames of a video, or sizes that no other loader does."""
    options = options or {}
    both = (options, options.get("videos_kwargs") or {})
    names = (*SAMPLING, *(PIXELS if model_type in BOUNDED_AS_A_WHOLE else ()))
    return [name for name in names if any(part.get(name) is not None for part in both)]


def way_out(options: Sequence[str]) -> str:
    """What to do with options that `options_of_videos` has found."""
    bound = ', or bound images alone: {"images_kwargs": {"max_pixels": …}}'
    return f"Leave it out{bound if {*options} & {*PIXELS} else ''}."


class BTokConfig:
    """What vLLM calls when it has read the configuration of a model with Bottleneck Tokens."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose the renderer, how videos are read, the dimensions of vectors, and the longest row.

        Raises:
            ValueError: Another tokenizer mode, another way to read images or videos, or rows that are longer than the
                model's positions.
        """
        if model_config.tokenizer_mode not in ("auto", "hf", MODE):
            raise ValueError(
                f"A model with Bottleneck Tokens needs its own tokenizer, got --tokenizer-mode "
                f"{model_config.tokenizer_mode}. Leave it out."
            )
        model_config.tokenizer_mode = MODE
        BTokConfig.set_reading(model_config.multimodal_config, model_config.hf_config.model_type)
        BTokConfig.set_dimensions(model_config)
        BTokConfig.bound_rows(model_config)

    @staticmethod
    def set_reading(config: Any, model_type: str) -> None:
        """Let files and frames of videos be read as in this library.

        Raises:
            ValueError: The user chose other frames, sizes or colours, which would give other vectors.
        """
        reading = config.media_io_kwargs
        given = {
            kind: options for kind in ("image", "video") if (options := reading.get(kind)) not in ({}, VIDEO, None)
        }
        if given:
            raise ValueError(
                f"A model with Bottleneck Tokens needs images and videos as this library reads them, but "
                f"--media-io-kwargs {given} changes that: the vectors would be others. Leave it out."
            )
        options = options_of_videos(config.mm_processor_kwargs, model_type)
        choosing = [f"{name} in --mm-processor-kwargs" for name in options]
        choosing += ["--video-pruning-rate"] if config.video_pruning_rate else []
        if choosing:
            raise ValueError(
                f"A model with Bottleneck Tokens needs videos as this library takes them, but {', '.join(choosing)} "
                f"may leave some out or resize them. {way_out(options)}"
            )
        reading["video"] = dict(VIDEO)

    @staticmethod
    def set_dimensions(model_config: Any) -> None:
        """Cut vectors as the repository says (`truncate_dim`), unless the user or a request asks for other dimensions.

        vLLM allows only the sizes in `matryoshka_dimensions`, so this one and the whole size are added.
        """
        from transformers.utils.hub import cached_file

        source = {"revision": model_config.revision, "token": getattr(model_config, "hf_token", None)}
        path = cached_file(model_config.model, SETTINGS, _raise_exceptions_for_missing_entries=False, **source)
        cut = json.loads(Path(path).read_text("utf-8")).get("truncate_dim") if path else None
        whole = model_config.hf_text_config.hidden_size
        if cut is None or cut >= whole:
            return
        config = model_config.hf_config
        config.matryoshka_dimensions = sorted({cut, whole, *(getattr(config, "matryoshka_dimensions", None) or ())})
        if model_config.pooler_config.dimensions is None:
            model_config.pooler_config.dimensions = cut

    @staticmethod
    def bound_rows(model_config: Any) -> None:
        """Take the longest row from the tokenizer, where this library has it, unless the user gave one.

        vLLM counts more positions than there are if they are scaled, and rows beyond them give NaN.

        Raises:
            ValueError: The user's is longer than the model's positions.
        """
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        positions, given = model_config.hf_text_config.max_position_embeddings, model_config.original_max_model_len
        if given in (None, -1):  # -1 lets vLLM choose less if memory is short
            source = {"revision": model_config.tokenizer_revision, "token": getattr(model_config, "hf_token", None)}
            saved = get_tokenizer_config(model_config.tokenizer, **source)
            most = saved.get("model_max_length") or positions
            model_config.max_model_len = int(min(model_config.max_model_len, most, positions))
        elif given > positions:
            raise ValueError(
                f"A model with Bottleneck Tokens needs rows within its {positions} positions, got --max-model-len "
                f"{given}: longer rows would give vectors without meaning, or NaN. Give {positions} at most."
            )

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise `ValueError` for settings that may cut a row within or before its Bottleneck Tokens."""
        pooler, cache = vllm_config.model_config.pooler_config, vllm_config.cache_config
        scheduler = vllm_config.scheduler_config
        refused = {
            "--enable-chunked-prefill": scheduler.enable_chunked_prefill,
            "--long-prefill-token-threshold": scheduler.long_prefill_token_threshold > 0,
            "--enable-prefix-caching": cache.enable_prefix_caching,
            # They take the beginning of a row from elsewhere, as prefix caching does from memory.
            "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
            "--kv-offloading-size": cache.kv_offloading_size is not None,
            "enable_chunked_processing in --pooler-config": pooler is not None and pooler.enable_chunked_processing,
        }
        given = [name for name, is_on in refused.items() if is_on]
        if given:
            raise ValueError(
                f"A model with Bottleneck Tokens needs whole rows, but {', '.join(given)} would cut them. Switch "
                "this off, and leave the pooling type of --pooler-config out: then vLLM's defaults are right."
            )


class BTokRecurrentConfig(BTokConfig):
    """The same for Qwen3.5, most of whose layers are a recurrence (Gated DeltaNet)."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Also set what vLLM sets for the stock model. Raise `ValueError` for what its CPU kernels cannot run."""
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.platforms import current_platform

        BTokConfig.verify_and_update_config(vllm_config)
        MODELS_CONFIG_MAP["Qwen3_5ForConditionalGeneration"].verify_and_update_config(vllm_config)
        if current_platform.is_cpu():
            BTokRecurrentConfig.check_cpu_kernels(vllm_config.model_config)

    @staticmethod
    def check_cpu_kernels(model_config: Any) -> None:
        """Raise `ValueError` for models that vLLM would load on a CPU, only to end at the first request."""
        dtype = str(model_config.dtype).removeprefix("torch.")
        if dtype != "bfloat16":
            raise ValueError(
                "A model with Bottleneck Tokens needs --dtype bfloat16 on a CPU if it is a Qwen3.5: vLLM's kernels of "
                f"Gated DeltaNet take nothing else there, got {dtype}."
            )
        text = model_config.hf_text_config
        sizes = (text.linear_key_head_dim, text.linear_value_head_dim)
        if sizes not in ((64, 64), (128, 128)):
            raise ValueError(
                "A model with Bottleneck Tokens needs linear heads of 64 or of 128 on a CPU if it is a Qwen3.5: "
                f"vLLM's kernels of Gated DeltaNet know no others there, got {sizes}. Serve it with btok serve."
            )
