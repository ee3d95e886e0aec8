"""Remote code of a Bottleneck-Token model, published with the weights. `inputs_btok.py` checks its inputs.

A Bottleneck-Token (BTok) checkpoint is a stock checkpoint of a causal vision-language model, such as Qwen-VL, whose
vocabulary has K more tokens. Every input row ends in these K tokens. The L2-normalised mean of their last hidden
states is the embedding (Bottleneck Tokens, arXiv 2604.11095). `BTokForEmbedding` adds this pooling to the stock
backbone. It has no parameters of its own, and it reads and writes the stock checkpoint layout.

Import only torch, transformers and the standard library here. The library is in `btok_hf/`.
"""

import json
import shutil
import threading
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch.nn.functional import normalize
from transformers.utils import ModelOutput
from transformers.utils.versions import require_version

require_version("transformers>=5.17", "Models with Bottleneck Tokens need it.")  # before names that older ones lack
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel  # noqa: E402

from .inputs_btok import complete_rows, last_positions  # noqa: E402

FILES = ("modeling_btok.py", "inputs_btok.py")  # what is published
# The classes of transformers by model_type. They are imported by name when they are needed, so that a repository
# loads with any release that has the class of its own family.
STOCK_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "lfm2_vl": "Lfm2VlForConditionalGeneration",
}
StockModel: TypeAlias = Any  # one of these classes
Backbone: TypeAlias = Any  # its `model`: vision tower and language model, without a head

# While transformers loads a model, it replaces `PreTrainedModel.tie_weights`, `torch.linspace` and torch's default
# dtype for all threads, and threads that overlap restore each other's replacements. So one thread of the process loads
# at a time. The lock belongs to transformers, because each repository's copy of this file is a module of its own.
LOADING = vars(transformers).setdefault("_btok_loading", threading.RLock())


@dataclass
class BTokOutput(ModelOutput):
    """Output of `BTokForEmbedding`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, length, hidden)`): After the backbone's final norm. If
            Bottleneck Tokens were appended, with them, and rows right-padded.
        pooler_output (`torch.Tensor` of shape `(batch, hidden or truncate_dim)`): The embedding: fp32, L2-normalised
            mean of the hidden states at the K Bottleneck Tokens.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): Per layer, with `output_hidden_states=True`.
        attentions (`tuple[torch.Tensor, ...]`, *optional*): Per layer, with `output_attentions=True`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The `…ForConditionalGeneration` class for `config`; raises `ValueError` for an unsupported backbone."""
    if config.model_type not in STOCK_CLASSES:
        raise ValueError(
            f"Bottleneck Tokens support the backbones {sorted(STOCK_CLASSES)}, got model_type {config.model_type!r}. "
            "Start from a checkpoint of one of these families."
        )
    return getattr(transformers, STOCK_CLASSES[config.model_type])


def needed_release(config: PreTrainedConfig) -> str:
    """The first release of transformers that computes a backbone exactly, in half precision too."""
    # Before 5.21, patches of SmolVLM got the positions of others, unless a tile has 2^n of them a side.
    tiles, vision = config.model_type in ("idefics3", "smolvlm"), config.vision_config
    return "5.21" if tiles and (vision.image_size // vision.patch_size).bit_count() > 1 else "5.17"


def load_stock_model(
    source: str | Path, config: PreTrainedConfig, *args: Any, needs_head: bool = True, **kwargs: Any
) -> tuple[StockModel, dict[str, Any]]:
    """Load the stock model and its loading info. Missing, unexpected and wrongly shaped tensors are errors.

    The full `…ForConditionalGeneration` is loaded even if only its backbone is needed. It reads every layout of
    Qwen-VL checkpoints. The backbone class alone leaves the vision tower of one layout randomly initialised. Threads
    load in turn.

    Args:
        source (`str` or `Path`): Local folder or Hub id.
        config (`PreTrainedConfig`): Configuration of the checkpoint.
        needs_head (`bool`): Whether an untied `lm_head.weight` is required.
        args, kwargs: For `from_pretrained`.

    Returns:
        `tuple`: The model, and the loading info of `from_pretrained`.

    Raises:
        ImportError: A release of transformers that computes the backbone wrongly.
        ValueError: An unsupported backbone, or tensors that do not match the model.
    """
    load: Any = stock_class(config).from_pretrained  # annotated without the loading info
    require_version(f"transformers>={needed_release(config)}", f"Older ones miscompute this {config.model_type}.")
    kwargs |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with LOADING:
        model, info = load(source, *args, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False):  # their tensors would be saved under names that none knows
        raise ValueError(
            f"{source} holds adapters beside its weights (adapter_config.json). Move adapter_* to a folder of "
            "their own, or merge them into it."
        )
    missing = sorted(info["missing_keys"] - (set() if needs_head else {"lm_head.weight"}))
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])
    for kind, keys in (("misses", missing), ("has wrongly shaped", mismatched), ("has unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"The checkpoint {source} {kind} {len(keys)} tensor(s): {', '.join(keys[:8])}"
                f"{', …' if len(keys) > 8 else ''}. It was not loaded, because random weights would give "
                "meaningless embeddings. Use the weights that belong to this config.json."
            )
    _keep_notes(model, model.model)
    return model, info


def _keep_notes(stock: PreTrainedModel, part: PreTrainedModel) -> None:
    """Give a part of a model what loading noted of quantization and devices: Trainer, PEFT and saving read it."""
    quantized = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    for name in (*quantized, "hf_device_map"):
        if name in vars(stock):
            setattr(part, name, vars(stock)[name])


def bottleneck_token_ids(config: PreTrainedConfig) -> list[int]:
    """The ids of the K Bottleneck Tokens, from `config.btok_token_ids`; raises `ValueError` if they are not valid."""
    ids = getattr(config, "btok_token_ids", None)
    vocab_size = config.get_text_config().vocab_size
    if not ids:
        raise ValueError(
            "config.btok_token_ids is missing: this checkpoint has no Bottleneck Tokens. "
            "Add them with btok_hf.add_bottleneck_tokens(base, output_dir)."
        )
    if len(set(ids)) != len(ids) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"config.btok_token_ids must hold distinct ids below the vocabulary size {vocab_size}, got {ids}. "
            "Restore the config.json that the repository was exported with."
        )
    return ids


class BTokForEmbedding(PreTrainedModel):
    """A stock backbone that returns one embedding per row, pooled from the K Bottleneck Tokens.

    The configuration is that of the backbone, with `btok_token_ids`. Load the model with
    `AutoModel.from_pretrained(repo, trust_remote_code=True)`. Without the flag, `AutoModel` gives the stock backbone.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _auto_class = "AutoModel"

    def __init__(self, config: PreTrainedConfig, backbone: Backbone | None = None) -> None:
        super().__init__(config)
        bottleneck_token_ids(config)
        self.model = stock_class(config)(config).model if backbone is None else backbone
        self._no_split_modules, self.input_modalities = self.model._no_split_modules, self.model.input_modalities
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load from a local folder or Hub id.

        Arguments are those of `PreTrainedModel.from_pretrained`. Attributes of the configuration, such as
        `output_hidden_states`, are not among them.

        The stock class loads the weights, because transformers converts older checkpoint layouts only for its own
        classes. In a custom class some tensors would stay randomly initialised.

        Returns:
            [`BTokForEmbedding`], or a tuple of the model and its loading info with `output_loading_info=True`.

        Raises:
            ValueError: Adapters, an unsupported backbone, no Bottleneck Tokens in the config, or missing, unexpected
                or wrongly shaped tensors.
        """
        kwargs.pop("trust_remote_code", None)
        adapters = (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        if adapters is not None:  # AutoModel has replaced them by their base
            raise ValueError(
                f"{adapters} holds adapters. If btok-hf saved them, load them with SentenceTransformer, or merge them "
                "by btok export; else load their base with AutoModel, then PeftModel.from_pretrained(model, adapters)."
            )
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            given = {key: kwargs[key] for key in hub if key in kwargs}
            config = AutoConfig.from_pretrained(config or pretrained_model_name_or_path, **given)
        bottleneck_token_ids(config)
        with LOADING:
            stock, info = load_stock_model(pretrained_model_name_or_path, config, *args, needs_head=False, **kwargs)
            model = cls(stock.config, stock.model).eval()
            _keep_notes(stock, model)
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the stock weights and configuration, this code, and the `auto_map` that refers to it.

        Arguments are those of `PreTrainedModel.save_pretrained`, by name. To upload, call `push_to_hub`.
        """
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) is not supported: call model.push_to_hub(repo_id).")
        if kwargs.get("state_dict") is not None:  # that of this class, as Accelerate gathers it
            kwargs["state_dict"] = {key.removeprefix("model."): value for key, value in kwargs["state_dict"].items()}
        self.model.save_pretrained(save_directory, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        path = Path(save_directory, "config.json")
        if path.exists():  # absent if the backbone has adapters, which alone are saved
            path.write_text(json.dumps(with_auto_map(json.loads(path.read_text("utf-8"))), indent=2) + "\n", "utf-8")
        write_code(save_directory)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused with `ValueError`, as `load_adapter` is: saved weights would have names that no loader knows."""
        raise ValueError("Adapters of BTokForEmbedding would have unknown names. Add or load them in its .model.")

    load_adapter = add_adapter  # type: ignore[assignment]  # both only raise

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """`False`: engines that can run any model of transformers, and pool it in their own way, ask this first."""
        return False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        truncate_dim: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BTokOutput | tuple:
        """Embed a batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): From the processor. Bottleneck Tokens are
                appended to rows of text and media alone, unless the model has a suffix before them.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for real tokens.
            mm_token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 text, 1 image, 2 video; with
                media, if the processor returns it, as those of Qwen-VL do.
            truncate_dim (`int`, *optional*): Leading dimensions to keep before normalisation (Matryoshka embeddings).
            return_dict (`bool`, *optional*): `False` returns a tuple.
            kwargs: Pixels, grids and other arguments of the backbone.

        Returns:
            [`BTokOutput`] or `tuple`

        Raises:
            ValueError: No `input_ids`, `past_key_values`, a `truncate_dim` that is not in 1 … hidden size, or rows and
                media that `complete_rows` refuses.
        """
        if input_ids is None:
            raise ValueError("BTokForEmbedding finds tokens by their ids. Pass input_ids instead of inputs_embeds.")
        if kwargs.get("past_key_values") is not None:
            raise ValueError("BTokForEmbedding embeds whole rows. Pass them without past_key_values.")
        size = self.config.get_text_config().hidden_size
        whole = isinstance(truncate_dim, Integral) and not isinstance(truncate_dim, bool)
        if truncate_dim is not None and not (whole and 1 <= truncate_dim <= size):
            raise ValueError(f"truncate_dim must be a number from 1 to the hidden size {size}, got {truncate_dim!r}.")
        token_ids = bottleneck_token_ids(self.config)
        input_ids, attention_mask, mm_token_type_ids = complete_rows(
            self.config, token_ids, input_ids, attention_mask, mm_token_type_ids, **kwargs
        )
        if mm_token_type_ids is not None:
            kwargs["mm_token_type_ids"] = mm_token_type_ids
        kwargs.setdefault("use_cache", False)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        hidden = output.last_hidden_state
        positions = last_positions(attention_mask, len(token_ids)).to(hidden.device)
        mean = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])).float().mean(1)
        pooled = normalize(mean[:, :truncate_dim], dim=-1)
        output = BTokOutput(hidden, pooled, output.hidden_states, output.attentions)
        return output.to_tuple() if return_dict is False else output


class _NoConfigClass:
    """Absent: `config_class` must be the class of the checkpoint's configuration, or absent (transformers 5.18)."""

    def __get__(self, instance: object, owner: type | None = None) -> None:
        raise AttributeError("BTokForEmbedding has no config_class of its own.")


BTokForEmbedding.config_class = _NoConfigClass()  # type: ignore[assignment]  # hides the superclass's attribute


def write_code(folder: str | Path) -> None:
    """Copy the remote code into a repository."""
    for name in FILES:
        shutil.copyfile(Path(__file__).with_name(name), Path(folder, name))


def with_auto_map(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a repository: an architecture of our own, and the class of this file as `AutoModel`.

    transformers chooses its stock classes by `model_type` and ignores the architecture. Engines that choose by it, and
    do not know Bottleneck Tokens, refuse the model instead of pooling it in another way.
    """
    name = "BTok" + STOCK_CLASSES[config["model_type"]].replace("ForConditionalGeneration", "ForEmbedding")
    return {**config, "architectures": [name], "auto_map": {"AutoModel": "modeling_btok.BTokForEmbedding"}}
