"""A plugin for vLLM that computes Gated DeltaNet in fp32 on CPUs, where its own kernels take bf16 only.

So golden vectors of Qwen3.5 can be compared to the precision of other families: weights, positions, media and pooling
are vLLM's, and the recurrence is that of transformers.
"""

from itertools import pairwise

import torch
from torch.nn.functional import conv1d, pad, silu, softplus
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

from btok_hf.serving.vllm_plugin import BTokRecurrentConfig


def register():
    gdn_attention.cpu_gdn_attention_core = core
    BTokRecurrentConfig.check_cpu_kernels = staticmethod(lambda model_config: None)


def core(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: LayerNameType
) -> None:
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:  # a run that measures memory
        return
    bounds = context.attn_metadata[layer.prefix].non_spec_query_start_loc.tolist()
    kernel = layer.conv1d.weight.view(len(layer.conv1d.weight), 1, -1)
    for start, end in pairwise(bounds):
        past = pad(mixed_qkv[start:end].T[None], (kernel.shape[-1] - 1, 0))  # each row is whole: nothing before it
        rows = silu(conv1d(past, kernel, groups=len(kernel)))[0].T.contiguous()
        query, key, value = layer.rearrange_mixed_qkv(rows)
        query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], 2) for x in (query, key))
        decay = -layer.A_log.exp() * softplus(a[start:end] + layer.dt_bias)
        beta = b[start:end].sigmoid()
        core_attn_out[start:end] = torch_chunk_gated_delta_rule(
            query, key, value, g=decay[None], beta=beta[None], use_qk_l2norm_in_kernel=True
        )[0][0]
