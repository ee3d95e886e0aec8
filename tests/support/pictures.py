"""The same picture in many forms, and what a person sees in each. Computed with numpy, not with the library."""

import numpy as np
import torch
from PIL import Image

from support import ROOT

MEDIA = ROOT / "tests" / "data" / "media"


def colours(width=168, height=112):
    """A picture with large areas, as an array of shape (height, width, 3)."""
    y, x = np.mgrid[:height, :width] // 28
    return np.stack([x * 40 % 256, y * 70 % 256, (x + y) * 30 % 256], -1).astype(np.uint8)


def on_white(pixels, alpha):
    """Pixels with alpha (0 to 255) in front of white."""
    part = alpha[..., None] / 255
    return Image.fromarray(np.rint(pixels * part + 255 * (1 - part)).astype(np.uint8))


def forms(pixels=None):
    """Forms of one opaque picture, by name."""
    pixels = colours() if pixels is None else pixels
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return {
        "PIL": Image.fromarray(pixels),
        "RGBA": Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])),
        "height x width x 3": pixels,
        "3 x height x width": np.moveaxis(pixels, -1, 0),
        "floats from 0 to 1": pixels / 255,
        "ToTensor": tensor.float() / 255,
        "half": (tensor.float() / 255).half(),
        "bfloat16 to 255": tensor.bfloat16().round(),
        "float32 to 255": pixels.astype(np.float32),
        "int64": pixels.astype(np.int64),
        "uint16": pixels.astype(np.uint16) * 257,
        "dict": {"image": pixels},
        "list": {"image": [Image.fromarray(pixels)]},
        "message": [{"role": "user", "content": [{"type": "image", "image": pixels / 255}]}],
    }
