"""The model card of a repository; installed as `btok_hf.hub_card`."""

from .card import CardArguments, render_card

__all__ = ["CardArguments", "render_card"]
