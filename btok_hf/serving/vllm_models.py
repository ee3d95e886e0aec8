"""Stock models of vLLM with the pooling of Bottleneck Tokens, and with the positions of transformers."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen2_5_VLModel, Qwen2VLModel
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.activations import PoolerNormalize
from vllm.model_executor.layers.pooler.seqwise import EmbeddingPoolerHead, SequencePooler
from vllm.model_executor.layers.pooler.seqwise.methods import SequencePoolingMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.idefics3 import Idefics3ForConditionalGeneration
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.lfm2_vl import Lfm2VLForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform


class BottleneckPool(SequencePoolingMethod):
    """The fp32 mean of the hidden states at the last K positions of each row.

    vLLM drops what is returned for a row that has not been run to its end. A row whose last step lacks some of its
    tokens gets NaN, because an error would end the engine. `vllm_plugin.py` refuses the settings that cut rows.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> torch.Tensor:
        """Pool the hidden states of all rows, of shape `(tokens, hidden)`, to `(rows, hidden)`."""
        cursor = pooling_metadata.get_pooling_cursor()
        back = torch.arange(self.num_tokens - 1, -1, -1, device=hidden_states.device)
        positions = cursor.last_token_indices_gpu[:, None] - back
        mean = hidden_states[positions.clamp(min=0)].float().mean(1)
        is_cut = positions[:, 0] < cursor.first_token_indices_gpu
        return mean.masked_fill(is_cut[:, None], float("nan"))


class WithBottleneckTokens:
    """Mixed into a stock model: its pooler."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        pool = BottleneckPool(len(vllm_config.model_config.hf_config.btok_token_ids))
        head = EmbeddingPoolerHead(head_dtype=torch.float32, activation=PoolerNormalize())
        self.pooler = DispatchPooler({"embed": SequencePooler(pool, head)})


class WithPositionsOfTransformers(WithBottleneckTokens):
    """The positions of the model that the golden vectors come from.

    After a video, transformers goes on at the larger side of a frame, and vLLM after the last frame (transformers
    #45381). They differ if a clip has more frames than a frame has rows and columns of tokens.
    """

    positions_of: Any  # the class in transformers

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = self.positions_of.__new__(self.positions_of)  # only its configuration is needed, no weights
        torch.nn.Module.__init__(model)
        model.config = vllm_config.model_config.hf_config
        self.get_rope_index = model.get_rope_index

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a row, of shape `(3, length)`, and what a next position would add to its index."""
        ids = torch.tensor([input_tokens])
        types = torch.zeros_like(ids)
        grids: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
        seconds = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            types[0, place.offset : place.offset + place.length] = 1 + (feature.modality == "video")
            grids[feature.modality].append(feature.data[f"{feature.modality}_grid_thw"].data)
            if feature.modality == "video" and "second_per_grid_ts" in feature.data:
                seconds.append(feature.data["second_per_grid_ts"].data.item())
        positions, delta = self.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=types,
            image_grid_thw=torch.stack(grids["image"]) if grids["image"] else None,
            video_grid_thw=torch.stack(grids["video"]) if grids["video"] else None,
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
        )
        return positions[:, 0], int(delta)


# Pooling by the mean is what vLLM runs without chunked prefill and prefix caching, which would cut rows.
@default_pooling_type(seq_pooling_type="MEAN")
class BTokQwen2VLForEmbedding(WithPositionsOfTransformers, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with Bottleneck Tokens."""

    positions_of = Qwen2VLModel


@default_pooling_type(seq_pooling_type="MEAN")
class BTokQwen2_5_VLForEmbedding(WithPositionsOfTransformers, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with Bottleneck Tokens."""

    positions_of = Qwen2_5_VLModel


@default_pooling_type(seq_pooling_type="MEAN")
class BTokQwen3VLForEmbedding(WithBottleneckTokens, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with Bottleneck Tokens. A frame is an image to its positions, so that vLLM and transformers agree."""


@default_pooling_type(seq_pooling_type="MEAN")
class BTokQwen3_5ForEmbedding(WithBottleneckTokens, Qwen3_5ForConditionalGeneration):
    """Qwen3.5 with Bottleneck Tokens. Positions as in Qwen3-VL; rows that are whole start from a state of zero."""


@default_pooling_type(seq_pooling_type="MEAN")
class BTokInternVLForEmbedding(WithBottleneckTokens, InternS1ForConditionalGeneration):
    """InternVL with Bottleneck Tokens, in the layout of transformers, whose class in vLLM is that of Intern-S1."""


@default_pooling_type(seq_pooling_type="MEAN")
class BTokIdefics3ForEmbedding(WithBottleneckTokens, Idefics3ForConditionalGeneration):
    """SmolVLM with Bottleneck Tokens."""


@default_pooling_type(seq_pooling_type="MEAN")
class BTokSmolVLMForEmbedding(WithBottleneckTokens, Idefics3ForConditionalGeneration):
    """SmolVLM2 with Bottleneck Tokens. Exports have the processor of SmolVLM."""


@default_pooling_type(seq_pooling_type="MEAN")
class BTokLfm2VlForEmbedding(WithBottleneckTokens, Lfm2VLForConditionalGeneration):
    """LFM2-VL with Bottleneck Tokens. Rows that are whole start from an empty state of the convolutions."""

    # The tower of vLLM has a level `vision_model`. Files of older releases of transformers have it, newer ones do not.
    hf_to_vllm_mapper = Lfm2VLForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^model\.vision_tower\.(?!vision_model\.)"): "model.vision_tower.vision_model."}
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        text = vllm_config.model_config.hf_config.text_config
        for name in ("block_dim", "conv_dim"):  # published files have them; transformers reads the hidden size
            setattr(text, name, text.hidden_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if current_platform.is_cpu():
            # vLLM's kernel for CPUs rotates only the first head of queries with three axes, which this family has.
            for module in self.modules():
                if isinstance(module, RotaryEmbedding):
                    module._forward_method = module.forward_native
