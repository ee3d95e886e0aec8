"""What clients of the server send: OpenAI's embeddings request with vLLM's `messages`, and reading the inputs in it.

Nothing in a request is opened: no file, and no address but `data:`. Text is never taken for a file or a special token.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from btok_hf.inputs import ImageLimits, check_input

# Pillow reads more, also formats that run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class _Strict(BaseModel):
    """A field that would be ignored is an error: the client wants something that it would not get."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Address(_Strict):
    """Where an image or video is: `data:…;base64,…`. `detail` is OpenAI's and has no meaning here."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Strict):
    """A video of a message: its frames as images, two per second, `data:video/jpeg;base64,FRAME,FRAME,…`."""

    type: Literal["video_url"]
    video_url: Address


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """A system message, which is the instruction, or the user's message, which is the input."""

    role: Literal["system", "user"]
    content: str | list[Part]

    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class EmbeddingRequest(_Strict):
    """The body of `POST /v1/embeddings`: `input` (texts) or `messages` (one row of texts, images, videos).

    `prompt_name` names one of the model's instructions; `input_type` is the same for `query` and `document`.
    """

    input: str | list[str] | None = None
    messages: list[Message] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    user: str | None = None
    add_generation_prompt: Literal[False] = False  # vLLM's clients write it

    @model_validator(mode="before")
    @classmethod
    def _no_token_ids(cls, body: Any) -> Any:
        given = body.get("input") if isinstance(body, Mapping) else None
        if isinstance(given, list) and any(isinstance(part, (int, list)) for part in given):
            raise ValueError(
                "lists of token ids are not accepted in 'input': ids of another tokenizer would be other words. Send "
                "texts (LangChain: check_embedding_ctx_length=False)"
            )
        return body

    @model_validator(mode="after")
    def _one_source(self) -> "EmbeddingRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either 'input' or 'messages'")
        if self.input_type is not None and self.prompt_name is not None:
            raise ValueError("give either 'prompt_name' or 'input_type', not both")
        if self.messages is not None:
            roles = [message.role for message in self.messages]
            if roles not in (["user"], ["system", "user"]):
                raise ValueError(f"'messages' must be one user message, or a system and a user message, got {roles}")
        return self

    def instruction(self) -> str | None:
        """The text of the system message; `None` without one.

        Raises:
            ValueError: It has media.
        """
        if self.messages is None or self.messages[0].role != "system":
            return None
        parts = self.messages[0].parts()
        if not all(isinstance(part, TextPart) for part in parts):
            raise ValueError("the system message must be text; put images and videos into the user message")
        return " ".join(part.text for part in parts if isinstance(part, TextPart))

    def rows(self, limits: ImageLimits, most_pixels: int) -> list[Any]:
        """The checked inputs: decoded media, and texts.

        Args:
            limits (`ImageLimits`): Those of the model's processor.
            most_pixels (`int`): Most pixels of an image, and of all frames of a video.

        Raises:
            ValueError: An input that cannot be embedded. The message has its place and what is wrong.
        """
        if self.messages is not None:
            return [check_input(_item(self.messages[-1], most_pixels), limits)]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        return [check_input({"text": text}, limits, place) for place, text in enumerate(texts)]

    def count(self) -> int:
        """The number of rows."""
        return len(self.input) if isinstance(self.input, list) else 1


def _item(message: Message, most_pixels: int) -> dict[str, Any]:
    """The input dict of a user message. It is one row: images, videos, texts."""
    item: dict[str, list[Any]] = {}
    for part in message.parts():
        if isinstance(part, TextPart):
            item.setdefault("text", []).append(part.text)
        elif isinstance(part, VideoPart):
            payloads = _payload(part.video_url.url, "video/jpeg").split(",")
            frames = [_open(payload, most_pixels)[0] for payload in payloads]
            if sum(frame.width * frame.height for frame in frames) > most_pixels:
                raise ValueError(f"a video has more than {most_pixels} pixels in all (--max-image-pixels)")
            item.setdefault("video", []).append(frames)
        else:
            if "video" in item:
                raise ValueError("images must come before videos in a message, because the row holds them in order")
            _, content = _open(_payload(part.image_url.url, "image/"), most_pixels)
            item.setdefault("image", []).append({"bytes": content, "path": None})
    if not item:
        raise ValueError("the user message is empty")
    return item


def _payload(url: str, kind: str) -> str:
    """The base64 text of a `data:` address."""
    head, comma, payload = url.partition(",")
    if not head.startswith(f"data:{kind}") or not head.endswith(";base64") or not comma:
        raise ValueError(
            f"an address must be data:{kind}…;base64,…, got {url[:40]!r}: this server opens no files and no other "
            "addresses. Send the content itself; of a video, its frames as JPEG or PNG, separated by commas"
        )
    return payload


def _open(payload: str, most_pixels: int) -> tuple[Image.Image, bytes]:
    """An image whose size is known but whose pixels are not decoded yet, and its file."""
    try:
        content = base64.b64decode(payload, validate=True)
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (binascii.Error, UnidentifiedImageError, ValueError, OSError, SyntaxError) as error:
        raise ValueError(f"an image is not one of {', '.join(FORMATS)} in base64") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image has more than {most_pixels} pixels (--max-image-pixels)") from error
    if image.width * image.height > most_pixels:
        raise ValueError(
            f"an image of {image.width} x {image.height} has more than {most_pixels} pixels (--max-image-pixels). "
            "Reduce it"
        )
    return image, content
