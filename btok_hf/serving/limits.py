"""The bounds of `btok serve`. Each field of `Limits` is also a flag, with the same default."""

import math
from dataclasses import dataclass, field, fields
from typing import Any


def _bound(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Limits:
    """Bounds of the server. `queue_*` bound all requests together: what exceeds them is answered with 429.

    A pixel takes three bytes while its request waits, and more while it is decoded (docs/experiments.md, 2026-11-28).
    The time of a request is from its first byte to its answer.

    Raises:
        ValueError: A bound that is not above 0 and finite, or a request that would never fit.
    """

    max_rows: int = _bound(256, "most rows of a request")
    queue_rows: int = _bound(1024, "most rows of all requests together")
    batch_rows: int = _bound(64, "most rows of a batch")
    max_text: int = _bound(2_000_000, "most characters of the texts of a request")
    max_body: int = _bound(32 * 2**20, "most bytes of a request, and of what it names")
    queue_body: int = _bound(512 * 2**20, "most bytes of all requests together")
    max_image_pixels: int = _bound(100_000_000, "most pixels of all images and frames of a request")
    queue_pixels: int = _bound(500_000_000, "most pixels of all requests together")
    timeout: float = _bound(60.0, "most seconds of a request")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}.")
        for name in ("rows", "body", "image_pixels"):
            single, total = f"max_{name}", f"queue_{name.removeprefix('image_')}"
            if (asked := getattr(self, single)) > (most := getattr(self, total)):
                raise ValueError(
                    f"{single}={asked} is above {total}={most}: such a request would never fit. Raise {total}, or "
                    f"lower {single}."
                )


def add_limits(parser: Any) -> None:
    """Add a flag for each bound to an `argparse.ArgumentParser`."""
    for bound in fields(Limits):
        parser.add_argument(
            f"--{bound.name.replace('_', '-')}",
            type=type(bound.default),
            default=bound.default,
            help=f"{bound.metadata['meaning']} (default: %(default)s)",
        )
