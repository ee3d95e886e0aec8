"""The weights of a repository: written shard by shard, and read for an fp32 computation layer by layer.

So publishing needs little memory beside the model. `btok_hf/adapters.py` merges one layer at a time, and at most one
shard of merged tensors exists. Weights that were just written are read through memory maps.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from btok_hf.files import write_json
from btok_hf.modeling.modeling_btok import LOADING, StockModel

# Large enough for a 2B model in one file. An export holds one shard of merged tensors in memory.
MAX_SHARD_SIZE = "5GB"
# Files that loaders read weights from, in a folder or in the root of a repository.
WEIGHT_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.*",
)


def untied_head(model: StockModel) -> torch.nn.Linear | None:
    """The language-modelling head of a stock model; `None` if it is tied to the input embedding."""
    return None if model.lm_head.weight is model.get_input_embeddings().weight else model.lm_head


def plan_shards(empty: Mapping[str, torch.Tensor], max_shard_size: str = MAX_SHARD_SIZE) -> StateDictSplit:
    """Which tensor goes into which file.

    Args:
        empty (`dict[str, torch.Tensor]`): Tensors of the right shapes and dtypes, e.g. on the meta device.
        max_shard_size (`str`): Maximum size of a file, e.g. `5GB`. A larger tensor has a file of its own.

    Raises:
        ValueError: `max_shard_size` is not a size.
    """
    try:
        return split_torch_state_dict_into_shards(
            dict(empty), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size must be a size such as '5GB' or '500MB', got {max_shard_size!r}.") from error


def names_on_disk(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, names: Iterable[str]
) -> dict[str, str]:
    """The names under which `save_pretrained` of a new model writes its tensors.

    They differ from those in memory. Stock `AutoModel` leaves the vision tower randomly initialised if a checkpoint
    has other names.

    Args:
        model_class (`type`): A stock `…ForConditionalGeneration`.
        config (`PreTrainedConfig`): Its configuration.
        names (`Iterable[str]`): Names of its tensors in memory.

    Returns:
        `dict[str, str]`: Name in memory by name on disk.

    Raises:
        ValueError: Names that the class does not have, or too few.
    """
    # Copying through to_dict drops the attention implementation, which transformers would not accept in a new model.
    with LOADING, torch.device("meta"):
        model = model_class(type(config).from_dict(config.to_dict()))
    marked = {name: torch.empty(0, device="meta") for name in names}
    if wrong := sorted((marked.keys() ^ model.state_dict().keys()) - {"lm_head.weight"}):
        raise ValueError(
            f"The model has other tensors than a {model_class.__name__}: {len(wrong)}, e.g. {wrong[0]}. Nobody could "
            "load them. Add adapters with model.add_adapter or peft_config, not with peft.get_peft_model, and load "
            "the model again after its layers were replaced."
        )
    in_memory = {id(tensor): name for name, tensor in marked.items()}
    return {name: in_memory[id(tensor)] for name, tensor in revert_weight_conversion(model, marked).items()}


def write_weights(output_dir: Path, read: Callable[[str], torch.Tensor], plan: StateDictSplit) -> None:
    """Write tensors as safetensors, and compare what was written with them.

    Args:
        output_dir (`Path`): Folder to write.
        read (`Callable`): From a name to its tensor, on any device. It is called twice for each name, and may compute
            the tensor each time.
        plan (`StateDictSplit`): From `plan_shards`.

    Raises:
        OSError: A written file differs from the tensors.
        ValueError: Tensors with NaN or infinite values.
    """
    count = 0
    for file, names in plan.filename_to_tensors.items():
        shard = {name: read(name).detach().cpu().contiguous() for name in names}
        if broken := [name for name in names if not shard[name].isfinite().all()]:
            raise ValueError(
                f"{len(broken)} weights are not finite, the first is {broken[0]}. Nothing was written. Take "
                "the weights of a checkpoint from before the training broke."
            )
        save_file(shard, output_dir / file, metadata={"format": "pt"})
        del shard  # before it is computed again
        with safe_open(output_dir / file, "pt") as written:
            for name in names:
                tensor = read(name).detach().cpu()
                count += tensor.numel()
                if not _same_bytes(written.get_tensor(name), tensor):
                    raise OSError(f"{name} in {output_dir / file} is not what was written. Check the disk and repeat")
    if plan.is_sharded:
        index = {
            "metadata": {"total_parameters": count, **plan.metadata},
            "weight_map": dict(sorted(plan.tensor_to_filename.items())),
        }
        write_json(output_dir / "model.safetensors.index.json", index)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def compute_in_fp32(backbone: torch.nn.Module) -> None:
    """Make a backbone of lower precision compute in fp32, with one layer in fp32 at a time.

    Only the members of module lists, which hold nearly all weights, change back after they ran. The result is that of
    `backbone.float()`.

    Args:
        backbone (`torch.nn.Module`): For inference only. It is changed in place.
    """
    layers: list[torch.nn.Module] = []
    for module in backbone.modules():
        if isinstance(module, torch.nn.ModuleList):
            layers += [layer for layer in module if not any(layer in outer.modules() for outer in layers)]
    of_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for parameter in backbone.parameters():
        if id(parameter) not in of_layers:
            parameter.data = parameter.data.float()

    def enlarge(layer: Any, inputs: Any) -> None:
        layer.stored_weights = [parameter.data for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()

    def restore(layer: Any, inputs: Any, output: Any) -> None:
        for parameter, stored in zip(layer.parameters(), layer.stored_weights):
            parameter.data = stored
        del layer.stored_weights

    for layer in layers:
        layer.register_forward_pre_hook(enlarge)
        layer.register_forward_hook(restore)
