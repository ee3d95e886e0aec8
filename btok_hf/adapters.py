"""LoRA adapters: add, load and merge them with PEFT.

Comments say why PEFT's or transformers' own functions are not enough. PEFT is imported inside the functions, because
only the `train` extra installs it.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from btok_hf.modeling.modeling_btok import bottleneck_token_ids

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

# Default target modules of LoRA: the projections of the language model.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def add_adapters_in_fp32(backbone: PreTrainedModel, peft_config: "PeftConfig") -> None:
    """Add new PEFT adapters to a transformers model and freeze all other parameters.

    For bf16 weights, PEFT creates bf16 adapters. Most updates at usual learning rates are lost to rounding in bf16,
    and so is precision of a resumed checkpoint. Therefore adapters are kept in fp32.
    """
    backbone.add_adapter(peft_config)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapters(backbone: PreTrainedModel, path: str, **hub_kwargs: Any) -> None:
    """Add the PEFT adapters of a checkpoint to a transformers model, and check that every tensor was loaded.

    `backbone.load_adapter` is not used: in transformers 5.17 it leaves the adapters random and only warns.

    Args:
        backbone (`PreTrainedModel`): The model that the adapters were trained on.
        path (`str`): Folder or Hub id of the checkpoint.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: The tensors of the checkpoint and of the model do not match.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    saved = load_peft_weights(path, device="cpu", **hub_kwargs)
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    add_adapters_in_fp32(backbone, PeftConfig.from_pretrained(path, **hub_kwargs))
    set_peft_model_state_dict(backbone, saved, backbone.active_adapters()[0])
    loaded = get_peft_model_state_dict(backbone, adapter_name=backbone.active_adapters()[0])
    loaded = {name.removeprefix("base_model.model."): tensor.cpu() for name, tensor in loaded.items()}
    wrong = sorted(saved.keys() ^ loaded.keys())
    wrong += [name for name in saved.keys() & loaded.keys() if not torch.equal(saved[name].float(), loaded[name])]
    if wrong:
        raise ValueError(
            f"{len(wrong)} adapter tensors of {path} do not fit the model, e.g. {wrong[0]}. Load them with the base "
            "model that they were trained on, and with the PEFT release that saved them."
        )


def has_adapters(backbone: PreTrainedModel) -> bool:
    """Whether a transformers model has PEFT adapters."""
    return bool(getattr(backbone, "_hf_peft_config_loaded", False))


def add_adapters(backbone: PreTrainedModel, lm_head: torch.nn.Module | None, peft_config: "LoraConfig") -> None:
    """Add LoRA adapters to the language model. The embedding rows of the Bottleneck Tokens are trained with them.

    Args:
        backbone (`PreTrainedModel`): The stock backbone to train.
        lm_head (`torch.nn.Module`, *optional*): Its untied head, which is frozen.
        peft_config (`LoraConfig`): Target modules, if unset, and trainable token indices are set in place.

    Raises:
        ValueError: `lora_dropout` above 0, or `trainable_token_indices` set in `peft_config`.
    """
    if peft_config.lora_dropout > 0:
        raise ValueError(
            f"lora_dropout must be 0, got {peft_config.lora_dropout}: GradCache embeds each row twice and replays the "
            "random states, but the second pass also runs the target tokens, so that the replayed dropout masks would "
            "not match. Set lora_dropout=0.0."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = LORA_TARGETS
    if peft_config.trainable_token_indices is not None:
        raise ValueError(
            f"trainable_token_indices must be unset, got {peft_config.trainable_token_indices}: it is set to the "
            "Bottleneck Tokens here. Leave it out."
        )
    if backbone.config.btok_num_tokens:
        peft_config.trainable_token_indices = {"embed_tokens": list(bottleneck_token_ids(backbone.config))}
    add_adapters_in_fp32(backbone, peft_config)
    if lm_head is not None:  # PEFT froze only the backbone, which has no untied head
        lm_head.requires_grad_(False)


def merge_adapters(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy of a transformers model with its PEFT adapters merged into the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    merged = copy.deepcopy(backbone)
    # The wrapper of the trained token rows contains another tuner layer. Only the outer one is merged.
    layers: list[tuple[str, Any]]
    layers = [(name, x) for name, x in merged.named_modules() if isinstance(x, AuxiliaryTrainingWrapper)]
    inside = tuple(name + "." for name, _ in layers)
    layers += [
        (name, layer)
        for name, layer in merged.named_modules()
        if isinstance(layer, BaseTunerLayer) and not name.startswith(inside)
    ]
    for name, layer in layers:
        tuner = layer.token_adapter if isinstance(layer, AuxiliaryTrainingWrapper) else layer
        tuner.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(merged.get_submodule(parent), attribute, tuner.get_base_layer())
    merged._hf_peft_config_loaded = False
    return merged
