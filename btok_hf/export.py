"""The one place that writes a Hub repository: weights, remote code, processor, Sentence-Transformers files, card.

    python -m btok_hf.export runs/btok-run/checkpoint-1000 btok-mine
    python -m btok_hf.export runs/btok-run/checkpoint-1000 btok-lora --adapter_only --base_model org/btok-start

Golden vectors are written last: a folder without them was not finished.
"""

import argparse
import contextlib
import errno
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from btok_hf import golden
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
    from btok_hf.sentence_transformer import has_adapters

    backbone = model[0].model
    if not has_adapters(backbone):
        raise ValueError("The model has no adapters to write. Export it whole: leave adapter_only out.")
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
    _write_json(path, {**json.loads(path.read_text("utf-8")), "base_model_name_or_path": base})
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
    from btok_hf.hub_card import render_card

    check_writable(output_dir)
    output_dir = Path(output_dir)
    config = weights.config
    is_whole = isinstance(weights, modeling_btok.stock_class(config))
    needed = sum(p.numel() * p.element_size() for p in weights.parameters()) if is_whole else None
    if files is None:
        files = {"README.md": render_card(config, processor, model.prompts if model is not None else prompts or {})}
    with _disk_full_explained(output_dir, needed):
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
            _write_json(path, modeling_btok.with_auto_map(json.loads(path.read_text("utf-8"))))
            shutil.copyfile(modeling_btok.__file__, output_dir / "modeling_btok.py")
        _write_sentence_transformers_files(output_dir, config, model, prompts)
        write_files(output_dir, files)
    return output_dir


def write_files(output_dir, files):
    """Write files of a repository: a mapping from relative path to text or bytes."""
    for name, content in files.items():
        path = Path(output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def nearest_existing(folder):
    """`folder`, or the nearest one above it that exists."""
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_writable(output_dir):
    """Raise an `OSError` with a way out if `output_dir` cannot be written to. Leaves nothing behind.

    A file is really made and removed, in the folder or, where it does not exist yet, in the nearest one above it:
    permission bits do not tell about read-only mounts.
    """
    existing = nearest_existing(output_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"The output folder {output_dir} cannot be written to: no file can be made in {existing} "
            f"({error.strerror}). Name another folder, or make that one writable",
        ) from error


@contextlib.contextmanager
def _disk_full_explained(output_dir, needed=None):
    """Turn a full disk, as Python and safetensors report it, into an error that says where and how much is missing."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in full and not re.search(r"os error (28|122)\b", str(error)):
            raise
        size = "" if needed is None else f" The weights need {needed:,} bytes."
        free = shutil.disk_usage(output_dir).free
        raise OSError(
            errno.ENOSPC,
            f"The disk is full: {output_dir} is incomplete.{size} There are {free:,} bytes free. "
            "Make room, or export to another disk",
        ) from error


def _write_golden(output_dir, weights, model):
    """Golden vectors of the weights in memory: a repository whose files hold anything else fails `btok_hf.verify`.

    They are the fp32 embeddings on the CPU, whatever the weights' own precision and device. A backbone made anew holds
    a copy of the weights; casting a copy of the module instead would keep the rounded rotary frequencies of one that
    was cast to bf16, which no loader has.
    """
    from btok_hf.condensation import condense

    backbone = type(weights.model)(weights.config).float().eval()
    backbone.load_state_dict(weights.model.state_dict())
    inputs = golden.golden_inputs(model.prompts)
    embeddings = []
    with torch.no_grad():
        for item, prompt_name in inputs.values():
            prompt = None if prompt_name is None else model.prompts[prompt_name]
            features = model[0].preprocess([item], prompt=prompt)
            embeddings.append(condense(backbone, {k: _to_cpu(v) for k, v in features.items()}).embeddings[0].numpy())
    with _disk_full_explained(output_dir):
        closest = golden.write_golden(output_dir / golden.FILE_NAME, inputs, model.prompts, np.stack(embeddings))
    if not closest > golden.DISTINCT * golden.TOLERANCE:
        logger.warning(
            f"The model gives nearly the same vector to different inputs (largest difference {closest:.1e}): it is "
            f"collapsed or untrained. {output_dir} is written, but btok_hf.verify will refuse its golden vectors."
        )


def _to_cpu(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


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


def main():
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m btok_hf.export",
        description="Export a training checkpoint (whole, or adapters) as a Hub repository.",
        epilog="example: python -m btok_hf.export runs/btok-run/checkpoint-1000 btok-mine",
    )
    parser.add_argument("checkpoint", help="folder or Hub id: a checkpoint of CondensationTrainer, or a repository")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--adapter_only", action="store_true", help="write only the adapters; the base stays apart")
    parser.add_argument("--base_model", help="with --adapter_only: Hub id of what the adapters were trained on")
    parser.add_argument("--max_shard_size", default="50GB", help="largest weight file (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.base_model and not arguments.adapter_only:
        parser.error("--base_model goes with --adapter_only: merged weights have no base")
    if Path(arguments.output_dir).resolve() == Path(arguments.checkpoint).resolve():
        parser.error("output_dir is the checkpoint itself, which could not be trained on afterwards; name another")
    from btok_hf.sentence_transformer import BTokSentenceTransformer

    try:
        check_writable(arguments.output_dir)
        model = BTokSentenceTransformer(arguments.checkpoint, device="cpu")
        if arguments.adapter_only:
            export_adapters(model, arguments.output_dir, arguments.base_model)
        else:
            export_model(model, arguments.output_dir, max_shard_size=arguments.max_shard_size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Exported to {arguments.output_dir}")


if __name__ == "__main__":
    # The package's copy of this module, not the one that runs as __main__, is what everything else refers to.
    from btok_hf.export import main

    main()
