"""Models to evaluate: loaded, tried on what MMEB-V2 asks of them, and described for the report."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers.utils import cached_file

from btok_hf.arguments import check_pixels
from btok_hf.evaluation.embeddings import installed
from btok_hf.media import video_input
from btok_hf.sentence_transformer import BTokSentenceTransformer

SIDE, FRAMES = 112, 8  # pixels and frames of what a model is tried with; some take no clip that is shorter


def load_model(
    repo: Path | str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    max_pixels: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Load a model to evaluate. A model with Bottleneck Tokens gets this library's wrapper, which encodes unpadded.

    Args:
        repo (`str` or `Path`): Folder or Hub id of a Sentence-Transformers model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dtype (`str`): Precision to load in. Default: the checkpoint's.
        max_pixels (`int`, *optional*): Larger images and frames are reduced to this many pixels. Default: the model's.
        device (`str`, *optional*): Device to load it on. Default: the choice of Sentence-Transformers.
        trust_remote_code (`bool`): Run code of the repository. Models with Bottleneck Tokens need none.

    Returns:
        `SentenceTransformer`: The model.

    Raises:
        ValueError: `max_pixels` below 1, or for a model whose processor bounds images in another way.
    """
    check_pixels({"max_pixels": max_pixels})
    config = cached_file(repo, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    with_tokens = config is not None and "btok_token_ids" in json.loads(Path(config).read_text("utf-8"))
    model_class = BTokSentenceTransformer if with_tokens else SentenceTransformer
    model = model_class(
        str(repo),
        revision=revision,
        device=device,
        model_kwargs={"dtype": dtype},
        processor_kwargs={} if max_pixels is None else {"max_pixels": max_pixels},
        trust_remote_code=trust_remote_code,
    )
    # Processors of other families keep the argument and do not use it.
    if max_pixels is not None and not with_tokens and _image_size(model).get("longest_edge") != max_pixels:
        raise ValueError(
            f"max_pixels has no effect on {repo}: its processor sizes images by {_image_size(model)}. Leave it out."
        )
    return model


def check_inputs(model: SentenceTransformer, modalities: Collection[str], prompt: str | None) -> None:
    """Try a model on what MMEB-V2 consists of: an image, page or clip with a text.

    Args:
        model (`SentenceTransformer`): The model.
        modalities (`Collection[str]`): Those that are evaluated: `image`, `video`, `visdoc`.
        prompt (`str`, *optional*): Instruction before every input.

    Raises:
        ValueError: It cannot embed one of them together with a text.
    """
    picture = Image.new("RGB", (SIDE, SIDE), "gray")
    media: dict[str, Any] = {}
    if {"image", "visdoc"} & set(modalities):
        media["image"] = picture
    if "video" in modalities:
        media["video"] = video_input(np.stack([np.asarray(picture)] * FRAMES), 2.0)
    for kind, content in media.items():
        item: Any = {kind: content, "text": "What is it?"}
        try:
            model.encode([item], prompt=prompt, show_progress_bar=False)
        except (LookupError, TypeError, ValueError) as error:  # of a Router, without a route for them
            raise ValueError(
                f"The model cannot embed a text together with {'an image' if kind == 'image' else 'a video'}, which "
                f"MMEB-V2 asks for: {str(error).rstrip('.')}. Choose other modalities, or evaluate a function that "
                "combines them."
            ) from error


def name_of(model: SentenceTransformer) -> str:
    """The name of a model in reports: that of its repository."""
    return re.sub(r".*/(?=.)", "", str(model.config.name_or_path).rstrip("/")) if model.config is not None else "model"


def settings_of(model: SentenceTransformer) -> dict[str, Any]:
    """What a reader of the scores needs to repeat them, apart from the weights."""
    limits = getattr(model[0], "image_limits", None)  # of a model with Bottleneck Tokens
    return {
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"image_size": _image_size(model)} if limits is None else {"max_pixels": limits.max_pixels}),
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "versions": installed(),
    }


def metadata_of(model: SentenceTransformer) -> dict[str, Any]:
    """The fields of the leaderboard that can be read from a model."""
    return {
        "model_backbone": getattr(model.config, "btok_base_model", None) or getattr(model.config, "model_type", None),
        "model_size": round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2),
        "max_length_tokens": model.max_seq_length,
    }


def _image_size(model: SentenceTransformer) -> dict[str, int]:
    """How the processor of a model bounds images, in the terms of its family."""
    size = getattr(getattr(getattr(model[0], "processor", None), "image_processor", None), "size", None)
    return {name: value for name, value in dict(size or {}).items() if value is not None}
