"""The supported backbones: one row for each family, with what differs between them.

The rest of the library asks `family_of(config)` and names no family. The stock class of each family is in the remote
code (`modeling/modeling_btok.py`), because it travels with the weights.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from btok_hf.features import GRID_KEYS
from btok_hf.inputs import ImageLimits
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


class ImageCosts(NamedTuple):
    """What images cost with the settings of a processor, for the model card.

    Args:
        setting (`str`): Argument of the processor that bounds the tokens of an image.
        tokens (`dict`): By value of the setting (a number or Python source), the tokens of the largest image. The
            processor's own is first, smaller ones follow.
        unit (`int`): Pixels per token or, if images are cut into tiles, the side of a tile in pixels.
        smallest (`int`, *optional*): Pixels that smaller images are enlarged to.
    """

    setting: str
    tokens: dict[int | str, int]
    unit: int
    smallest: int | None


@dataclass(frozen=True)
class Family:
    """A family of backbones with the structure of Qwen-VL. A family of another structure overrides the methods.

    Args:
        name (`str`): What its makers call it.
        required_tokens (`tuple[str, ...]`): Special tokens that rows and targets are made of.
        adapted (`tuple[str, ...]`): Names of the linear layers of the language model that LoRA adapts by default.
        mixers (`tuple[str, ...]`): Names of the modules in a layer that mix tokens otherwise than by attention. They
            are causal and take hidden states of shape `(batch, length, hidden)`.
        language (`str`): Name of the part of a backbone that reads tokens.
        image (`str`): What stands for an image in the text that the processor gets.
        video (`str`, *optional*): What stands for a video. `None`: the family takes none.
        media_bounds (`tuple[str, str]`): Tokens before and after the placeholders of an image or a frame.
        text_models (`tuple[str, ...]`): The `model_type` that the language model may have; empty if there is only one.
        packs_images (`bool`): Whether the vision tower gets all images as one row, with their bounds.
        reads_pixels (`bool`): Whether the processor knows `min_pixels` and `max_pixels` when it is loaded.
        processor (`str`): The class of transformers that loads the processor of a base.
        equal_videos (`bool`): Whether the processor takes only videos of equally many frames at a time.
        cut_error (`str`): What the processor's error says if truncation cut an image or a frame.
    """

    name: str
    required_tokens: tuple[str, ...] = REQUIRED_TOKENS
    adapted: tuple[str, ...] = PROJECTIONS
    mixers: tuple[str, ...] = ()
    language: str = "language_model"
    image: str = "<|vision_start|><|image_pad|><|vision_end|>"
    video: str | None = "<|vision_start|><|video_pad|><|vision_end|>"
    media_bounds: tuple[str, str] = ("<|vision_start|>", "<|vision_end|>")
    text_models: tuple[str, ...] = ()
    packs_images: bool = True
    reads_pixels: bool = True
    processor: str = "AutoProcessor"
    equal_videos: bool = False
    cut_error: str = "Likely due to `truncation"

    @property
    def lora_targets(self) -> str:
        """The default target modules of LoRA, as a pattern of their full names."""
        return rf".*{self.language}.*\.({'|'.join(self.adapted)})"

    def language_model(self, backbone: Backbone) -> PreTrainedModel:
        """The part of a backbone that reads tokens."""
        return getattr(backbone, self.language)

    def vision_tower(self, backbone: Backbone) -> Module:
        """The part of a backbone that reads pixels, with all that lies between it and the language model."""
        return backbone.visual

    def placeholders(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Ids of the tokens that stand for images and video in a row."""
        return config.image_token_id, config.video_token_id

    def image_limits(self, config: PreTrainedConfig, processor: ProcessorMixin) -> ImageLimits:
        """What images `check_input` lets pass."""
        return ImageLimits(processor.image_processor.size["longest_edge"], config.vision_config.patch_size)

    def limit_pixels(self, processor: ProcessorMixin, min_pixels: int | None, max_pixels: int | None) -> None:
        """Set the pixel limits of images and of video frames in a processor; `None` keeps its own.

        Raises:
            ValueError: `min_pixels` exceeds `max_pixels`.
        """
        # Limit pixels per frame, as the reference implementation does. transformers is moving to this behaviour.
        processor.video_processor.cap_pixels_per_frame = True
        for part in (processor.image_processor, processor.video_processor):
            limits = {
                "shortest_edge": part.size["shortest_edge"] if min_pixels is None else min_pixels,
                "longest_edge": part.size["longest_edge"] if max_pixels is None else max_pixels,
            }
            if limits["shortest_edge"] > limits["longest_edge"]:
                raise ValueError(
                    f"min_pixels must not exceed max_pixels, got min_pixels={limits['shortest_edge']} and "
                    f"max_pixels={limits['longest_edge']}. Lower min_pixels or raise max_pixels."
                )
            part.size = limits

    def image_costs(self, processor: ProcessorMixin) -> ImageCosts:
        """What images cost with this processor's settings."""
        part = processor.image_processor
        unit = (part.patch_size * part.merge_size) ** 2
        least, most = part.size["shortest_edge"], part.size["longest_edge"] // unit
        shown = [most // divisor for divisor in (1, 2, 4) if most // divisor * unit >= least]
        return ImageCosts("max_pixels", {tokens * unit: tokens for tokens in shown}, unit, least)

    def golden_sides(self, processor: ProcessorMixin) -> tuple[int, int | None]:
        """Sides in pixels of a golden image, which is not resized, and of a frame of the long golden video.

        `None`: without the long video. It has later positions in time than in the frame, so that positions after it
        are checked.
        """
        part = processor.image_processor
        return 224, 2 * part.patch_size * part.merge_size

    def items_per_row(self, config: PreTrainedConfig, features: Mapping[str, Any]) -> dict[str, Tensor]:
        """Entries per row, shape `(batch,)`, of features that GradCache's engine would cut as if they had one."""
        if "second_per_grid_ts" in features and "num_videos_per_sample" in features:
            return {"second_per_grid_ts": features["num_videos_per_sample"]}
        return {}

    def pixels(self, media: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the features of a batch with pixels, those that a packed row needs."""
        return media

    def masks(self, config: PreTrainedConfig) -> Any:
        """The `attention_mask` of a packed row: with it, the language model builds no mask of its own."""
        return None

    def positions(
        self,
        backbone: Backbone,
        input_ids: Tensor,
        attention_mask: Tensor,
        mm_token_type_ids: Tensor | None,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """Positions of the tokens as the backbone computes them: M-RoPE.

        Args:
            backbone: The stock backbone.
            input_ids, attention_mask (`torch.Tensor` of shape `(batch, length)`): Rows, padded on either side.
            mm_token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 text, 1 image, 2 video.
            features (`dict[str, torch.Tensor]`): With media, their grids.

        Returns:
            `torch.LongTensor` of shape `(axes, batch, length)`: Time, height and width. Padding has any.

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


@dataclass(frozen=True)
class Tiled(Family):
    """Images are cut into tiles of one size. One token stands for all media, and positions count tokens."""

    packs_images: bool = False
    reads_pixels: bool = False

    def placeholders(self, config: PreTrainedConfig) -> tuple[int, ...]:
        return (config.image_token_id,)

    def positions(
        self,
        backbone: Backbone,
        input_ids: Tensor,
        attention_mask: Tensor,
        mm_token_type_ids: Tensor | None,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[None]


@dataclass(frozen=True)
class InternVL(Tiled):
    """A frame of a video is one tile."""

    def vision_tower(self, backbone: Backbone) -> Module:
        return ModuleList([backbone.vision_tower, backbone.multi_modal_projector])

    def image_limits(self, config: PreTrainedConfig, processor: ProcessorMixin) -> ImageLimits:
        part = processor.image_processor
        tile = part.size["height"] * part.size["width"]
        return ImageLimits(part.max_patches * tile, max(config.vision_config.patch_size))

    def limit_pixels(self, processor: ProcessorMixin, min_pixels: int | None, max_pixels: int | None) -> None:
        part = processor.image_processor
        tile = part.size["height"] * part.size["width"]
        least = part.min_patches if min_pixels is None else -(-min_pixels // tile)
        most = part.max_patches if max_pixels is None else max_pixels // tile
        if not 1 <= least <= most:
            raise ValueError(
                f"An image has tiles of {tile} pixels: at least {least} by min_pixels={min_pixels}, and at most "
                f"{most} by max_pixels={max_pixels}. Lower min_pixels, or raise max_pixels."
            )
        part.min_patches, part.max_patches = least, most

    def image_costs(self, processor: ProcessorMixin) -> ImageCosts:
        part = processor.image_processor
        shown = [part.max_patches // divisor for divisor in (1, 2, 4) if part.max_patches // divisor >= 1]
        # Beside the tiles, there is a view of the whole image.
        tokens = {tiles: (tiles + (tiles > 1)) * cast(Any, processor).image_seq_length for tiles in shown}
        return ImageCosts("max_patches", tokens, part.size["height"], None)

    def golden_sides(self, processor: ProcessorMixin) -> tuple[int, int | None]:
        return processor.image_processor.size["height"], None

    def items_per_row(self, config: PreTrainedConfig, features: Mapping[str, Any]) -> dict[str, Tensor]:
        if "pixel_values" not in features:
            return {}
        tokens = (features["input_ids"] == config.image_token_id).sum(1)
        return {"pixel_values": tokens // config.image_seq_length}

    def masks(self, config: PreTrainedConfig) -> Any:
        # It would find the packed rows by their positions, and build a mask of length x length.
        return dict.fromkeys(config.get_text_config().layer_types)


@dataclass(frozen=True)
class SmolVLM(Tiled):
    """Images are enlarged or reduced to one longest side before they are cut."""

    required_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>")
    language: str = "text_model"
    image: str = "<image>"
    video: str | None = None
    media_bounds: tuple[str, str] = ("<fake_token_around_image>", "<fake_token_around_image>")
    text_models: tuple[str, ...] = ("llama",)
    # The processor of SmolVLM2 reads videos, but replaces the chat template of rows that have one. That of SmolVLM
    # makes the same of texts and images.
    processor: str = "Idefics3Processor"
    cut_error: str = "'NoneType'"  # a TypeError: it does not find the first token of the image

    def vision_tower(self, backbone: Backbone) -> Module:
        return ModuleList([backbone.vision_model, backbone.connector])

    def image_limits(self, config: PreTrainedConfig, processor: ProcessorMixin) -> ImageLimits:
        side = processor.image_processor.size["longest_edge"]
        return ImageLimits(side**2, config.vision_config.patch_size, takes_video=False)

    def limit_pixels(self, processor: ProcessorMixin, min_pixels: int | None, max_pixels: int | None) -> None:
        part = processor.image_processor
        tile = part.max_image_size["longest_edge"]
        if min_pixels is not None:
            raise ValueError(
                f"Every image is resized to the same longest side, got min_pixels={min_pixels}. Leave min_pixels out."
            )
        if max_pixels is not None:
            if max_pixels < tile**2:
                raise ValueError(
                    f"An image has tiles of {tile} x {tile} pixels, got max_pixels={max_pixels}. Set max_pixels to "
                    f"{tile**2} or more."
                )
            part.size = {"longest_edge": math.isqrt(max_pixels) // tile * tile}

    def image_costs(self, processor: ProcessorMixin) -> ImageCosts:
        part = processor.image_processor
        tile = part.max_image_size["longest_edge"]
        most = -(-part.size["longest_edge"] // tile)
        # Beside the tiles, there is a view of the whole image.
        tokens: dict[int | str, int] = {
            json.dumps({"longest_edge": side * tile}): (side**2 + (side > 1)) * cast(Any, processor).image_seq_len
            for side in dict.fromkeys(max(most // divisor, 1) for divisor in (1, 2, 4))
        }
        return ImageCosts("size", tokens, tile, None)

    def golden_sides(self, processor: ProcessorMixin) -> tuple[int, int | None]:
        return 224, None  # every image is resized

    def pixels(self, media: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" not in media:
            return {}
        # Without the empty tiles that the processor pads rows with.
        real = media["pixel_attention_mask"].flatten(2).any(2)
        return {key: value[real][:, None] for key, value in media.items()} if real.any() else {}

    def masks(self, config: PreTrainedConfig) -> Any:
        # It would find the packed rows by their positions, and build a mask of length x length. One with four axes is
        # taken as it is, and packed attention reads none.
        return torch.empty(1, 1, 1, 1)


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
    "internvl": InternVL(
        "InternVL3 (-hf)",
        required_tokens=("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        image="<IMG_CONTEXT>",  # the processor puts <img> and </img> around it
        video="<video>",
        media_bounds=("<img>", "</img>"),
        text_models=("qwen2", "qwen3"),
        equal_videos=True,
    ),
    "idefics3": SmolVLM("SmolVLM"),
    "smolvlm": SmolVLM("SmolVLM2"),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone, by its configuration; raises `ValueError` for an unsupported one."""
    stock_class(config)  # raises
    family = FAMILIES[config.model_type]
    text_model = config.get_text_config().model_type
    if family.text_models and text_model not in family.text_models:
        raise ValueError(
            f"{family.name} is supported with the language models {', '.join(family.text_models)}, got "
            f"{text_model!r}, whose attention and tokens were not checked. Start from another checkpoint of it."
        )
    return family
