"""What clients of the server send: OpenAI's embeddings request with vLLM's `messages`, and reading the inputs in it.

Text is never taken for a file or a special token. What media may be opened is in `origins.py`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from btok_hf.inputs import ImageLimits, check_input, read_text
from btok_hf.serving.origins import FRAMES, WEB, Origins, Reserve

MOST_PARTS = 4096  # of a message, and frames of its videos; a request of --max-body could hold a million


class _Strict(BaseModel):
    """A field that would be ignored is an error: the client wants something that it would not get."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # pydantic reports each of a million unknown fields, which takes minutes and gigabytes. Lists have `fail_fast`.
    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, body: Any) -> Any:
        if isinstance(body, Mapping) and len(body) > len(cls.model_fields):
            unknown = next(name for name in body if name not in cls.model_fields)
            raise ValueError(f"{unknown!r} is no field; there are {', '.join(cls.model_fields)}")
        return body


class Address(_Strict):
    """Where an image or video is (`Origins`). `detail` is OpenAI's and has no meaning here."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_text(cls, body: Any) -> Any:
        if isinstance(body, str):
            raise ValueError('an address is {"url": "…"}, got a text')
        return body


class TextPart(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Strict):
    """A video of a message: a file, or its frames."""

    type: Literal["video_url"]
    video_url: Address


def _check_empty(settings: dict[str, Any]) -> dict[str, Any]:
    if settings:
        raise ValueError("no settings are taken here: leave it out")
    return settings


Empty = Annotated[dict[str, Any], AfterValidator(_check_empty)] | None
Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """A system message, which is the instruction, or the user's message, which is the input.

    `developer` is OpenAI's newer name of `system`.
    """

    role: Annotated[Literal["system", "user"], BeforeValidator(lambda role: "system" if role == "developer" else role)]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]

    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class _WithoutEffect(_Strict):
    """What clients of vLLM write, with the values that change nothing here. Other values are refused by name."""

    add_generation_prompt: Literal[False] = False
    continue_final_message: Literal[False] = False
    add_special_tokens: bool = False  # tokenizers of Qwen add none
    chat_template: None = None
    chat_template_kwargs: Empty = None
    mm_processor_kwargs: Empty = None
    media_io_kwargs: Empty = None
    truncate_prompt_tokens: Literal[-1] | None = None
    truncation_side: Literal["left"] | None = None
    padding: Literal["do_not_pad"] | None = None
    use_activation: Literal[True] | None = None
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    priority: Literal[0] = 0
    cache_salt: str | None = None
    request_id: str | None = None
    user: str | None = None


class EmbeddingRequest(_WithoutEffect):
    """The body of `POST /v1/embeddings`: `input` (texts) or `messages` (one row of texts, images, videos).

    `prompt_name` names one of the model's instructions; `input_type` is the same for `query` and `document`.
    """

    input: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None  # as `float`
    dimensions: int | None = None
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_texts(cls, body: Any) -> Any:
        given = body.get("input") if isinstance(body, Mapping) else None
        if not isinstance(given, list):
            return body
        values = (value for part in given for value in (part if isinstance(part, list) else [part]))
        other = next((value for value in values if not isinstance(value, str)), None)
        if isinstance(other, Mapping):
            raise ValueError("'input' takes texts: put chats into 'messages', one a request")
        if isinstance(other, int):
            raise ValueError(
                "lists of token ids are not accepted in 'input': ids of another tokenizer would be other words. Send "
                "texts (LangChain: check_embedding_ctx_length=False)"
            )
        if any(isinstance(part, list) for part in given):
            raise ValueError("'input' takes a text or one list of texts, got a list of lists: send their texts in one")
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
            ValueError: It has media, or half a character.
        """
        if self.messages is None or self.messages[0].role != "system":
            return None
        parts = self.messages[0].parts()
        if not all(isinstance(part, TextPart) for part in parts):
            raise ValueError("the system message must be text; put images and videos into the user message")
        return read_text(" ".join(part.text for part in parts if isinstance(part, TextPart)))

    def reads_slowly(self) -> bool:
        """Whether reading the inputs waits for other servers, or decodes videos."""
        parts = [part for message in self.messages or [] for part in message.parts()]
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        videos = [part.video_url.url for part in parts if isinstance(part, VideoPart)]
        return any(url.startswith(WEB) for url in images) or any(not url.startswith(FRAMES) for url in videos)

    def rows(self, limits: ImageLimits, origins: Origins, reserve: Reserve) -> list[Any]:
        """The checked inputs: texts and decoded media.

        Args:
            limits (`ImageLimits`): Those of the model's processor.
            origins (`Origins`): What may be opened, and bounds.
            reserve (`Callable`): Called with the pixels of each image or video (`Origins`). An error of it ends the
                reading.

        Raises:
            ValueError: An input that cannot be embedded. The message has its place and what is wrong.
        """
        if self.messages is not None:
            return [check_input(_read(self.messages[-1], origins, reserve), limits)]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        return [check_input({"text": text}, limits, place) for place, text in enumerate(texts)]

    def characters(self) -> int:
        """The number of characters of all texts."""
        if self.messages is None:
            return len(self.input or "") if not isinstance(self.input, list) else sum(map(len, self.input))
        parts = [part for message in self.messages for part in message.parts()]
        return sum(len(part.text) for part in parts if isinstance(part, TextPart))

    def count(self) -> int:
        """The number of rows."""
        return len(self.input) if isinstance(self.input, list) else 1


def _read(message: Message, origins: Origins, reserve: Reserve) -> dict[str, Any]:
    """A user message with the files of its images and videos, in their order."""
    content: list[dict[str, Any]] = []
    pixels = 0
    videos = [part.video_url.url for part in message.parts() if isinstance(part, VideoPart)]
    if (frames := sum(url.count(",") for url in videos if url.startswith(FRAMES))) > MOST_PARTS:
        raise ValueError(f"the videos of a request have {frames} frames, more than {MOST_PARTS}. Send fewer")
    for part in message.parts():
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
            continue
        value: Any
        if isinstance(part, ImagePart):
            file, size = origins.image(part.image_url.url, pixels, reserve)
            value = {"type": "image", "image": {"bytes": file, "path": None}}
        else:
            video, size = origins.video(part.video_url.url, pixels, reserve)
            value = {"type": "video", "video": video}
        content.append(value)
        pixels += size
    return {"role": message.role, "content": content}
