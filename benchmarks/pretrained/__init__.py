"""A pretrained base from the package registry, and what Bottleneck Tokens are worth on it."""

import torch


def half() -> bool:
    """Whether bf16 is faster than fp32 here: on GPUs, and on CPUs with AVX512-BF16 or AMX.

    Without such instructions, an AMD EPYC multiplied bf16 matrices 60 to 100 times more slowly than fp32.
    """
    if torch.cuda.is_available():
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
