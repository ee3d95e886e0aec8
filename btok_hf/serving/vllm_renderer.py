"""How vLLM makes rows of requests for a model with Bottleneck Tokens. Runs in the server's own process.

A request is refused here, before the engine sees it: an error in the engine would stop it, and a vector of NaN would
pass for a vector in base64.
"""

import io
from dataclasses import replace
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaWithBytes
from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer

from btok_hf.media import as_rgb, frames_as_rgb, video_input
from btok_hf.serving.vllm_plugin import FPS


class BTokRenderer(HfRenderer):
    """The stock renderer. Plain texts go through the chat template, and every row must end in the K tokens."""

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
        mm_data = dict(mm_data)
        for kind, read in (("image", _read_image), ("video", _read_video)):
            if isinstance(items := mm_data.get(kind), (list, tuple, MediaWithBytes, Image.Image)):
                mm_data[kind] = [read(item) for item in items] if isinstance(items, list) else read(items)
        return super()._process_multimodal(prompt, mm_data, *args, **kwargs)

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
        held = sum(ids.count(token) for token in tokens)
        if list(ids[-len(tokens) :]) != list(tokens) or held != len(tokens):
            raise VLLMValidationError(
                f"An input must end in the {len(tokens)} Bottleneck Token(s) {tokens} and have none elsewhere, got "
                f"{held} in {len(ids)} tokens that end in {list(ids[-len(tokens) :])}. Send a text or messages "
                "without a chat template or add_generation_prompt. Shorten it, or set truncation_side to left, if it "
                "is too long.",
                parameter="input",
            )
        # The library refuses it too. With Qwen3.5 on a CPU, a row of one token would end vLLM's engine.
        if len(ids) == len(tokens):
            raise VLLMValidationError(
                "An input is empty: nothing but its Bottleneck Tokens. Remove it or fill it.", parameter="input"
            )
        # Some families have no videos, or count them as rows of images.
        placeholders = {config.image_token_id, getattr(config, "video_token_id", config.image_token_id)}
        if row["type"] == "token" and placeholders & set(ids):
            raise VLLMValidationError(
                "The token ids have placeholders of images or videos, but none were sent. Send messages to "
                "/v1/embeddings.",
                parameter="input",
            )
        return row


def _for_media(prompt: Any, params: Any) -> Any:
    """Do not cut a prompt with media yet: vLLM cuts again when they have all their tokens, and refuses to cut them."""
    return replace(params, truncate_prompt_tokens=None) if prompt.get("multi_modal_data") else params


def _read_image(item: Any) -> Any:
    """An image with more than 8 bits a colour, which vLLM clips to 255, as this library reads it."""
    sent = isinstance(item, MediaWithBytes)
    image = Image.open(io.BytesIO(item.original_bytes)) if sent else item
    if not isinstance(image, Image.Image) or not image.mode.startswith(("I", "F")):
        return item
    # The last argument tells vLLM's cache that these are not the pixels that it would read itself.
    return MediaWithBytes(as_rgb(image), item.original_bytes, {"image_mode": "btok"}) if sent else as_rgb(image)


def _read_video(item: Any) -> Any:
    """A video of one frame, which is there twice in this library."""
    video = item.media if isinstance(item, MediaWithBytes) else item
    if not isinstance(video, tuple) or len(video[0]) != 1:
        return item
    frames, metadata = video[0], video[1] or {}
    doubled = video_input(frames_as_rgb(frames), metadata.get("fps", FPS))
    video = doubled["array"], {**metadata, **doubled["video_metadata"]}
    return MediaWithBytes(video, item.original_bytes) if isinstance(item, MediaWithBytes) else video


def _message(prompt: Any) -> list[Any]:
    return [{"role": "user", "content": prompt["prompt"]}]
