"""The features of a batch: what the processor returns, and what this library adds on the way to the loss.

Everything lies on the host until `condense` packs a mini-batch and copies to the device what its forward needs.
"""

from collections import UserDict
from typing import TypedDict

from torch import Tensor

PIXEL_KEYS = ("pixel_values", "pixel_values_videos")
MEDIA_KEYS = (*PIXEL_KEYS, "image_grid_thw", "video_grid_thw")
GRID_KEYS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
ROW_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", *GRID_KEYS)
IGNORED = -100  # label of an unsupervised token, as in transformers


class BatchFeatures(TypedDict, total=False):
    """Feature keys of one side of a batch (`query`, `positive`, `negative`), besides those of the processor.

    The collator puts the side and an underscore in front; Sentence-Transformers' trainer takes them off again.

    | key | shape | written by | read by |
    |---|---|---|---|
    | `target_ids` | int64 `(rows, 1, target_length)` | `CondensationCollator` | `BottleneckTransformer.forward` |
    | `target_labels` | the same | `CondensationCollator` | loss, `BottleneckTransformer.forward` |
    | `hashes` | int64 `(batch, 2)`: content, group | `CondensationCollator` | `CondensationLoss` |
    | `rows` | int64 `(batch,)`: encoded row of each row | `CondensationCollator` | `CondensationLoss` |
    | `copies` | int64 `(rows,)`: how often it counts | `CondensationLoss.forward` | its `embed_minibatch` |
    | `cu_seq_lens_q` | int64 `(rows + 1,)`: token bounds | `CondensationLoss.forward` | GradCache's mini-batches |
    | `vision` | dict of kept vision-tower outputs | `CondensationLoss.forward` | its `embed_minibatch` |
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


class HostFeatures(UserDict):
    """Features that a wrapped model gets as they are.

    DDP and FSDP copy the tensors of a dict to the device before the module sees it; `condense` would have to fetch
    them back. They leave alone what is no dict.
    """
