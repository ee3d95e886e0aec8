"""Bounds of the server. `test_cli.py` sets each by its flag."""

import math

import pytest

from btok_hf.serving.limits import Limits


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_rows": 0},
        {"timeout": -1.0},
        {"timeout": math.inf},
        {"max_rows": 9, "queue_rows": 8},
        {"max_image_pixels": 10**9},
        {"max_body": 2**30},
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds):
    with pytest.raises(ValueError, match=next(iter(bounds))):
        Limits(**bounds)
