"""The one place that writes a Hub repository: weights, remote code, processor, Sentence-Transformers files, card.

Golden vectors are written last: a folder without them was not finished.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from btok_hf import golden
from btok_hf.adapters import has_adapters
from btok_hf.condensation import condense
from btok_hf.files import check_writable, explain_full_disk, write_files, write_json
from btok_hf.hub_card.card import render_card
from btok_hf.modeling import modeling_btok

logger = logging.get_logger(__name__)

# Checked by Sentence-Transformers before it loads any weights.
REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.17,<6",
        "reason": "older releases miss parts of the Qwen-VL processors and loading checks that the embeddings rely on",
    }
}
STOCK_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_WordWeights", "sentence_transformers.sentence_transformer.modules.word_weights.WordWeights"),
    ("2_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("3_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)


def export_model(model, output_dir, *, files=None, max_shard_size="50GB"):
    """Write a trained model as a Hub repository that every stock loader reads, with golden vectors to verify it by.

    LoRA adapters are merged into a copy of the weights; `model` itself stays as it is, ready to train on.

    Args:
        model (`BTokSentenceTransformer`): The model to publish.
        output_dir (`str` or `Path`): Folder to write; files of an earlier export are overwritten.
        files (`dict[str, str | bytes]`, *optional*): Further files by relative path, e.g. `README.md` and `LICENSE`.
            Default: a README.md that describes the model without results.
        max_shard_size (`str`): Largest weight file, as in `save_pretrained`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        OSError: `output_dir` cannot be written to, or the disk is full.
    """
    weights = model[0].merged()
    output_dir = write_repository(
        output_dir, weights, model[0].processor, model=model, files=files, max_shard_size=max_shard_size
    )
    _write_golden(output_dir, weights, model)
    return output_dir


def export_adapters(model, output_dir, base_model=None, *, files=None):
    """Write only the LoRA adapters and trained token rows, as a Hub repository that refers to its base by Hub id.

    Loading it needs PEFT and the base; publish what `export_model` writes unless the size matters. It has no golden
    vectors: they would have to hold for whatever the base becomes.

    Args:
        model (`BTokSentenceTransformer`): A model with adapters.
        output_dir (`str` or `Path`): Folder to write. Must not hold a whole model.
        base_model (`str`, *optional*): Hub id of the repository with Bottleneck Tokens that the adapters were trained
            on. Default: what the model was loaded from.
        files (`dict[str, str | bytes]`, *optional*): As in `export_model`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: No adapters, DoRA, a base that is no Hub id, or a whole model in `output_dir`.
        OSError: `output_dir` cannot be written to, or the disk is full.
    """

    backbone = model[0].model
    if not has_adapters(backbone):
        raise ValueError("The model has no adapters to write. Export it whole: use export_model.")
    base = str(base_model or backbone.peft_config[backbone.active_adapters()[0]].base_model_name_or_path)
    if Path(base).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise ValueError(
            f"Adapters refer to their base by Hub id, got {base!r}, which nobody else could load. Push the repository "
            "that they were trained on and pass its id as base_model, e.g. 'org/btok-start'."
        )
    if backbone.peft_config[backbone.active_adapters()[0]].use_dora:
        raise ValueError(
            "Stock loaders leave the magnitudes of DoRA out (transformers 5.23), so the adapters would give other "
            "vectors. Export the model whole."
        )
    if Path(output_dir, "config.json").exists():
        raise ValueError(f"{output_dir} holds a whole model, which loaders would prefer. Name another output_dir.")
    output_dir = write_repository(output_dir, backbone, model[0].processor, model=model, files=files)
    path = output_dir / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text("utf-8")), "base_model_name_or_path": base})
    return output_dir


def write_repository(
    output_dir, weights, processor, *, model=None, prompts=None, files=None, max_shard_size="50GB"
) -> Path:
    """Write all files of a repository but the golden vectors.

    Args:
        output_dir (`str` or `Path`): Folder to write.
        weights (`PreTrainedModel`): A stock `…ForConditionalGeneration`, or a backbone with adapters, of which only
            the adapters are written.
        processor (`ProcessorMixin`): With the embedding chat template.
        model (`BTokSentenceTransformer`, *optional*): Where prompts, similarity and dimensions come from.
        prompts (`dict[str, str]`, *optional*): Prompts where there is no `model`.
        files (`dict[str, str | bytes]`, *optional*): Further files by relative path.
        max_shard_size (`str`): Largest weight file.

    Raises:
        OSError: `output_dir` cannot be written to, or the disk is full.
    """

    check_writable(output_dir)
    output_dir = Path(output_dir)
    config = weights.config
    is_whole = isinstance(weights, modeling_btok.stock_class(config))
    needed = sum(p.numel() * p.element_size() for p in weights.parameters()) if is_whole else None
    if files is None:
        files = {"README.md": render_card(config, processor, model.prompts if model is not None else prompts or {})}
    with explain_full_disk(output_dir, needed):
        output_dir.mkdir(parents=True, exist_ok=True)
        # Of an earlier export: these vectors belong to other weights.
        (output_dir / golden.FILE_NAME).unlink(missing_ok=True)
        if is_whole:  # in another number of files, old weights would stay beside the new ones, and be preferred
            for path in output_dir.glob("model*.safetensors*"):
                path.unlink()
        weights.save_pretrained(output_dir, max_shard_size=max_shard_size)
        processor.save_pretrained(output_dir)
        if is_whole:
            # Left from saving adapters here, they would be taken for the model.
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (output_dir / name).unlink(missing_ok=True)
            path = output_dir / "config.json"
            write_json(path, modeling_btok.with_auto_map(json.loads(path.read_text("utf-8"))))
            shutil.copyfile(modeling_btok.__file__, output_dir / "modeling_btok.py")
        _write_sentence_transformers_files(output_dir, config, model, prompts)
        write_files(output_dir, files)
    return output_dir


def _write_golden(output_dir, weights, model):
    """Golden vectors of the weights in memory: a repository whose files hold anything else fails `btok_hf.verify`.

    They are the fp32 embeddings on the CPU, whatever the weights' own precision and device. A backbone made anew holds
    a copy of the weights; casting a copy of the module instead would keep the rounded rotary frequencies of one that
    was cast to bf16, which no loader has.
    """
    backbone = type(weights.model)(weights.config).float().eval()
    backbone.load_state_dict(weights.model.state_dict())
    inputs = golden.golden_inputs(model.prompts)
    embeddings = []
    with torch.no_grad():
        for item, prompt_name in inputs.values():
            prompt = None if prompt_name is None else model.prompts[prompt_name]
            features = model[0].preprocess([item], prompt=prompt)
            embeddings.append(condense(backbone, {k: _to_cpu(v) for k, v in features.items()}).embeddings[0].numpy())
    with explain_full_disk(output_dir):
        closest = golden.write_golden(output_dir / golden.FILE_NAME, inputs, model.prompts, np.stack(embeddings))
    if not closest > golden.DISTINCT * golden.TOLERANCE:
        logger.warning(
            f"The model gives nearly the same vector to different inputs (largest difference {closest:.1e}): it is "
            f"collapsed or untrained. {output_dir} is written, but btok verify will refuse its golden vectors."
        )


def _to_cpu(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _write_sentence_transformers_files(output_dir, config, model, prompts):
    """A pipeline of stock modules: the weights 1 for Bottleneck Tokens and 0 elsewhere make their mean the output."""
    text_config = config.get_text_config()
    write_json(
        output_dir / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": type_name}
            for index, (path, type_name) in enumerate(STOCK_MODULES)
        ],
    )
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = ("text", "image", "video", "message")
    write_json(
        output_dir / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                name: {**forward, "format": "structured"} if name == "message" else forward for name in modalities
            },
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
        },
    )
    write_json(
        output_dir / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
            "prompts": model.prompts if model is not None else {"query": "", "document": "", **(prompts or {})},
            "default_prompt_name": None if model is None else model.default_prompt_name,
            "similarity_fn_name": "cosine" if model is None else model.similarity_fn_name,
            "truncate_dim": None if model is None else model.truncate_dim,
            "requirements": REQUIREMENTS,
        },
    )
    # One character per vocabulary entry: "B" for a Bottleneck Token, "." for any other.
    vocabulary = ["."] * text_config.vocab_size
    for token_id in modeling_btok.bottleneck_token_ids(config):
        vocabulary[token_id] = "B"
    module_configs = (
        {"vocab": "".join(vocabulary), "word_weights": {"B": 1.0}, "unknown_word_weight": 0.0},
        {"embedding_dimension": text_config.hidden_size, "pooling_mode": "mean", "include_prompt": True},
        {"module_input_name": "sentence_embedding"},
    )
    for (folder, _), module_config in zip(STOCK_MODULES[1:], module_configs):
        (output_dir / folder).mkdir(exist_ok=True)
        write_json(output_dir / folder / "config.json", module_config)


def untied_head(model):
    """The language-modelling head of a stock model; `None` where it shares the input embedding's weight."""
    return None if model.lm_head.weight is model.get_input_embeddings().weight else model.lm_head


def stock_model(backbone, lm_head=None, generation_config=None) -> PreTrainedModel:
    """The stock `…ForConditionalGeneration` around a backbone; shares its tensors.

    Args:
        backbone (`PreTrainedModel`): e.g. a `Qwen2VLModel`.
        lm_head (`torch.nn.Linear`, *optional*): Head of an untied model.
        generation_config (`GenerationConfig`, *optional*): Saved with the model.
    """
    # A copy through to_dict carries no attention implementation, which could not be looked up for a new model.
    config = type(backbone.config).from_dict(backbone.config.to_dict())
    with torch.device("meta"):
        model = modeling_btok.stock_class(config)(config)
    model.model = backbone
    if lm_head is not None:
        model.lm_head = lm_head
    model.tie_weights()
    if generation_config is not None:
        model.generation_config = generation_config
    return model
