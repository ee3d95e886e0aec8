"""What a batch must be before the backbone sees it; published with the weights, beside `modeling_btok.py`.

Rows that do not end in Bottleneck Tokens get them. What is known to give another embedding without an error is
refused: media that do not match their placeholders, padding without a mask, tokens in other places.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig


def last_positions(attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the last `count` real tokens of each row, for left or right padding. Shape (batch, count)."""
    last = attention_mask.shape[1] - 1 - attention_mask.long().flip(1).argmax(1)
    return last[:, None] - torch.arange(count - 1, -1, -1, device=attention_mask.device)


def complete_rows(
    config: PreTrainedConfig,
    token_ids: list[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    mm_token_type_ids: torch.Tensor | None = None,
    **features: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Check a batch, and append the Bottleneck Tokens to every row that does not end in them.

    If all rows end in them, the inputs are returned unchanged. Otherwise all rows are returned right-padded.

    Args:
        config (`PreTrainedConfig`): Configuration of the model.
        token_ids (`list[int]`): The K Bottleneck Token ids.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, padded on either side.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for real tokens. `None`: all are.
        mm_token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 text, 1 image, 2 video.
        features: Pixels, grids and other arguments of the backbone.

    Returns:
        `tuple`: `input_ids`, `attention_mask` and `mm_token_type_ids`, each of shape `(batch, new_length)`.
        `mm_token_type_ids` is `None` if it was not given.

    Raises:
        ValueError: Other shapes, a row that is empty or has Bottleneck Tokens in other places than its end, padding
            without a mask, and what `check_media` and `check_appended` refuse.
    """
    check_shapes(config, token_ids, input_ids, attention_mask, mm_token_type_ids)
    check_media(config, input_ids, {**features, "mm_token_type_ids": mm_token_type_ids})
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = attention_mask.bool()
    if not real.any(1).all():
        raise ValueError(f"Row {int((~real.any(1)).nonzero()[0])} of input_ids is empty: its attention_mask is all 0.")
    count = len(token_ids)
    tokens = torch.tensor(token_ids, device=input_ids.device)
    tail = input_ids.gather(1, last_positions(attention_mask, count).clamp(min=0))
    ends = (tail == tokens).all(1)
    held = (torch.isin(input_ids, tokens) & real).sum(1)
    wrong = held != ends * count
    if wrong.any():
        row = int(wrong.nonzero()[0])
        elsewhere = ", not all at its end," if held[row] == count else ""
        raise ValueError(
            f"Row {row} has {int(held[row])} Bottleneck Token(s){elsewhere} but must have {count}, all at its end "
            f"(ids {token_ids}). Either the text contains such a token (render it with "
            "processor.apply_chat_template, which escapes it), or config.btok_token_ids and the chat template "
            "disagree on K (restore both from the exported repository)."
        )
    if not ends.all():
        check_appended(config, input_ids, features)
    if config.model_type == "lfm2_vl" and ((input_ids == config.get_text_config().bos_token_id) & real).any():
        raise ValueError(
            "A row has a token that the tokenizer alone puts before it. Use the processor, which does not."
        )
    if ends.all():
        return input_ids, attention_mask, mm_token_type_ids

    def append(values: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        rows = [torch.cat([row[keep], tail[:0] if done else tail]) for row, keep, done in zip(values, real, ends)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    # The padding id 0 is never read, because attention_mask is 0 there.
    if mm_token_type_ids is not None:
        mm_token_type_ids = append(mm_token_type_ids, mm_token_type_ids.new_zeros(count))
    return append(input_ids, tokens), append(attention_mask, attention_mask.new_ones(count)), mm_token_type_ids


def check_shapes(
    config: PreTrainedConfig,
    token_ids: list[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
) -> None:
    """Raise `ValueError` for anything but rows of one length, and for padding that no mask marks."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        got = f"shape {tuple(input_ids.shape)}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor of shape (batch, length), neither of them 0, got {got}.")
    for name, values in (("attention_mask", attention_mask), ("mm_token_type_ids", mm_token_type_ids)):
        if values is not None and getattr(values, "shape", None) != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                f"{tuple(getattr(values, 'shape', ()))}. Pass both as the processor returns them."
            )
    pad: Any = getattr(config, "btok_pad_token_id", getattr(config.get_text_config(), "pad_token_id", None))
    if attention_mask is None and pad not in (None, *token_ids) and input_ids[:, [0, -1]].eq(pad).any():
        raise ValueError(
            f"A row begins or ends with the padding token {pad}, but attention_mask is missing. Pass the processor's."
        )


def check_appended(config: PreTrainedConfig, input_ids: torch.Tensor, features: Mapping[str, Any]) -> None:
    """Raise `ValueError` for rows that the template did not make, and that Bottleneck Tokens alone do not complete."""
    if features.get("position_ids") is not None:
        raise ValueError("A row ends without Bottleneck Tokens, which would have no position_ids. Leave those out.")
    if end := getattr(config, "btok_suffix", None):
        raise ValueError(f"A row ends without {end!r} and Bottleneck Tokens. Use processor.apply_chat_template.")
    if (input_ids == getattr(config, "btok_turn_token_id", -1)).any():
        raise ValueError("A row has turns of a chat, but no Bottleneck Tokens. Leave add_generation_prompt out.")


def _grid_tokens(config: PreTrainedConfig, grids: torch.Tensor) -> int:
    return int(grids.prod(1).sum()) // config.vision_config.spatial_merge_size**2


def _padded_tile_tokens(config: PreTrainedConfig, mask: torch.Tensor) -> int:
    """Tiles of one size. Rows with fewer tiles are padded with empty ones."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    return int(mask.flatten(2).any(2).sum()) * side**2


# By model_type: the feature that says how many placeholders the images need, and their number by it.
# Default: grids, of images and of videos.
IMAGE_TOKENS: dict[str, tuple[str, Callable[[Any, torch.Tensor], int]]] = {
    "internvl": ("pixel_values", lambda config, tiles: len(tiles) * config.image_seq_length),
    "idefics3": ("pixel_attention_mask", _padded_tile_tokens),
    "smolvlm": ("pixel_attention_mask", _padded_tile_tokens),
    "lfm2_vl": ("spatial_shapes", lambda config, tiles: int(tiles.prod(1).sum()) // config.downsample_factor**2),
}


def check_media(config: PreTrainedConfig, input_ids: torch.Tensor, features: Mapping[str, Any]) -> None:
    """Raise `ValueError` for media that do not match their placeholder tokens, or are not finite or not complete."""
    counted = [("image", "pixel_values", *IMAGE_TOKENS.get(config.model_type, ("image_grid_thw", _grid_tokens)))]
    if config.model_type not in IMAGE_TOKENS:
        counted.append(("video", "pixel_values_videos", "video_grid_thw", _grid_tokens))
    for kind, pixel_key, key, count in counted:
        absent = [name for name in (pixel_key, key) if features.get(name) is None]
        if absent == [pixel_key] or absent == [key]:
            present = key if absent == [pixel_key] else pixel_key
            raise ValueError(f"{present} was given without {absent[0]}. Pass everything that the processor returns.")
        placeholders = int((input_ids == getattr(config, f"{kind}_token_id")).sum())
        given = 0 if absent else count(config, features[key])
        if placeholders != given:
            raise ValueError(
                f"input_ids have {placeholders} {kind} placeholder token(s), but the given {kind}s need {given}. "
                f"Process texts and {kind}s together, and pass everything that the processor returns."
            )
        pixels = features.get(pixel_key)
        if pixels is not None and not torch.isfinite(pixels).all():
            raise ValueError(f"{pixel_key} has NaN or infinite values. Check the {kind} given to the processor.")
    grids = [key for *_, key, _ in counted if key.endswith("grid_thw") and features.get(key) is not None]
    needed = dict.fromkeys(["mm_token_type_ids"] if grids else [], " and ".join(grids))
    if config.model_type == "qwen2_5_vl" and "video_grid_thw" in grids:
        needed["second_per_grid_ts"] = "video_grid_thw"
    if config.model_type == "lfm2_vl" and features.get("pixel_values") is not None:
        needed["pixel_attention_mask"] = "pixel_values"
    for name, present in needed.items():
        if features.get(name) is None:
            raise ValueError(f"{present} was given without {name}. Pass everything that the processor returns.")
