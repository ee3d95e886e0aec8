"""The supported backbones: one row for each family, with what differs between them.

The rest of the library asks `family_of(config)` and names no family. The stock class of each family is in the remote
code (`modeling/modeling_btok.py`), because it travels with the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from btok_hf.features import GRID_KEYS
from btok_hf.modeling.modeling_btok import Backbone, stock_class

REQUIRED_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The projections of attention and of the feed-forward network.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A family of backbones with the structure of Qwen-VL. A family of another structure overrides the methods.

    Args:
        name (`str`): What its makers call it.
        required_tokens (`tuple[str, ...]`): Special tokens that rows and targets are made of.
        adapted (`tuple[str, ...]`): Names of the linear layers of the language model that LoRA adapts by default.
        mixers (`tuple[str, ...]`): Names of the modules in a layer that mix tokens otherwise than by attention. They
            are causal and take hidden states of shape `(batch, length, hidden)`.
    """

    name: str
    required_tokens: tuple[str, ...] = REQUIRED_TOKENS
    adapted: tuple[str, ...] = PROJECTIONS
    mixers: tuple[str, ...] = ()

    @property
    def lora_targets(self) -> str:
        """The default target modules of LoRA, as a pattern of their full names."""
        return rf".*language_model.*\.({'|'.join(self.adapted)})"

    def language_model(self, backbone: Backbone) -> PreTrainedModel:
        """The part of a backbone that reads tokens."""
        return backbone.language_model

    def vision_tower(self, backbone: Backbone) -> PreTrainedModel:
        """The part of a backbone that reads pixels."""
        return backbone.visual

    def placeholders(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Ids of the tokens that stand for images and video in a row."""
        return config.image_token_id, config.video_token_id

    def media_bounds(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Ids of the tokens before and after the placeholders of an image or a video."""
        return config.vision_start_token_id, config.vision_end_token_id

    def positions(
        self,
        backbone: Backbone,
        input_ids: Tensor,
        attention_mask: Tensor,
        mm_token_type_ids: Tensor | None,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """Positions of the tokens (M-RoPE) as the backbone computes them.

        Args:
            backbone: The stock backbone.
            input_ids, attention_mask (`torch.Tensor` of shape `(batch, length)`): Rows, padded on either side.
            mm_token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 text, 1 image, 2 video.
            features (`dict[str, torch.Tensor]`): With media, their grids.

        Returns:
            `torch.LongTensor` of shape `(3, batch, length)`: Time, height and width. Padding has any.

        Raises:
            ValueError: Media without `mm_token_type_ids`.
        """
        grids = {key: features[key] for key in GRID_KEYS if features.get(key) is not None}
        if not grids:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        if mm_token_type_ids is None:
            raise ValueError(
                "Images or video were given without mm_token_type_ids, which multimodal positions need. "
                "Pass everything that the processor returned."
            )
        rows = {"mm_token_type_ids": mm_token_type_ids, "attention_mask": attention_mask}
        # The backbone loops over rows in Python. If all rows have the same layout, computing one of them is enough.
        uniform = [
            grid.view(len(input_ids), -1, *grid.shape[1:])
            for grid in grids.values()
            if len(grid) % len(input_ids) == 0
        ]
        if len(uniform) == len(grids) and all((x == x[:1]).all() for x in (*rows.values(), *uniform)):
            first = {key: value[:1] for key, value in rows.items()}
            first |= {key: grid[0] for key, grid in zip(grids, uniform)}
            positions: Tensor = backbone.get_rope_index(input_ids[:1], **first)[0]
            return positions.expand(-1, len(input_ids), -1)
        return backbone.get_rope_index(input_ids, **rows, **grids)[0]


# By model_type, like STOCK_CLASSES of the remote code.
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL"),
    "qwen2_5_vl": Family("Qwen2.5-VL"),
    "qwen3_vl": Family("Qwen3-VL"),
    # Three layers of Gated DeltaNet to one of attention. Its gates (in_proj_a, in_proj_b) have one output for a head:
    # an adapter would be as large as they are.
    "qwen3_5": Family(
        "Qwen3.5", adapted=(*PROJECTIONS, "in_proj_qkv", "in_proj_z", "out_proj"), mixers=("linear_attn",)
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone, by its configuration; raises `ValueError` for an unsupported one."""
    stock_class(config)  # raises
    return FAMILIES[config.model_type]
