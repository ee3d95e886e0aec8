"""The interface of a family of backbones: what differs between families. The defaults are those of Qwen-VL.

The families themselves are in `btok_hf/backbones.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from btok_hf.features import GRID_KEYS
from btok_hf.inputs import ImageLimits
from btok_hf.modeling.modeling_btok import Backbone

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
        smallest (`int`, *optional*): Number of pixels that smaller images are enlarged to.
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

    def check(self, config: PreTrainedConfig) -> None:
        """Raise `ValueError` for a variant of the family that this library has not been tested with."""
        text_model = config.get_text_config().model_type
        if self.text_models and text_model not in self.text_models:
            raise ValueError(
                f"{self.name} is supported with the language models {', '.join(self.text_models)}, got "
                f"{text_model!r}, whose attention and tokens were not checked. Start from another checkpoint of it."
            )

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
        # If all images are resized to the same number of pixels, that need not be a whole number of tokens.
        shown = [most // divisor for divisor in (1, 2, 4) if most // divisor * unit >= least] or [max(most, 1)]
        return ImageCosts("max_pixels", {tokens * unit: tokens for tokens in shown}, unit, least)

    def image_tokens(self, processor: ProcessorMixin, size: tuple[int, int] | None) -> int:
        """About how many tokens an image becomes.

        Args:
            processor (`ProcessorMixin`): A processor of the family.
            size (`tuple[int, int]`, *optional*): Width and height in pixels. Default: those of the largest image.
        """
        return _resized_tokens(processor.image_processor, size)

    def frame_tokens(self, processor: ProcessorMixin, size: tuple[int, int] | None) -> int:
        """About how many tokens two frames of a video become; 0 if the family takes no video, which is refused later.

        Arguments are those of `image_tokens`.
        """
        return _resized_tokens(processor.video_processor, size) if self.video else 0

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
        """
        grids = {key: features[key] for key in GRID_KEYS if features.get(key) is not None}
        if not grids:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        assert mm_token_type_ids is not None  # `check_media`
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


def _resized_tokens(part: Any, size: tuple[int, int] | None) -> int:
    """Tokens of an image that is resized to a number of pixels within the bounds of its processor."""
    pixels = math.inf if size is None else math.prod(size)
    least, most = part.size["shortest_edge"], part.size["longest_edge"]
    return int(min(max(pixels, least), most) // (part.patch_size * part.merge_size) ** 2)
