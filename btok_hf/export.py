"""Write a Hub repository: weights, remote code, processor, Sentence-Transformers files, model card, golden vectors.

All repositories are written here. Golden vectors come last, so that an export without them is incomplete. They are
computed in `btok_hf/golden_writer.py`. The files of Sentence-Transformers are in `btok_hf/stock_pipeline.py`, the card
is in `hub_card/`, and the upload is in `btok_hf/hub.py`.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from btok_hf import golden
from btok_hf.adapters import MergedTensors, adapter_config, has_adapters
from btok_hf.backbones import family_of
from btok_hf.encoding import PackedEncoder
from btok_hf.files import check_writable, explain_full_disk, write_files, write_json
from btok_hf.golden_writer import write_golden_vectors
from btok_hf.hub_card.card import ADAPTER_RELEASE, files_of_card, render_card
from btok_hf.hub_names import is_hub_id
from btok_hf.modeling import modeling_btok
from btok_hf.stock_pipeline import modules, write_pipeline
from btok_hf.weights import MAX_SHARD_SIZE, WEIGHT_FILES, names_on_disk, plan_shards, write_weights

if TYPE_CHECKING:  # BTokSentenceTransformer imports this module
    from sentence_transformers import SentenceTransformer

# Why a repository needs a release of transformers. Sentence-Transformers checks it before it loads the weights.
REASON = "older releases miss parts of the processors, positions or loading of weights that the embeddings rely on"
# No release of PEFT fulfils it, so that stock loaders refuse with the reason.
NO_DORA = {
    "peft": {
        "specifier": "<0",
        "reason": "These are adapters with DoRA, whose magnitudes stock loaders ignore (transformers 5.23). Load them "
        "with btok_hf.BTokSentenceTransformer, and publish the merged model of btok_hf.export_model.",
    }
}
MODULES, DRAFTS = "modules.json", ".weights-"


def export_model(
    model: "SentenceTransformer",
    output_dir: str | Path,
    *,
    files: Mapping[str, str | bytes] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """Write a trained model as a Hub repository that stock loaders read, with golden vectors to verify it.

    LoRA adapters are merged layer by layer, on the CPU. `model` is not changed and can be trained further. Beside it,
    an export needs memory for one shard of merged weights, or for the embedding matrix in fp32 if that is larger.

    Args:
        model (`BTokSentenceTransformer`): The model to publish.
        output_dir (`str` or `Path`): Folder to write. Files of an earlier export are overwritten. Its licence (if
            Apache-2.0), scores and example pictures are removed if it had another card.
        files (`dict[str, str | bytes]`, *optional*): Additional files by relative path, e.g. `README.md`, `LICENSE`.
            Default: the README.md that the model was loaded with, its licence and pictures, if it is the same model;
            otherwise a README.md that describes the model without results.
        max_shard_size (`str`): Maximum size of a weight file, as in `save_pretrained`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        OSError: `output_dir` cannot be written to, or the disk is full.
        ValueError: `max_shard_size` is not a size.
    """
    module = _own_module(model)
    if has_adapters(module.model):
        base = str(adapter_config(module.model).base_model_name_or_path)
        for source, what in (
            (base, "the base model of the adapters, got {}: their checkpoints would be applied to merged weights"),
            (module.adapters_from, "where the adapters are from, got {}: training could not resume from them"),
        ):
            if source and Path(source).is_dir() and Path(source).resolve() == Path(output_dir).resolve():
                raise ValueError(f"output_dir must not be {what.format(output_dir)}. Choose another folder.")
    output_dir = write_repository(
        output_dir,
        module.model,
        module.processor,
        lm_head=module.lm_head,
        generation_config=module.generation_config,
        model=model,
        files=cast(Any, model).kept_card() if files is None else files,
        max_shard_size=max_shard_size,
    )
    write_golden_vectors(output_dir, model)
    return output_dir


def export_adapters(
    model: "SentenceTransformer",
    output_dir: str | Path,
    base_model: str | None = None,
    *,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write only the LoRA adapters and trained token rows, as a Hub repository that refers to its base by Hub id.

    Loading it needs PEFT and the base model. Use `export_model` unless the size matters. Adapters have no golden
    vectors, because the base repository may change.

    Args:
        model (`BTokSentenceTransformer`): A model with adapters.
        output_dir (`str` or `Path`): Folder to write. Must not contain a merged model.
        base_model (`str`, *optional*): Hub id of the repository with Bottleneck Tokens that the adapters were trained
            on. Default: where the model was loaded from.
        files (`dict[str, str | bytes]`, *optional*): As in `export_model`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: No adapters, DoRA, a base that is not a Hub id or not its main branch, or a merged model in
            `output_dir`.
        OSError: `output_dir` cannot be written to, or the disk is full.
    """
    module = _own_module(model)
    backbone = module.model
    if not has_adapters(backbone):
        raise ValueError("The model has no adapters to write. Export the full model with export_model.")
    base = str(base_model or adapter_config(backbone).base_model_name_or_path)
    if not is_hub_id(base):
        raise ValueError(
            f"base_model must be a Hub id, got {base!r}, which nobody else could load. Push the repository that the "
            "adapters were trained on, and pass its id as base_model, e.g. 'org/btok-start'."
        )
    if base_model is None and module.base_revision not in (None, "main"):
        raise ValueError(
            f"The adapters were trained on revision {module.base_revision!r} of {base}, and stock loaders would take "
            "its main branch. Pass base_model, the id of a repository whose main branch it is, or export the merged "
            "model with export_model."
        )
    if adapter_config(backbone).use_dora:
        raise ValueError(
            "Adapters with use_dora=True cannot be exported: stock loaders ignore the magnitudes of DoRA "
            "(transformers 5.23) and would give other vectors. Export the merged model with export_model."
        )
    output_dir = write_repository(
        output_dir, backbone, module.processor, adapters_only=True, base_model=base, model=model, files=files
    )
    path = output_dir / "adapter_config.json"
    # The revision of the base is its main branch: that of training is refused above, or belongs to another base.
    here = {"base_model_name_or_path": base, "revision": None}
    write_json(path, json.loads(path.read_text("utf-8")) | here)
    return output_dir


def check_empty(output_dir: str | Path) -> None:
    """Raise `ValueError` if a folder holds a model or adapters, which another repository would replace."""
    if any(Path(output_dir, name).exists() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{output_dir} already holds a model. Remove it or name another output_dir.")


def _own_module(model: "SentenceTransformer") -> Any:
    """The module of a `BTokSentenceTransformer`; `ValueError` for other models."""
    if not isinstance(model, PackedEncoder):  # which BTokSentenceTransformer is
        raise ValueError(f"An export needs a btok_hf.BTokSentenceTransformer, got {type(model).__name__}: load it so.")
    return model[0]


def write_repository(
    output_dir: str | Path,
    backbone: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    lm_head: torch.nn.Module | None = None,
    generation_config: GenerationConfig | None = None,
    adapters_only: bool = False,
    base_model: str | None = None,
    model: "SentenceTransformer | None" = None,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """Write all files of a repository except the golden vectors.

    Args:
        output_dir (`str` or `Path`): Folder to write.
        backbone (`PreTrainedModel`): The stock backbone, e.g. a `Qwen2VLModel`. Adapters are merged.
        processor (`ProcessorMixin`): Processor with the embedding chat template.
        lm_head (`torch.nn.Linear`, *optional*): Head of an untied model.
        generation_config (`GenerationConfig`, *optional*): Saved with the model.
        adapters_only (`bool`): Write only the adapters of the backbone.
        base_model (`str`, *optional*): Hub id of their base, for the card.
        model (`BTokSentenceTransformer`, *optional*): Source of prompts, similarity and dimensions.
        settings (`dict`, *optional*): The same if there is no `model`: `prompts`, `default_prompt_name`,
            `similarity_fn_name`, `truncate_dim`.
        files (`dict[str, str | bytes]`, *optional*): Additional files by relative path.
        max_shard_size (`str`): Maximum size of a weight file.

    Returns:
        `Path`: `output_dir`.

    Raises:
        OSError: `output_dir` cannot be written to, or the disk is full.
        TypeError: Content of `files` that is neither `str` nor `bytes`.
        ValueError: `max_shard_size` is not a size, the model has further modules, or its adapters would lie beside
            the weights of a model.
    """
    check_writable(output_dir)
    for name, content in (files or {}).items():
        if not isinstance(content, (str, bytes)):
            raise TypeError(f"files must hold str or bytes, got {type(content).__name__} for {name!r}. Read the file.")
    if model is not None and len(model) > 1:
        raise ValueError(
            f"The model has {len(model)} modules, but a repository holds the first alone. Remove the others, and "
            "append them to what SentenceTransformer loads from it."
        )
    output_dir = Path(output_dir)
    if adapters_only and (output_dir / "config.json").exists():
        raise ValueError(f"{output_dir} contains a merged model, which loaders would prefer. Choose another folder.")
    config = backbone.config
    # transformers 5.17 leaves adapters random when it loads them, and only warns.
    release = max(modeling_btok.needed_release(config), ADAPTER_RELEASE if adapters_only else "")
    requirements = {"transformers": {"specifier": f">={release},<6", "reason": REASON}}
    if adapters_only:
        needed = None
        if adapter_config(backbone).use_dora:
            requirements = requirements | NO_DORA
    else:
        tensors = MergedTensors(backbone, lm_head)
        in_memory = names_on_disk(modeling_btok.stock_class(config), config, tensors)
        empty = {name: tensors.empty(in_memory[name]) for name in in_memory}
        plan = plan_shards(empty, max_shard_size)
        needed = sum(tensor.nbytes for tensor in empty.values())
    if files is None:
        base = str(adapter_config(backbone).base_model_name_or_path) if adapters_only else ""
        given = settings or {}
        card = render_card(
            config,
            processor,
            model.prompts if model is not None else given.get("prompts") or {},
            truncate_dim=model.truncate_dim if model is not None else given.get("truncate_dim"),
            trained=model is not None and cast(Any, model).was_trained(),
            of_adapters=adapters_only,
            adapter_base=base_model or (base if is_hub_id(base) else None),
        )
        files = {"README.md": card}
    with explain_full_disk(output_dir, needed):
        output_dir.mkdir(parents=True, exist_ok=True)
        for draft in output_dir.glob(f"{DRAFTS}*"):  # of an export that was killed
            shutil.rmtree(draft)
        if adapters_only:
            for name in (MODULES, golden.FILE_NAME):
                (output_dir / name).unlink(missing_ok=True)
            if model is not None:
                adapter_config(backbone).revision = model[0].base_revision  # of the base, which PEFT does not know
            backbone.save_pretrained(output_dir)
        else:
            # Written beside the old weights, which stay if the disk is full, and which the model may map into memory.
            with tempfile.TemporaryDirectory(dir=output_dir, prefix=DRAFTS) as folder:
                write_weights(Path(folder), lambda name: tensors[in_memory[name]], plan)
                # Written last: without it the folder is no repository, so nobody publishes half an export.
                (output_dir / MODULES).unlink(missing_ok=True)
                # Golden vectors belong to the old weights, too. Loaders could prefer old weights in another number
                # of files, or old adapters.
                for pattern in WEIGHT_FILES:
                    for path in output_dir.glob(pattern):
                        path.unlink()
                (output_dir / golden.FILE_NAME).unlink(missing_ok=True)
                for path in Path(folder).iterdir():
                    path.replace(output_dir / path.name)
            _write_config(
                output_dir,
                config,
                processor.tokenizer,
                tensors.empty(f"model.{family_of(config).language}.embed_tokens.weight").dtype,
            )
            if generation_config is not None:
                generation_config.save_pretrained(output_dir)
        # Every call sets truncation and padding in the tokenizer. If they were saved, they would override the
        # max_seq_length of a model that is loaded from the repository.
        processor.tokenizer.backend_tokenizer.no_truncation()
        processor.tokenizer.backend_tokenizer.no_padding()
        processor.save_pretrained(output_dir)
        sizes = getattr(config, "matryoshka_dimensions", None) if adapters_only else None
        write_pipeline(output_dir, config, model, settings, requirements, sizes)
        _remove_other_card(output_dir, files)
        write_files(output_dir, files)
        write_json(output_dir / MODULES, modules())
    return output_dir


def _remove_other_card(output_dir: Path, files: Mapping[str, str | bytes]) -> None:
    """Remove what an earlier card brought, so that nobody publishes the scores or licence of another model."""
    card, earlier = files.get("README.md"), output_dir / "README.md"
    card = card.encode() if isinstance(card, str) else card
    if card is None or not earlier.is_file() or earlier.read_bytes() == card:
        return
    for path in files_of_card(output_dir):
        if path.relative_to(output_dir).as_posix() not in files:
            path.unlink()


def _write_config(output_dir: Path, config: PreTrainedConfig, tokenizer: Any, dtype: torch.dtype) -> None:
    """Write `config.json` of the full model, and the remote code that it names."""
    config, path = copy.deepcopy(config), output_dir / "config.json"
    config.dtype, config.btok_pad_token_id = dtype, tokenizer.pad_token_id
    config.btok_turn_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    config.save_pretrained(output_dir)
    write_json(path, modeling_btok.with_auto_map(json.loads(path.read_text("utf-8"))))
    modeling_btok.write_code(output_dir)
