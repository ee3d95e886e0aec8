"""Bottleneck-Token embeddings of vision-language models.

This file lists the public names. Each is imported on first use, so that `import btok_hf` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # editors and type checkers do not run `__getattr__`
    from btok_hf.bottleneck import add_bottleneck_tokens
    from btok_hf.condensation import condense
    from btok_hf.convert import convert_checkpoint
    from btok_hf.export import export_adapters, export_model
    from btok_hf.hub import push
    from btok_hf.media import read_image
    from btok_hf.modeling import BTokForEmbedding, BTokOutput
    from btok_hf.sentence_transformer import BTokSentenceTransformer
    from btok_hf.transformer import BottleneckTransformer
    from btok_hf.verification import verify
    from btok_hf.video import read_video

_LAZY_IMPORTS = {
    "BTokForEmbedding": "btok_hf.modeling",
    "BTokOutput": "btok_hf.modeling",
    "BTokSentenceTransformer": "btok_hf.sentence_transformer",
    "BottleneckTransformer": "btok_hf.transformer",
    "add_bottleneck_tokens": "btok_hf.bottleneck",
    "condense": "btok_hf.condensation",
    "convert_checkpoint": "btok_hf.convert",
    "export_adapters": "btok_hf.export",
    "export_model": "btok_hf.export",
    "push": "btok_hf.hub",
    "read_image": "btok_hf.media",
    "read_video": "btok_hf.video",
    "verify": "btok_hf.verification",
}
__all__ = [  # a literal list, which editors can read
    "BTokForEmbedding",
    "BTokOutput",
    "BTokSentenceTransformer",
    "BottleneckTransformer",
    "add_bottleneck_tokens",
    "condense",
    "convert_checkpoint",
    "export_adapters",
    "export_model",
    "push",
    "read_image",
    "read_video",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'btok_hf' has no attribute {name!r}")
    return getattr(import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
