"""The supported backbones: one row for each family, with what differs between them.

The rest of the library asks `family_of(config)` and names no family. The stock class of each family is in the remote
code (`modeling/modeling_btok.py`), because it travels with the weights.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedConfig, ProcessorMixin

from btok_hf.family import PROJECTIONS, Family, ImageCosts
from btok_hf.inputs import ImageLimits
from btok_hf.modeling.modeling_btok import Backbone, stock_class


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

    def masks(self, config: PreTrainedConfig) -> Any:
        # Without this, the language model would detect packed rows from their positions and build a dense mask.
        return dict.fromkeys(config.get_text_config().layer_types)


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

    def image_tokens(self, processor: ProcessorMixin, size: tuple[int, int] | None) -> int:
        part = processor.image_processor
        if size is None:
            tiles = part.max_patches + 1  # with a view of the whole image
        else:
            tiles = part.get_number_of_image_patches(*size[::-1], {"crop_to_patches": True})
        return tiles * cast(Any, processor).image_seq_length

    def frame_tokens(self, processor: ProcessorMixin, size: tuple[int, int] | None) -> int:
        return 2 * cast(Any, processor).image_seq_length

    def golden_sides(self, processor: ProcessorMixin) -> tuple[int, int | None]:
        return processor.image_processor.size["height"], None

    def items_per_row(self, config: PreTrainedConfig, features: Mapping[str, Any]) -> dict[str, Tensor]:
        if "pixel_values" not in features:
            return {}
        tokens = (features["input_ids"] == config.image_token_id).sum(1)
        return {"pixel_values": tokens // config.image_seq_length}


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

    def image_tokens(self, processor: ProcessorMixin, size: tuple[int, int] | None) -> int:
        # The tiles of a square image, and a view of the whole; for an image of any size, as all are resized.
        part = processor.image_processor
        side = math.ceil(part.size["longest_edge"] / part.max_image_size["longest_edge"])
        return (side**2 + 1) * cast(Any, processor).image_seq_len

    def golden_sides(self, processor: ProcessorMixin) -> tuple[int, int | None]:
        return 224, None  # every image is resized

    def pixels(self, media: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" not in media:
            return {}
        # Without the empty tiles that the processor pads rows with.
        real = media["pixel_attention_mask"].flatten(2).any(2)
        return {key: value[real][:, None] for key, value in media.items()} if real.any() else {}

    def masks(self, config: PreTrainedConfig) -> Any:
        # Llama accepts no dict of masks. A mask with four axes is passed on as it is, and packed attention ignores it.
        return torch.empty(1, 1, 1, 1)


@dataclass(frozen=True)
class LFM2VL(Tiled):
    """Only images that are too large are cut. Tiles and whole images have patches in any number up to a bound."""

    required_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>")
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3")
    mixers: tuple[str, ...] = ("conv",)
    image: str = "<image>"  # the processor puts <|image_start|> and <|image_end|> around it
    video: str | None = None
    media_bounds: tuple[str, str] = ("<|image_start|>", "<|image_end|>")
    text_models: tuple[str, ...] = ("lfm2",)

    def vision_tower(self, backbone: Backbone) -> Module:
        return ModuleList([backbone.vision_tower, backbone.multi_modal_projector])

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        if config.get_text_config().conv_bias:
            # Stock layers set the inputs of padding to zero, but with a bias the projection makes it non-zero again.
            raise ValueError(
                f"{self.name} is supported without biases of the convolutions, got conv_bias=True in config.json: "
                "padding on the left would change the embedding of a row. Start from another checkpoint of it."
            )

    def image_limits(self, config: PreTrainedConfig, processor: ProcessorMixin) -> ImageLimits:
        part = processor.image_processor
        most = part.max_image_tokens * _unit(part)
        if part.do_image_splitting:
            most = max(most, part.max_tiles * part.tile_size**2)
        room = max(part.max_image_tokens * _unit(part), part.tile_size**2 if part.do_image_splitting else 0)

        def fits(width: int, height: int) -> bool:
            # Sides are rounded to whole tokens, so a long image may exceed the bound, and a small one too if the least
            # tokens are nearly the most. The processor then cannot put it into a batch.
            bounds = (part.downsample_factor, part.min_image_tokens, part.max_image_tokens, part.encoder_patch_size)
            return math.prod(part.smart_resize(height, width, *bounds)) <= room

        return ImageLimits(most, part.encoder_patch_size, takes_video=False, fits=fits)

    def limit_pixels(self, processor: ProcessorMixin, min_pixels: int | None, max_pixels: int | None) -> None:
        part = processor.image_processor
        unit, tile = _unit(part), part.tile_size**2
        least = part.min_image_tokens if min_pixels is None else -(-min_pixels // unit)
        most = part.max_image_tokens
        if max_pixels is not None:
            # With too few pixels for tiles, an image is only reduced.
            part.do_image_splitting = max_pixels >= part.min_tiles * tile
            part.max_tiles = max(part.min_tiles, max_pixels // tile)
            most = min(most, max_pixels // unit)
        if not 1 <= least <= most:
            raise ValueError(
                f"An image or a tile has a token per {unit} pixels: at least {least} by min_pixels={min_pixels}, and "
                f"at most {most} by max_pixels={max_pixels}. Lower min_pixels, or raise max_pixels."
            )
        part.min_image_tokens, part.max_image_tokens = least, most

    def image_costs(self, processor: ProcessorMixin) -> ImageCosts:
        part = processor.image_processor
        unit, least, most = _unit(part), part.min_image_tokens, part.max_image_tokens
        if not part.do_image_splitting:
            shown = [most // divisor for divisor in (1, 2, 4) if most // divisor >= least]
            return ImageCosts("max_image_tokens", {tokens: tokens for tokens in shown}, unit, least * unit)
        shown = [part.max_tiles // divisor for divisor in (1, 2, 4) if part.max_tiles // divisor >= part.min_tiles]
        # Beside the tiles, there may be a view of the whole image.
        tokens = {tiles: tiles * part.tile_size**2 // unit + part.use_thumbnail * most for tiles in shown}
        return ImageCosts("max_tiles", tokens, part.tile_size, least * unit)

    def image_tokens(self, processor: ProcessorMixin, size: tuple[int, int] | None) -> int:
        part = processor.image_processor
        pixels, unit, most = math.inf if size is None else math.prod(size), _unit(part), part.max_image_tokens
        if part.do_image_splitting and pixels > most * unit * part.max_pixels_tolerance:
            layout = (part.min_tiles, part.max_tiles, part.tile_size)
            tiles = part.max_tiles if size is None else part._get_grid_layout(*size[::-1], *layout)[-1]
            return tiles * part.tile_size**2 // unit + part.use_thumbnail * most  # the largest view of the whole
        return int(min(max(pixels / unit, part.min_image_tokens), most))

    def golden_sides(self, processor: ProcessorMixin) -> tuple[int, int | None]:
        part = processor.image_processor
        side = part.encoder_patch_size * part.downsample_factor
        most = part.max_image_tokens
        if part.do_image_splitting:  # an image of twice the area is just too large, and is cut
            return side * (math.isqrt(int(most * part.max_pixels_tolerance) // 2) + 1), None
        return side * max(math.isqrt(most // 2), 1), None

    def items_per_row(self, config: PreTrainedConfig, features: Mapping[str, Any]) -> dict[str, Tensor]:
        if "spatial_shapes" not in features:
            return {}
        # Tiles have different numbers of tokens. A row has those that fill its placeholders.
        tiles = features["spatial_shapes"].prod(1) // config.downsample_factor**2
        rows = (features["input_ids"] == config.image_token_id).sum(1)
        ends = torch.searchsorted(tiles.cumsum(0), rows.cumsum(0), right=True)
        return dict.fromkeys(
            ("pixel_values", "pixel_attention_mask", "spatial_shapes"), ends.diff(prepend=ends.new_zeros(1))
        )

    def pixels(self, media: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" not in media:
            return {}
        # The processor pads every tile to as many patches as the largest may have.
        longest = int(media["pixel_attention_mask"].sum(1).max())
        return {key: value[:, :longest] if key.startswith("pixel") else value for key, value in media.items()}


def _unit(part: Any) -> int:
    """Pixels per token of LFM2-VL's processor of images."""
    return (part.encoder_patch_size * part.downsample_factor) ** 2


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
    "lfm2_vl": LFM2VL("LFM2-VL"),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone, by its configuration; raises `ValueError` for an unsupported one."""
    stock_class(config)  # raises
    family = FAMILIES[config.model_type]
    family.check(config)
    return family


# The families by the class of their processor. The families with the structure of Qwen-VL count tokens alike.
PROCESSORS = {
    "Qwen2VLProcessor": FAMILIES["qwen2_vl"],
    "Qwen2_5_VLProcessor": FAMILIES["qwen2_5_vl"],
    "Qwen3VLProcessor": FAMILIES["qwen3_vl"],
    "InternVLProcessor": FAMILIES["internvl"],
    "Idefics3Processor": FAMILIES["idefics3"],
    "SmolVLMProcessor": FAMILIES["smolvlm"],
    "Lfm2VlProcessor": FAMILIES["lfm2_vl"],
}


def family_of_processor(processor: ProcessorMixin | None) -> Family | None:
    """The family that a processor belongs to; `None` for those of other models."""
    return PROCESSORS.get(type(processor).__name__)
