"""Bottleneck-Token models in mteb, with images and videos.

mteb encodes what a model's metadata list as its modalities and drops everything else; `mteb_meta` lists text, image
and video. What mteb measures with it is not MMEB: that is `btok_hf.evaluation.mmeb`.
"""

import json
from pathlib import Path

import torch
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_meta import ScoringFunction
from transformers import AutoConfig
from transformers.utils import cached_file

from btok_hf.sentence_transformer import BTokSentenceTransformer

# As MMEB-V2 takes them. By default mteb takes two per second, however long a video is.
NUM_FRAMES = 8


def mteb_meta(repo, revision=None):
    """Metadata with which mteb loads and evaluates a repository: `mteb.evaluate(mteb_meta(repo), tasks)`.

    mteb wants torchcodec for every model that takes videos (`pip install 'mteb[image,video]'`), and FFmpeg's libraries
    once it decodes one.

    Args:
        repo (`str`): Folder or Hub id of a repository with Bottleneck Tokens.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        `mteb.ModelMeta`: With the modalities text, image and video. What the repository does not say is unknown.

    Raises:
        OSError, ValueError: The repository cannot be read, or has no Bottleneck Tokens.
    """
    config = AutoConfig.from_pretrained(repo, revision=revision)
    if not getattr(config, "btok_token_ids", None):
        raise ValueError(f"{repo} has no Bottleneck Tokens. Give mteb the name of such a model itself.")
    saved = json.loads(Path(cached_file(repo, "config_sentence_transformers.json", revision=revision)).read_text())
    return ModelMeta.create_empty(
        {
            "loader": _load,
            "name": str(repo),
            "revision": revision,
            "embed_dim": config.get_text_config().hidden_size,
            "max_tokens": config.get_text_config().max_position_embeddings,
            "open_weights": True,
            "framework": ["Sentence Transformers", "PyTorch", "safetensors"],
            "reference": None if Path(repo).exists() else f"https://huggingface.co/{repo}",
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": any(saved["prompts"].values()),
            "adapted_from": getattr(config, "btok_base_model", None),
            "modalities": ["text", "image", "video"],
        }
    )


def _load(name, revision=None, device=None, **kwargs):
    model = _Model(name, revision=revision, device=device)
    return SentenceTransformerEncoderWrapper(model, **{"num_frames": NUM_FRAMES, **kwargs})


class _Model(BTokSentenceTransformer):
    """Keeps every frame that mteb chose: from frames without a rate, the processor of Qwen3-VL takes half."""

    def encode(self, inputs, *args, **kwargs):
        return super().encode([_with_rate(item) for item in inputs], *args, **kwargs)


def _with_rate(item):
    if not isinstance(item, dict) or not isinstance(item.get("video"), torch.Tensor):
        return item
    frames = item["video"].permute(0, 2, 3, 1).numpy()  # the rate is that of `read_frames`
    metadata = {"fps": 2.0, "total_num_frames": len(frames), "duration": len(frames) / 2}
    return {
        **item,
        "video": {"array": frames, "video_metadata": {**metadata, "frames_indices": [*range(len(frames))]}},
    }
