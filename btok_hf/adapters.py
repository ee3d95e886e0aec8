"""LoRA adapters: add, load, merge. PEFT does the work; what is checked or corrected here says why.

PEFT is imported where it is used: it belongs to the `train` extra.
"""

import copy

import torch

from btok_hf.modeling.modeling_btok import bottleneck_token_ids

# The language model's projections: what LoRA adapts unless the user names modules.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def add_adapters_in_fp32(backbone, peft_config):
    """Add fresh PEFT adapters to a transformers model, freezing the rest.

    Beside bf16 weights PEFT makes adapters bf16 too, which rounds most steps of the usual learning rates away, and the
    values of a checkpoint when it is resumed from.
    """
    backbone.add_adapter(peft_config)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapters(backbone, path, **hub_kwargs):
    """Add the PEFT adapters of a checkpoint to a transformers model, and check that they arrived.

    Not through `backbone.load_adapter`: with transformers 5.17 it leaves them random, with a warning.

    Args:
        backbone (`PreTrainedModel`): The model that they were trained on.
        path (`str`): Folder or Hub id of the checkpoint.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: A tensor of the checkpoint has no place in the model, or the reverse.
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
            "that they were trained on, and with the PEFT release that saved them."
        )


def has_adapters(backbone):
    """Whether PEFT adapters were added to this transformers model."""
    return bool(getattr(backbone, "_hf_peft_config_loaded", False))


def add_adapters(model, peft_config):
    """Add LoRA adapters to the language model, the Bottleneck Tokens' embedding rows trained along with them.

    Raises:
        ValueError: Dropout above 0, or token rows already named in `peft_config`.
    """
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout > 0:
        raise ValueError(
            f"lora_dropout must be 0, got {dropout}: GradCache embeds each row twice, and with dropout the cached "
            "gradients would belong to other embeddings than those of the second pass. Set lora_dropout=0.0."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = LORA_TARGETS
    if peft_config.trainable_token_indices is not None:
        raise ValueError("Leave trainable_token_indices unset: the Bottleneck Tokens' rows are added to it.")
    if model.config.btok_num_tokens:
        peft_config.trainable_token_indices = {"embed_tokens": list(bottleneck_token_ids(model.config))}
    add_adapters_in_fp32(model[0].model, peft_config)
    if model[0].lm_head is not None:  # an untied head, outside the backbone that PEFT froze
        model[0].lm_head.requires_grad_(False)


def merge_adapters(backbone):
    """A copy of a transformers model with its PEFT adapters merged into the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    merged = copy.deepcopy(backbone)
    # The wrapper of the trained token rows holds a tuner layer of its own: outermost layers only.
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
