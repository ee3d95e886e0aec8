"""How vLLM makes rows of requests for a model with Bottleneck Tokens. Runs in the server's own process.

A request is refused here, before the engine sees it: an error in the engine would stop it, and a vector of NaN would
pass for a vector in base64.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MediaWithBytes
from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer

from btok_hf.lengths import suffix_ids
from btok_hf.media import array_as_rgb, as_rgb, frames_as_rgb, video_input
from btok_hf.serving import MODE
from btok_hf.serving.vllm_plugin import FPS, options_of_videos, unwanted_token, way_out


class BTokRenderer(HfRenderer):
    """The stock renderer. Plain texts go through the chat template, and every row must end in the K tokens.

    With a suffix, its words must stand before them.
    """

    @cached_property
    def _end(self) -> list[int]:
        """The tokens that every row ends in."""
        config = self.model_config.hf_config
        return [*suffix_ids(self.get_tokenizer(), config), *config.btok_token_ids]

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        """As in vLLM, with the parts of a message as the template takes them: as parts, and not as one text."""
        return super().render_messages(messages, replace(params, chat_template_content_format="openai"))

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        """See `render_messages`."""
        params = replace(params, chat_template_content_format="openai")
        return await super().render_messages_async(messages, params)

    def render_prompt(self, prompt: Any) -> Any:
        """A prompt of text alone, put into the chat template. One with media or token ids has been through it."""
        if self._is_plain_text(prompt):
            return self.render_messages(_message(prompt), ChatParams())[1]
        return super().render_prompt(prompt)

    async def _render_prompt_async(self, prompt: Any) -> Any:
        if self._is_plain_text(prompt):
            return (await self.render_messages_async(_message(prompt), ChatParams()))[1]
        return await super()._render_prompt_async(prompt)

    @staticmethod
    def _is_plain_text(prompt: Any) -> bool:
        return (
            isinstance(prompt, dict)
            and "prompt" in prompt
            and not prompt.keys() & {"prompt_token_ids", "multi_modal_data"}
        )

    def _tokenize_singleton_prompt(self, prompt: Any, params: Any) -> Any:
        return super()._tokenize_singleton_prompt(prompt, _for_media(prompt, params))

    async def _tokenize_singleton_prompt_async(self, prompt: Any, params: Any) -> Any:
        return await super()._tokenize_singleton_prompt_async(prompt, _for_media(prompt, params))

    # vLLM calls it for both of the paths above, in a thread.
    def _process_multimodal(self, prompt: Any, mm_data: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_options(kwargs.get("media_io_kwargs") or {}, kwargs.get("mm_processor_kwargs"))
        mm_data = dict(mm_data)
        for kind, is_item, read in (("image", _is_image, _read_image), ("video", _is_video, _read_video)):
            items = mm_data.get(kind)
            # A dict or a tensor of three axes holds embeddings.
            if is_item(items):
                mm_data[kind] = [read(items)]
            elif isinstance(items, (list, tuple, np.ndarray)):
                mm_data[kind] = [read(item) if is_item(item) else item for item in items]
        return super()._process_multimodal(prompt, mm_data, *args, **kwargs)

    def _check_options(self, reading: Mapping[str, Any], processor: Any) -> None:
        """Raise `VLLMValidationError` for options of a request that choose other frames, sizes or colours.

        The server's own are checked at its start (`vllm_plugin.py`). They come with those of a request.
        """
        own = self.model_config.multimodal_config.media_io_kwargs
        changed = [kind for kind in ("image", "video") if reading.get(kind, own.get(kind)) != own.get(kind)]
        given = [f"media_io_kwargs for {kind}s" for kind in changed]
        options = options_of_videos(processor, self.model_config.hf_config.model_type)
        given += [f"{name} in mm_processor_kwargs" for name in options]
        if given:
            raise VLLMValidationError(
                f"A model with Bottleneck Tokens needs images and videos as the library reads them, but "
                f"{', '.join(given)} would change the vector. {way_out(options)}",
                parameter="media_io_kwargs" if changed else "mm_processor_kwargs",
            )

    # vLLM calls it when media have all their tokens. It would let the start of a row be cut up to its first image,
    # without the token that stands before the image.
    def _truncate_expanded_prompt(self, engine_input: Any, params: Any) -> None:
        if engine_input["type"] != "multimodal" or params is None:
            return
        length = len(engine_input["prompt_token_ids"])
        if params._truncation_slice(self.tokenizer, length) is not None:
            limit = params.truncate_prompt_tokens
            raise VLLMValidationError(
                f"A row with images or videos is not cut, and this one has {length} tokens, more than "
                f"{limit if limit >= 0 else params.max_truncation_tokens} (truncate_prompt_tokens). Shorten its text, "
                "send fewer or smaller images, or raise the limit.",
                parameter="truncate_prompt_tokens",
            )

    def process_for_engine(self, *args: Any, **kwargs: Any) -> Any:
        """The row that goes to the engine. Raises `VLLMValidationError` if it does not end in the K tokens."""
        return self._checked(super().process_for_engine(*args, **kwargs))

    async def process_for_engine_async(self, *args: Any, **kwargs: Any) -> Any:
        """See `process_for_engine`."""
        return self._checked(await super().process_for_engine_async(*args, **kwargs))

    def _checked(self, row: Any) -> Any:
        config = self.model_config.hf_config
        ids, tokens = row.get("prompt_token_ids"), config.btok_token_ids
        if ids is None:
            raise VLLMValidationError(
                "A model with Bottleneck Tokens cannot embed prompt_embeds. Send texts, or messages.",
                parameter="prompt_embeds",
            )
        held, end = sum(ids.count(token) for token in tokens), list(ids[-len(self._end) :])
        if end != self._end or held != len(tokens):
            words = " after the words of the suffix" if len(end) > len(tokens) else ""
            raise VLLMValidationError(
                f"An input must end in the {len(tokens)} Bottleneck Token(s) {tokens}{words} and have none elsewhere, "
                f"got {held} in {len(ids)} tokens that end in {end}, not in {self._end}. Send a text or messages "
                "without a chat template or add_generation_prompt. Shorten it, or set truncation_side to left, if it "
                "is too long.",
                parameter="input",
            )
        # The library refuses it too. With Qwen3.5 on a CPU, a row of one token would end vLLM's engine.
        if len(ids) == len(end):
            raise VLLMValidationError(
                "An input is empty: nothing but the suffix and the Bottleneck Tokens of every row. Remove it or fill "
                "it, or raise truncate_prompt_tokens.",
                parameter="input",
            )
        if unwanted_token(config) in ids:
            raise VLLMValidationError(
                "An input has a token that the tokenizer alone puts before it, and the model was trained without. "
                "Leave add_special_tokens out, and that token out of token ids.",
                parameter="input",
            )
        # Some families have no videos, or count them as rows of images.
        placeholders = {config.image_token_id, getattr(config, "video_token_id", config.image_token_id)}
        rest = list(ids)
        for places in (row.get("mm_placeholders") or {}).values():
            for place in places:
                rest[place.offset : place.offset + place.length] = [None] * place.length
        if placeholders & set(rest):
            raise VLLMValidationError(
                "The row has more placeholders of images or videos than images and videos that were sent. Send "
                "messages to /v1/embeddings, or one item for each placeholder.",
                parameter="input",
            )
        return row


def _for_media(prompt: Any, params: Any) -> Any:
    """Do not cut a prompt with media yet: vLLM cuts again when they have all their tokens, and refuses to cut them."""
    return replace(params, truncate_prompt_tokens=None) if prompt.get("multi_modal_data") else params


def _is_image(item: Any) -> bool:
    return isinstance(item, (MediaWithBytes, Image.Image)) or (isinstance(item, np.ndarray) and item.ndim == 3)


def _is_video(item: Any) -> bool:
    """Whether this is one video: frames, or a pair of frames and their metadata. Not so a list of videos."""
    if isinstance(item, tuple):
        return len(item) == 2 and (item[1] is None or isinstance(item[1], dict))
    if isinstance(item, list):
        return bool(item) and all(isinstance(one, Image.Image) or getattr(one, "ndim", 0) == 3 for one in item)
    return isinstance(item, MediaWithBytes) or getattr(item, "ndim", 0) == 4


def _differs(image: Image.Image) -> bool:
    """Whether vLLM takes other colours from an image than this library.

    It clips more than 8 bits a colour to 255, and shows the transparent colour of RGB files.
    """
    return image.mode.startswith(("I", "F")) or image.has_transparency_data


def _read_image(item: Any) -> Any:
    """An image as this library reads it."""
    if isinstance(item, np.ndarray):
        return array_as_rgb(item)
    sent = isinstance(item, MediaWithBytes)
    image = open_image(io.BytesIO(item.original_bytes)) if sent else item
    if not _differs(image):
        return item
    # The last argument tells vLLM's cache that these are not the pixels that it would read itself.
    return MediaWithBytes(as_rgb(image), item.original_bytes, {"image_mode": MODE}) if sent else as_rgb(image)


def _read_video(item: Any) -> Any:
    """A video as this library reads it: colours as of images, a single frame twice, two frames a second by default.

    Files were read by `vllm_video.py` and stay as they are.
    """
    sent = isinstance(item, MediaWithBytes)
    video = item.media if sent else item
    frames, metadata = video if isinstance(video, tuple) else (video, None)
    metadata = metadata or {}
    changed = not sent  # an array or a list of images, of a program that runs vLLM in its own process
    if sent and metadata.get("video_backend") == "jpeg_sequence":
        images = [open_image(io.BytesIO(base64.b64decode(frame))) for frame in item.original_bytes.split(b",")]
        if changed := any(map(_differs, images)):
            frames = images
    if not changed and len(frames) > 1:
        return item
    array = frames_as_rgb(frames)
    own = video_input(array, metadata.get("fps", FPS))["video_metadata"]
    metadata = {**own, **metadata} if len(array) == len(frames) else {**metadata, **own}
    video = array, metadata
    return MediaWithBytes(video, item.original_bytes) if sent else video


def _message(prompt: Any) -> list[Any]:
    return [{"role": "user", "content": prompt["prompt"]}]
