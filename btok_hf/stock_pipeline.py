"""The Sentence-Transformers files of a repository: a pipeline of stock modules, which needs no remote code.

Word weights of 1 for the Bottleneck Tokens and of 0 for all other tokens make the stock mean pooling average the
Bottleneck Tokens alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedConfig

from btok_hf.backbones import family_of
from btok_hf.files import write_json
from btok_hf.modeling.modeling_btok import bottleneck_token_ids

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STOCK_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_WordWeights", "sentence_transformers.sentence_transformer.modules.word_weights.WordWeights"),
    ("2_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("3_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)


def modules() -> list[dict[str, Any]]:
    """The content of `modules.json`."""
    return [
        {"idx": index, "name": str(index), "path": path, "type": type_name}
        for index, (path, type_name) in enumerate(STOCK_MODULES)
    ]


def write_pipeline(
    output_dir: Path,
    config: PreTrainedConfig,
    model: "SentenceTransformer | None",
    settings: Mapping[str, Any] | None,
    requirements: Mapping[str, Any],
    trained_dimensions: Sequence[int] | None = None,
) -> None:
    """Write the settings of the modules, and those of the whole model. `modules.json` is not among them.

    Args:
        output_dir (`Path`): Folder to write.
        config (`PreTrainedConfig`): Configuration of the model.
        model (`BTokSentenceTransformer`, *optional*): Source of prompts, similarity and dimensions.
        settings (`dict`, *optional*): The same by name if there is no `model`.
        requirements (`dict`): Releases of packages that Sentence-Transformers checks before it loads the weights.
        trained_dimensions (`list[int]`, *optional*): Sizes that adapters were trained for. Their repository has no
            `config.json`, where those of a merged model are.
    """
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    own = dict(settings or {}) if model is None else {name: getattr(model, name) for name in names}
    text_config = config.get_text_config()
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = ("text", "image", *(["video"] if family_of(config).video else []), "message")
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
            "prompts": with_defaults(own.get("prompts") or {}),
            "default_prompt_name": own.get("default_prompt_name"),
            "similarity_fn_name": own.get("similarity_fn_name") or "cosine",
            "truncate_dim": own.get("truncate_dim"),
            "requirements": requirements,
            **({"matryoshka_dimensions": list(trained_dimensions)} if trained_dimensions else {}),
        },
    )
    # One character per vocabulary entry: "B" for a Bottleneck Token, "." for any other.
    vocabulary = ["."] * text_config.vocab_size
    for token_id in bottleneck_token_ids(config):
        vocabulary[token_id] = "B"
    module_configs = (
        {"vocab": "".join(vocabulary), "word_weights": {"B": 1.0}, "unknown_word_weight": 0.0},
        {"embedding_dimension": text_config.hidden_size, "pooling_mode": "mean", "include_prompt": True},
        {"module_input_name": "sentence_embedding"},
    )
    for (folder, _), module_config in zip(STOCK_MODULES[1:], module_configs):
        (output_dir / folder).mkdir(exist_ok=True)
        write_json(output_dir / folder / "config.json", module_config)


def with_defaults(prompts: Mapping[str, str | None]) -> dict[str, str | None]:
    """Prompts with those that `encode_query` and `encode_document` look for first."""
    return {"query": "", "document": prompts.get("passage", prompts.get("corpus", "")), **prompts}
