import os

# Before anything of Hugging Face is imported: tests never touch the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import btok_hf


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Plain random checkpoints, by backbone."""
    folder = tmp_path_factory.mktemp("bases")
    return {backbone: tiny.build(backbone, folder / backbone) for backbone in tiny.BACKBONES}


@pytest.fixture(scope="session")
def repos(bases, tmp_path_factory):
    """The same with K = 4 Bottleneck Tokens; noise tells their rows apart, so that mix-ups show."""
    folder = tmp_path_factory.mktemp("repos")
    return {
        backbone: str(
            btok_hf.add_bottleneck_tokens(base, folder / backbone, noise_std=1.0, prompts={"query": "Find it."})
        )
        for backbone, base in bases.items()
    }


@pytest.fixture(scope="session")
def repo(repos):
    return repos["qwen2_vl"]


def image(width, height, seed=0):
    rng = np.random.default_rng([width, height, seed])
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def video(frames=4, size=56, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "array": rng.integers(0, 255, (frames, size, size, 3), dtype=np.uint8),
        "video_metadata": {
            "fps": 2.0,
            "total_num_frames": frames,
            "duration": frames / 2,
            "frames_indices": list(range(frames)),
        },
    }


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
