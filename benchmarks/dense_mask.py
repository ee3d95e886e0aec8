"""The Condensation Mask as a matrix. Benchmarks and tests compare packed rows, which need none, with it."""

import torch
from torch import Tensor

from btok_hf.modeling.inputs_btok import last_positions


def dense_condensation_mask(attention_mask: Tensor, target_mask: Tensor, num_tokens: int) -> Tensor:
    """The Condensation Mask (arXiv 2604.11095) of a padded batch.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, length)`): 1 for real tokens of [encoded side | BToks].
        target_mask (`torch.Tensor` of shape `(batch, target_length)`): 1 for real target tokens.
        num_tokens (`int`): K, the number of Bottleneck Tokens at the end of each row.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, length + target_length, length + target_length)`: True if the query
        (third axis) attends to the key (last axis).
    """
    batch, length = attention_mask.shape
    real = torch.cat([attention_mask, target_mask], 1).bool()
    total = real.shape[1]
    is_target = torch.arange(total, device=real.device) >= length
    is_bottleneck = torch.zeros_like(real).scatter_(1, last_positions(attention_mask, num_tokens), True)
    visible = torch.ones(total, total, dtype=torch.bool, device=real.device).tril()[None] & real[:, None]
    hidden = is_target[None, :, None] & ~(is_target[None, None] | is_bottleneck[:, None])
    # Padding tokens attend only to themselves, so that their softmax is defined.
    padding = torch.eye(total, dtype=torch.bool, device=real.device) & ~real[:, :, None]
    return ((visible & ~hidden) | padding)[:, None]
