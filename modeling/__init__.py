"""The model class that is published with the weights; installed as `btok_hf.modeling`."""

from .modeling_btok import BTokForEmbedding, BTokOutput

__all__ = ["BTokForEmbedding", "BTokOutput"]
