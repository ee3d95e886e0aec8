"""Video files as vLLM reads them with the plugin. `make test-vllm` compares the vectors."""

import numpy as np
import pytest
from support.pictures import MEDIA

from btok_hf import read_video
from btok_hf.serving.vllm_video import BTokVideoLoader


def test_a_file_has_the_frames_of_read_video():
    frames, metadata = BTokVideoLoader.load_bytes((MEDIA / "rotated.mp4").read_bytes(), num_frames=-1, fps=2.0)
    expected = read_video(MEDIA / "rotated.mp4")
    np.testing.assert_array_equal(frames, expected["array"])
    assert {key: metadata[key] for key in expected["video_metadata"]} == expected["video_metadata"]


def test_what_is_no_video_is_refused():
    with pytest.raises(ValueError, match="The video cannot be decoded"):
        BTokVideoLoader.load_bytes(b"nothing")
