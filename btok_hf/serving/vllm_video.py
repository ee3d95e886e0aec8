"""How vLLM reads video files for a model with Bottleneck Tokens: as `read_video` does, for the same vectors."""

import io
from typing import Any

import numpy as np

from btok_hf.serving import MODE
from btok_hf.video import read_video


class BTokVideoLoader:
    """What vLLM calls a video backend. Videos that are sent as frames do not come here."""

    @staticmethod
    def load_bytes(data: bytes, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """The frames of a video file and their metadata.

        Args:
            data (`bytes`): The file.
            kwargs: What other backends take. `vllm_plugin.py` refuses all that would choose other frames.

        Raises:
            ValueError: It is no video that can be decoded.
        """
        video = read_video(io.BytesIO(data))
        # The processor of Qwen3-VL chooses among the frames, in every other loader as well.
        metadata = {**video["video_metadata"], "video_backend": MODE, "do_sample_frames": True}
        return video["array"], metadata
