"""Golden vectors of a repository that was just written: computed from its weights on disk.

What golden inputs are, and how the vectors are compared in a fresh process, is in `btok_hf/golden.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import logging

from btok_hf import golden
from btok_hf.backbones import family_of
from btok_hf.condensation import condense
from btok_hf.files import explain_full_disk
from btok_hf.modeling import modeling_btok
from btok_hf.weights import compute_in_fp32

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.get_logger(__name__)


def write_golden_vectors(output_dir: Path, model: "SentenceTransformer") -> None:
    """Write the golden vectors of the weights in `output_dir`. `btok_hf.verify` compares loaders with them.

    They are computed in fp32 on the CPU, for any precision and device of the model. The weights stay on disk and are
    converted layer by layer. Inputs that are longer than the model's longest row are left out, which a warning says.

    Args:
        output_dir (`Path`): Repository whose weights, configuration and processor are written already.
        model (`BTokSentenceTransformer`): The model that was exported: its prompts and its preprocessing are used.

    Raises:
        OSError: The disk is full.
        ValueError: The weights in `output_dir` are not those of its `config.json`.
    """
    config = AutoConfig.from_pretrained(output_dir)
    backbone = modeling_btok.load_stock_model(output_dir, config, needs_head=False, dtype="auto")[0].model.eval()
    compute_in_fp32(backbone)
    module: Any = model[0]
    family = family_of(config)
    image, frame = family.golden_sides(module.processor)
    order = getattr(config, "btok_order", "media_first")
    inputs = golden.golden_inputs(model.prompts, frame, order, image, takes_video=family.video is not None)
    embeddings: dict[str, np.ndarray] = {}
    # Golden inputs are never truncated: their vectors do not depend on the model's max_seq_length.
    limit, model.max_seq_length = model.max_seq_length, golden.longest(config)
    try:
        for name in [name for name, row in inputs.items() if not _fits(module, *row, model)]:
            logger.warning(f"The golden input {name!r} is left out: it is longer than the model's longest row.")
            del inputs[name]
        for prompt_name in dict.fromkeys(name for _, name in inputs.values()):
            # One batch for each prompt, because every batch reads all weights.
            chosen = {name: item for name, (item, other) in inputs.items() if other == prompt_name}
            features = module.preprocess(
                [item.get("messages", item) for item in chosen.values()],
                prompt=None if prompt_name is None else model.prompts[prompt_name],
            )
            with torch.no_grad():
                on_cpu = {key: value.cpu() if torch.is_tensor(value) else value for key, value in features.items()}
                vectors = condense(backbone, on_cpu).embeddings
            embeddings |= zip(chosen, vectors.numpy())
    finally:
        model.max_seq_length = limit
    ordered = np.stack([embeddings[name] for name in inputs])
    with explain_full_disk(output_dir):
        closest = golden.write_golden(output_dir / golden.FILE_NAME, inputs, model.prompts, ordered)
    if not closest > golden.DISTINCT * golden.TOLERANCE:
        logger.warning(
            f"The model gives nearly the same vector for different inputs (largest difference {closest:.1e}): it is "
            f"collapsed or untrained. {output_dir} was written, but btok verify will refuse its golden vectors."
        )


def _fits(module: Any, item: Mapping[str, Any], prompt_name: str | None, model: "SentenceTransformer") -> bool:
    """Whether a golden input is shorter than the longest row, so that no loader would truncate it."""
    prompt = None if prompt_name is None else model.prompts[prompt_name]
    try:
        return (
            module.preprocess([item.get("messages", item)], prompt=prompt)["input_ids"].shape[1] < model.max_seq_length
        )
    except ValueError:  # media are never truncated
        return False
