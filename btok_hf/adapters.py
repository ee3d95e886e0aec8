"""LoRA adapters: add, load and merge them with PEFT.

Comments say why PEFT's or transformers' own functions are not enough. PEFT is imported inside the functions, because
only the `train` extra installs it.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from btok_hf.backbones import family_of
from btok_hf.hub_names import is_hub_id
from btok_hf.modeling.modeling_btok import bottleneck_token_ids

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

# Options of LoRA that train what a merge leaves out, or that merge only for some inputs.
NOT_MERGED = (
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that change the base weights, which a checkpoint of adapters does not hold.
KEEPS_BASE = (True, False, "gaussian", "orthogonal")


def add_adapters_in_fp32(backbone: PreTrainedModel, peft_config: "PeftConfig") -> None:
    """Add new PEFT adapters to a transformers model and freeze all other parameters.

    For bf16 weights, PEFT creates bf16 adapters. Most updates at usual learning rates are lost to rounding in bf16,
    and so is precision of a resumed checkpoint. Therefore adapters are kept in fp32.

    Raises `ValueError` for `modules_to_save` of weights in half precision: PEFT casts the inputs of LoRA layers to the
    precision of the adapters, and not those of whole modules.
    """
    whole = getattr(peft_config, "modules_to_save", None)
    if whole and backbone.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"modules_to_save={sorted(whole)} needs weights in fp32, got {backbone.dtype}. Load the model with "
            "model_kwargs={'dtype': 'float32'}; to train faster, set bf16=True."
        )
    backbone.add_adapter(peft_config)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapters(backbone: PreTrainedModel, path: str, prefix: str = "", **hub_kwargs: Any) -> None:
    """Add the PEFT adapters of a checkpoint to a transformers model, and check that every tensor was loaded.

    `backbone.load_adapter` is not used: in transformers 5.17 it leaves the adapters random and only warns.

    Args:
        backbone (`PreTrainedModel`): The model that the adapters were trained on.
        path (`str`): Folder or Hub id of the checkpoint.
        prefix (`str`): What the names of the backbone's tensors begin with in the checkpoint.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: The tensors of the checkpoint and of the model do not match.
    """
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    saved = load_peft_weights(path, device="cpu", **hub_kwargs)
    saved = {name.removeprefix(f"base_model.model.{prefix}"): tensor for name, tensor in saved.items()}
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
        ValueError: The model has adapters, `lora_dropout` is above 0, `trainable_token_indices` or `embed_tokens` are
            set in `peft_config`, modules that do not exist, other adapters than LoRA, or an option of LoRA that could
            not be exported.
    """
    check_trainable(peft_config)
    if has_adapters(backbone):
        raise ValueError(
            "The model has adapters already. To train them further, leave peft_config out; to add new ones, merge "
            "these first: btok export."
        )
    if any(name.rpartition(".")[2] == "embed_tokens" for name in peft_config.modules_to_save or ()):
        raise ValueError(
            "modules_to_save must not name embed_tokens: the rows of the Bottleneck Tokens are trained without it. "
            "Leave it out."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = family_of(backbone.config).lora_targets
    if peft_config.trainable_token_indices is not None:
        raise ValueError(
            f"trainable_token_indices must be unset, got {peft_config.trainable_token_indices}: it is set to the "
            "Bottleneck Tokens here. Leave it out."
        )
    # PEFT passes over names that match nothing, as long as one does.
    targets = [] if isinstance(peft_config.target_modules, str) else peft_config.target_modules
    modules = [f".{name}" for name, _ in backbone.named_modules()]
    for option, names in (("target_modules", targets), ("modules_to_save", peft_config.modules_to_save or [])):
        if absent := [name for name in sorted(names) if not any(part.endswith(f".{name}") for part in modules)]:
            raise ValueError(
                f"{option} of peft_config must name modules of {type(backbone).__name__}, got {', '.join(absent)}: "
                "nothing has this name, so nothing would be trained for it. The head of the language model is not a "
                "part of it and stays frozen. Leave it out, or correct it."
            )
    if backbone.config.btok_num_tokens:
        peft_config.trainable_token_indices = {"embed_tokens": list(bottleneck_token_ids(backbone.config))}
    add_adapters_in_fp32(backbone, peft_config)
    if lm_head is not None:  # PEFT froze only the backbone, which has no untied head
        lm_head.requires_grad_(False)


def adapter_config(backbone: PreTrainedModel) -> Any:
    """The PEFT configuration of a transformers model with adapters."""
    return backbone.peft_config[backbone.active_adapters()[0]]


def check_trainable(peft_config: "LoraConfig") -> None:
    """Refuse adapters that GradCache cannot train, and those of `check_exportable`. Raises `ValueError`."""
    check_exportable(peft_config)
    if peft_config.lora_dropout > 0:
        raise ValueError(
            f"lora_dropout must be 0, got {peft_config.lora_dropout}: GradCache embeds each row twice and replays the "
            "random states, but the second pass also runs the target tokens, so that the replayed dropout masks would "
            "not match. Set lora_dropout=0.0 (of saved adapters, in their adapter_config.json)."
        )


def check_exportable(peft_config: "LoraConfig") -> None:
    """Refuse adapters that could be trained and then not be published as they are."""
    if getattr(peft_config.peft_type, "value", peft_config.peft_type) != "LORA":
        raise ValueError(
            f"peft_config must be a LoraConfig, got {type(peft_config).__name__}: other adapters have not been shown "
            "to give the same vectors once merged. Use peft.LoraConfig, or train without peft_config."
        )
    options = [name for name in NOT_MERGED if getattr(peft_config, name, None)]
    if peft_config.bias != "none":
        options.append("bias")
    if options:
        given = ", ".join(f"{name}={getattr(peft_config, name)!r}" for name in options)
        raise ValueError(
            f"LoRA with {given} cannot be exported: merging leaves out what it trains, and loaders would give other "
            f"vectors. Leave {' and '.join(options)} out."
        )
    if peft_config.init_lora_weights not in KEEPS_BASE:
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} changes the base weights, which checkpoints of "
            f"adapters do not hold. Use one of {', '.join(map(repr, KEEPS_BASE))}."
        )


class MergedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a transformers model as they are without adapters: merged where there are adapters.

    A merged tensor is computed on the CPU when it is read, from a copy of its own layer, and is not kept. So a model
    can be written with little more memory than the model needs, and is not changed. All other tensors are the model's.

    Args:
        backbone (`PreTrainedModel`): A stock backbone, with or without adapters.
        lm_head (`torch.nn.Linear`, *optional*): Head of an untied model.

    The names are those of the stock `…ForConditionalGeneration`.

    Raises:
        ValueError: A model that is quantized, or partly not in memory.
    """

    def __init__(self, backbone: PreTrainedModel, lm_head: torch.nn.Module | None = None) -> None:
        if getattr(backbone, "is_quantized", False):
            raise ValueError(
                "The model was quantized when it was loaded, so its tensors are not those of the stock layout. Save "
                "its adapters alone, or load it without quantization_config and save that."
            )
        state = backbone.state_dict()
        if offloaded := [name for name, tensor in state.items() if tensor.is_meta]:
            raise ValueError(
                f"{len(offloaded)} tensors of the model are offloaded, the first {offloaded[0]}. To save it, load it "
                "without device_map."
            )
        self._layers = {f"model.{name}": layer for name, layer in _adapted_layers(backbone).items()}
        self._tensors = {
            f"model.{name}": tensor for name, tensor in state.items() if self._owner(f"model.{name}") is None
        }
        for name, layer in self._layers.items():
            self._tensors |= {f"{name}.{key}": tensor for key, tensor in _plain_layer(layer).state_dict().items()}
        if lm_head is not None:
            self._tensors |= {f"lm_head.{key}": tensor for key, tensor in lm_head.state_dict().items()}

    def _owner(self, name: str) -> str | None:
        """The adapted layer that a tensor belongs to."""
        return next((layer for layer in self._layers if name.startswith(layer + ".")), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def empty(self, name: str) -> torch.Tensor:
        """A tensor of the same shape and dtype on the meta device."""
        return torch.empty_like(self._tensors[name], device="meta")

    def __getitem__(self, name: str) -> torch.Tensor:
        plain = self._tensors[name]
        owner = self._owner(name)
        if owner is None:
            return plain
        key = name.removeprefix(owner + ".")
        return _merged_layer(self._layers[owner]).state_dict()[key].to("cpu", plain.dtype)


def _adapted_layers(backbone: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The layers that PEFT replaced, by their names in the model without adapters."""
    if not has_adapters(backbone):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found: dict[str, torch.nn.Module] = {}
    for name, module in backbone.named_modules():  # parents first
        inside = any(name.startswith(outer + ".") for outer in found)
        # The wrapper of the trained token rows contains another tuner layer. Only the outer one counts.
        if isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)) and not inside:
            found[name] = cast(torch.nn.Module, module)
    return found


def _plain_layer(layer: Any) -> torch.nn.Module:
    """The layer that PEFT replaced, as it was before training."""
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return layer.original_module
    return getattr(layer, "token_adapter", layer).get_base_layer()


def _merged_layer(layer: Any) -> torch.nn.Module:
    """A copy of a layer on the CPU, merged with its adapter."""
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):  # a trained copy of the layer: nothing to merge
        return layer.modules_to_save[layer.active_adapters[0]]
    if getattr(layer, "disable_adapters", False):
        raise ValueError(
            "The adapters are disabled, but an export merges them. Call model[0].model.enable_adapters()."
        )
    copied = copy.deepcopy(layer).to("cpu")
    tuner = getattr(copied, "token_adapter", copied)
    tuner.merge(safe_merge=True)
    return tuner.get_base_layer()


def find_base(adapters: str, base: str) -> str:
    """The folder or Hub id of the base model of adapters.

    The path in `adapter_config.json` may be relative to the folder that training ran in, or the run may have been
    moved. So the base is looked for beside the adapters first: in the folder that contains them, and in those above.

    Args:
        adapters (`str`): Folder or Hub id of the adapters.
        base (`str`): Base model as their configuration names it.

    Returns:
        `str`

    Raises:
        FileNotFoundError: The base is a folder and is in none of these places.
    """
    path = Path(base)
    above = () if is_hub_id(adapters) else Path(adapters).resolve().parents[:3]
    # runs/a/start, recorded in full or from the working directory, lies beside runs/a/checkpoint-100. The working
    # directory comes after that: it may be that of another run. The path a/start could also be the id of a repository
    # on the Hub: then only the whole path counts.
    places = [*(folder / path for folder in above), path]
    places += [] if is_hub_id(base) else [folder / path.name for folder in above]
    for place in (tried := dict.fromkeys(map(str, places))):
        if Path(place, "config.json").is_file():
            return place
    if is_hub_id(base):
        return base
    raise FileNotFoundError(
        f"The adapters in {adapters} belong to the base model {base!r}, which is in none of these places: "
        f"{', '.join(tried)}. Put the base model (of a run of `btok train`: its folder start) beside "
        "the checkpoint, or write its path into base_model_name_or_path of adapter_config.json."
    )
