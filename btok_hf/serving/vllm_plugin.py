"""The plugin for vLLM: with btok-hf installed beside it, `vllm serve REPO --runner pooling` gives the golden vectors.

vLLM calls `register` in each of its processes, for any model that it serves. So this file imports nothing heavy.

- `vllm_models.py`: the stock models with a pooler over the Bottleneck Tokens.
- `vllm_renderer.py`: plain texts go through the chat template, and a row without its tokens is refused.
- `vllm_video.py`: files of videos are read as in this library.
"""

import logging
from typing import Any

FAMILIES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5", "InternVL", "Idefics3", "SmolVLM", "Lfm2Vl")
RECURRENT = ("Qwen3_5",)
MODE = "btok"  # what vLLM calls a tokenizer mode chooses the tokenizer and the renderer; also the video backend
# Frames without times count as two per second in this library, and none is left out. vLLM would count one per second
# and drop those after the 32nd. Files are read by this library.
FPS = 2.0
VIDEO = {"num_frames": -1, "fps": FPS, "video_backend": MODE}


def register() -> None:
    """Register the architectures, their configuration checks and the renderer. May be called several times."""
    from vllm import ModelRegistry

    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry
    except ImportError as error:  # not raised: it would stop vLLM from serving any other model
        logging.getLogger("vllm").warning(
            "btok-hf does not support this release of vLLM (%s), which will refuse models with Bottleneck Tokens. "
            "Install vLLM 0.32.",
            error,
        )
        return
    for family in FAMILIES:
        name = f"BTok{family}ForEmbedding"
        ModelRegistry.register_model(name, f"btok_hf.serving.vllm_models:{name}")
        # No subclasses of vLLM's, which is imported late.
        MODELS_CONFIG_MAP[name] = BTokRecurrentConfig if family in RECURRENT else BTokConfig
    TokenizerRegistry.tokenizers[MODE] = ("vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.renderers[MODE] = ("btok_hf.serving.vllm_renderer", "BTokRenderer")
    VIDEO_LOADER_REGISTRY.name2class[MODE] = _video_loader


def _video_loader() -> Any:
    from btok_hf.serving.vllm_video import BTokVideoLoader

    return BTokVideoLoader()


class BTokConfig:
    """What vLLM calls when it has read the configuration of a model with Bottleneck Tokens."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose the renderer, the defaults of videos, and the longest row.

        Raises:
            ValueError: Another tokenizer mode, or rows that are longer than the model's positions.
        """
        if model_config.tokenizer_mode not in ("auto", "hf", MODE):
            raise ValueError(
                f"A model with Bottleneck Tokens needs its own tokenizer, got --tokenizer-mode "
                f"{model_config.tokenizer_mode}. Leave it out."
            )
        model_config.tokenizer_mode = MODE
        reading = model_config.multimodal_config.media_io_kwargs
        reading["video"] = VIDEO | reading.get("video", {})
        BTokConfig.bound_rows(model_config)

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
        pooler = vllm_config.model_config.pooler_config
        refused = {
            "--enable-chunked-prefill": vllm_config.scheduler_config.enable_chunked_prefill,
            "--enable-prefix-caching": vllm_config.cache_config.enable_prefix_caching,
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
