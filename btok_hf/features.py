"""The features of a batch: the outputs of the processor, and the keys that this library adds.

All features stay on the host. `condense` packs a mini-batch and copies it to the device. The table of `BatchFeatures`
lists all added keys.
"""

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

PIXEL_KEYS = ("pixel_values", "pixel_values_videos")
MEDIA_KEYS = (*PIXEL_KEYS, "pixel_attention_mask", "spatial_shapes", "image_grid_thw", "video_grid_thw")
GRID_KEYS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
ROW_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", *GRID_KEYS)
# The features of a batch of texts alone. A batch with media has others too.
TEXT_KEYS = {"input_ids", "attention_mask", "mm_token_type_ids", "target_ids", "target_labels", "copies", "modality"}
IGNORED = -100  # label of an unsupervised token, as in transformers


class BatchFeatures(TypedDict, total=False):
    """Feature keys of one column of a batch (`query`, `positive`, `negative`), in addition to those of the processor.

    The collator prefixes each key with the column name and an underscore. Sentence-Transformers' trainer removes the
    prefix.

    | key | shape | written by | read by |
    |---|---|---|---|
    | `target_ids` | int64 `(rows, 1, target_length)` | `CondensationCollator` | `BottleneckTransformer.forward` |
    | `target_labels` | the same | `CondensationCollator` | loss, `BottleneckTransformer.forward` |
    | `hashes` | int64 `(batch, 2)`: content, group | `CondensationCollator` | `CondensationLoss` |
    | `rows` | int64 `(batch,)`: index of the encoded row | `CondensationCollator` | `CondensationLoss` |
    | `copies` | int64 `(rows,)`: batch rows per encoded row | `CondensationLoss.forward` | its `embed_minibatch` |
    | `cu_seq_lens_q` | int64 `(rows + 1,)`: token bounds | `CondensationLoss.forward` | GradCache's mini-batches |
    | `vision` | dict of cached vision-tower outputs | `CondensationLoss.forward` | its `embed_minibatch` |
    | `condensation_mask` | bool | `CondensationLoss.embed_minibatch` | `BottleneckTransformer.forward` |
    | `sentence_embedding` | fp32 `(rows, hidden)`, on the device | `BottleneckTransformer.forward` | loss, `encode` |
    | `condensation_loss` | fp32 `(rows,)`, on the device | `BottleneckTransformer.forward` | `CondensationLoss` |
    """

    target_ids: Tensor
    target_labels: Tensor
    hashes: Tensor
    rows: Tensor
    copies: Tensor
    cu_seq_lens_q: Tensor
    vision: dict[int, list]
    condensation_mask: bool
    sentence_embedding: Tensor
    condensation_loss: Tensor


def joined(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Features of a batch from those of its rows.

    Args:
        rows (`list[dict]`): What the processor returns for one row each.
        tokenizer (`PreTrainedTokenizerBase`): Pads them.

    Returns:
        `dict[str, Any]`: Token ids and their masks are padded, and other tensors are concatenated.
    """
    batch: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            batch.setdefault(key, []).append(value)
    for key, values in batch.items():
        batch[key] = torch.cat(values) if isinstance(values[0], Tensor) and key not in ROW_KEYS else values[0]
    ids = {key: [row[key][0] for row in rows] for key in ("input_ids", "attention_mask")}
    return {**batch, **tokenizer.pad(ids, return_tensors="pt")}


def stacked(sides: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The features of several sides of texts as those of one side: the rows of the first, of the second and so on.

    Args:
        sides (`list[dict]`): Features with `TEXT_KEYS` only. Those with targets may stand beside some without.
        tokenizer (`PreTrainedTokenizerBase`): Its padding token fills the rows. Every loaded model has one.

    Returns:
        `dict[str, Any]`: Their tensors, padded to the longest side.
    """
    assert tokenizer is not None and isinstance(tokenizer.pad_token_id, int)  # padded rows came from it
    pad = tokenizer.pad_token_id
    fill = {"input_ids": pad, "target_ids": pad, "target_labels": IGNORED, "copies": 1}
    result: dict[str, Any] = {}
    for key in dict.fromkeys(key for side in sides for key in side):
        known = next(side[key] for side in sides if key in side)
        if not isinstance(known, Tensor):
            result[key] = known
            continue
        # A side without targets gets some of length 0.
        shapes = [(len(side["input_ids"]), *known.shape[1:-1], *[0] * (known.ndim > 1)) for side in sides]
        value = fill.get(key, 0)
        parts = [side.get(key, known.new_full(shape, value)) for side, shape in zip(sides, shapes)]
        if known.ndim > 1:
            longest = max(part.shape[-1] for part in parts)
            parts = [F.pad(part, (0, longest - part.shape[-1]), value=value) for part in parts]
        result[key] = torch.cat(parts)
    return result


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device without waiting for the device.

    A copy from ordinary memory waits for all kernels that are queued on a GPU. A copy from pinned memory is queued.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostFeatures(UserDict):
    """Features that DDP and FSDP pass to the module unchanged.

    They copy the tensors of a `dict` to the device, and `condense` would have to copy them back. `UserDict` is not a
    subclass of `dict`.
    """
