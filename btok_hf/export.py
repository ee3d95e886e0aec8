"""The one place that writes a Hub repository: weights, remote code, processor, Sentence-Transformers files, card."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from btok_hf.modeling import modeling_btok

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


def export_model(model, output_dir, *, card=None, max_shard_size="50GB"):
    """Write a trained model as a Hub repository that every stock loader reads.

    LoRA adapters are merged into a copy of the weights; `model` itself stays as it is, ready to train on.

    Args:
        model (`BTokSentenceTransformer`): The model to publish.
        output_dir (`str` or `Path`): Folder to write; files of an earlier export are overwritten.
        card (`str`, *optional*): Content of README.md. Default: a card that describes the model without results.
        max_shard_size (`str`): Largest weight file, as in `save_pretrained`.

    Returns:
        `Path`: `output_dir`.
    """
    module = model[0]
    return write_repository(
        output_dir, module.merged(), module.processor, model=model, card=card, max_shard_size=max_shard_size
    )


def write_repository(
    output_dir, weights, processor, *, model=None, prompts=None, card=None, max_shard_size="50GB"
) -> Path:
    """Write all files of a repository.

    Args:
        output_dir (`str` or `Path`): Folder to write.
        weights (`PreTrainedModel`): A stock `…ForConditionalGeneration`, or a backbone with adapters, of which only
            the adapters are written.
        processor (`ProcessorMixin`): With the embedding chat template.
        model (`BTokSentenceTransformer`, *optional*): Where prompts, similarity and dimensions come from.
        prompts (`dict[str, str]`, *optional*): Prompts where there is no `model`.
        card (`str`, *optional*): Content of README.md.
        max_shard_size (`str`): Largest weight file.
    """
    from btok_hf.hub_card import render_card

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    config = weights.config
    weights.save_pretrained(output_dir, max_shard_size=max_shard_size)
    processor.save_pretrained(output_dir)
    path = output_dir / "config.json"
    if isinstance(weights, modeling_btok.stock_class(config)):
        # Left from saving adapters here, they would be taken for the model.
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (output_dir / name).unlink(missing_ok=True)
        _write_json(path, modeling_btok.with_auto_map(json.loads(path.read_text("utf-8"))))
        shutil.copyfile(modeling_btok.__file__, output_dir / "modeling_btok.py")
    _write_sentence_transformers_files(output_dir, config, model, prompts)
    prompts = model.prompts if model is not None else prompts or {}
    (output_dir / "README.md").write_text(card or render_card(config, processor, prompts), "utf-8")
    return output_dir


def _write_sentence_transformers_files(output_dir, config, model, prompts):
    """A pipeline of stock modules: the weights 1 for Bottleneck Tokens and 0 elsewhere make their mean the output."""
    text_config = config.get_text_config()
    _write_json(
        output_dir / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": type_name}
            for index, (path, type_name) in enumerate(STOCK_MODULES)
        ],
    )
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = ("text", "image", "video", "message")
    _write_json(
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
    _write_json(
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
        _write_json(output_dir / folder / "config.json", module_config)


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


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
