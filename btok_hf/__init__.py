"""Bottleneck-Token embeddings for Qwen-VL models.

Names are imported on first use, so that `import btok_hf` costs next to nothing.
"""

from importlib import import_module

_HOMES = {
    "BTokForEmbedding": "btok_hf.modeling",
    "BTokOutput": "btok_hf.modeling",
    "BTokSentenceTransformer": "btok_hf.sentence_transformer",
    "BottleneckTransformer": "btok_hf.sentence_transformer",
    "add_bottleneck_tokens": "btok_hf.bottleneck",
    "condense": "btok_hf.condensation",
    "export_adapters": "btok_hf.export",
    "export_model": "btok_hf.export",
    "push": "btok_hf.hub",
    "read_image": "btok_hf.media",
    "read_video": "btok_hf.media",
    "verify": "btok_hf.hub",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'btok_hf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
