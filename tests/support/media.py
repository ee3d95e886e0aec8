"""Random images and videos."""

import numpy as np
from PIL import Image


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
