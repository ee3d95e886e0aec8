"""Run models with Bottleneck Tokens in mteb, with images and videos.

mteb encodes only the modalities that a model's metadata lists. `mteb_meta` lists text, image and video. MMEB-V2 is not
evaluated through mteb: see `mmeb.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_meta import ScoringFunction
from transformers import AutoConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from btok_hf.backbones import family_of
from btok_hf.media import video_input
from btok_hf.model_info import model_hash
from btok_hf.sentence_transformer import BTokSentenceTransformer

# Frames of a video, as in MMEB-V2. The default of mteb is two per second, however long a video is.
NUM_FRAMES = 8


def mteb_meta(repo: Path | str, revision: str | None = None) -> ModelMeta:
    """Metadata with which mteb loads and evaluates a repository: `mteb.evaluate(mteb_meta(repo), tasks)`.

    mteb requires torchcodec for models that take videos (`pip install 'mteb[image,video]'`), and FFmpeg's libraries to
    decode one. It keeps results by name and revision. So the revision is the commit on the Hub, or a hash of the
    files in a folder (`btok_hf.model_info.model_hash`).

    Args:
        repo (`str` or `Path`): Folder or Hub id of a repository with Bottleneck Tokens.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        `ModelMeta`: With the modalities text, image and, if the backbone takes it, video. Facts that the repository
            does not hold are unknown.

    Raises:
        OSError, ValueError: The repository cannot be read, or has no Bottleneck Tokens.
    """
    config = AutoConfig.from_pretrained(repo, revision=revision)
    if not getattr(config, "btok_token_ids", None):
        raise ValueError(f"{repo} has no Bottleneck Tokens. Pass its name to mteb directly.")
    path = cached_file(repo, "config_sentence_transformers.json", revision=revision)
    assert path is not None  # it raises if there is no such file
    saved = json.loads(Path(path).read_text())
    return ModelMeta.create_empty(
        {
            "loader": _load,
            "name": str(repo),
            "revision": model_hash(repo) if Path(repo).is_dir() else extract_commit_hash(path, None),
            "embed_dim": saved.get("truncate_dim") or config.get_text_config().hidden_size,
            "max_tokens": config.get_text_config().max_position_embeddings,
            "open_weights": True,
            "framework": ["Sentence Transformers", "PyTorch", "safetensors"],
            "reference": None if Path(repo).is_dir() else f"https://huggingface.co/{repo}",
            "similarity_fn_name": ScoringFunction(saved.get("similarity_fn_name") or "cosine"),
            "use_instructions": any(saved["prompts"].values()),
            "adapted_from": getattr(config, "btok_base_model", None),
            "modalities": ["text", "image", *(["video"] if family_of(config).video else [])],
        }
    )


def _load(
    name: str,
    revision: str | None = None,
    device: str | None = None,
    *,
    embed_dim: int | None = None,
    truncate_dim: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    model_prompts: dict[str, str] | None = None,
    num_frames: int = NUM_FRAMES,
) -> SentenceTransformerEncoderWrapper:
    """Called by `ModelMeta.load_model` with its arguments, which mteb keeps with the results."""
    model = _Model(
        name,
        revision=None if Path(name).is_dir() else revision,
        device=device,
        truncate_dim=embed_dim or truncate_dim,
        model_kwargs=model_kwargs,
        processor_kwargs=processor_kwargs,
    )
    return SentenceTransformerEncoderWrapper(model, model_prompts=model_prompts, num_frames=num_frames)


class _Model(BTokSentenceTransformer):
    """Keeps all frames that mteb chose, and reads no text as a file.

    Without a frame rate, the processor of Qwen3-VL drops half of the frames. A string is a text in mteb.
    """

    def encode(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().encode([_as_input(item) for item in inputs], *args, **kwargs)


def _as_input(item: Any) -> Any:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict) or not isinstance(item.get("video"), torch.Tensor):
        return item
    frames = item["video"].permute(0, 2, 3, 1).numpy()
    return {**item, "video": video_input(frames, fps=2.0)}  # as `read_frames` sets it
