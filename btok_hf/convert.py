"""Conversion of checkpoints of the public reproduction of the paper, github.com/siryuson/BottleneckTokens.

There a model is a list of modules: one that appends the Bottleneck Tokens to every row, a wrapper around a stock
vision-language model, a mean over the tokens, and a division by the length. The tokens are words of the vocabulary, as
here. So a conversion renames tensors, merges adapters, and lets the chat template do what the first module did.
Nothing is trained or initialised. A checkpoint whose vectors would change is refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, ProcessorMixin
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from btok_hf.adapters import check_exportable, find_base, load_adapters
from btok_hf.backbones import family_of
from btok_hf.bottleneck import ORDERS, bottleneck_token, bound_rows, check_base, embedding_chat_template, escapes
from btok_hf.export import check_empty, write_repository
from btok_hf.family import Family
from btok_hf.files import check_writable
from btok_hf.golden_writer import write_golden_vectors
from btok_hf.hub_card.card import CardArguments, apache_license, render_card
from btok_hf.hub_names import is_hub_id
from btok_hf.modeling.modeling_btok import StockModel, load_stock_model, stock_class
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.weights import untied_head

# The modules that give the vectors of this library, in their order, with the settings that each may have.
PIPELINE: tuple[tuple[str, set[str] | None], ...] = (
    ("BToksTokenInjector", {"num_tokens"}),
    ("Backbone", None),  # any: what they say is how it was loaded
    ("BToksPooling", set()),
    ("Normalize", set()),
)
# Its data sets put a line break between media and words.
AFTER_MEDIA = "\n"


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    base: str | None = None,
    card: CardArguments | None = None,
    **hub_kwargs: Any,
) -> Path:
    """Write a checkpoint of the public reproduction as a repository, with card and golden vectors.

    The vectors are those of the checkpoint, for rows of media, a line break and words. The reproduction has no
    prompts: its instructions are words of the text.

    Args:
        checkpoint (`str` or `Path`):
            Local folder or Hub id: a full checkpoint, or adapters (LoRA, DoRA), which are merged. The folder
            `base_model` of the run is found beside the adapters.
        output_dir (`str` or `Path`): Folder to write. Must not contain a model.
        base (`str`, *optional*):
            Hub id or folder of the model that training started from. Default: as the checkpoint names it. Adapters are
            merged into its weights. The card of a full checkpoint names it.
        card (`CardArguments`, *optional*): Licences for the card. Default: not stated.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`. The revision is that of the checkpoint.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: No checkpoint of this layout, or one with other modules, settings, tokens or rows than fit; a model
            in `output_dir`; tensors that are missing, unexpected or of another shape.
        OSError: A file is missing, or `output_dir` cannot be written to.
    """
    checkpoint = str(checkpoint)
    check_empty(output_dir)
    check_writable(output_dir)
    adapters = _read_adapters(checkpoint, hub_kwargs)
    source, its_kwargs = checkpoint, hub_kwargs
    if adapters is not None:  # modules and processor are in a folder of the run
        beside = Path(checkpoint).resolve().with_name("base_model")  # first: its recorded path may look like a Hub id
        recorded = adapters.base_model_name_or_path or beside.name
        source = str(beside) if Path(beside, "config.json").is_file() else find_base(checkpoint, recorded)
        its_kwargs = {key: value for key, value in hub_kwargs.items() if key != "revision"}
    path = cached_file(source, "config.json", **its_kwargs)
    content = json.loads(Path(cast(str, path)).read_text("utf-8"))
    name, module, num_tokens = _modules(source, content)
    saved = module.get("backbone_config") or {}
    # Asked first, because transformers answers an unknown family with a list of all that it knows.
    stock_class(cast(Any, SimpleNamespace(model_type=saved.get("model_type"))))
    config = AutoConfig.for_model(**_settings(saved))
    family = family_of(config)
    processor = AutoProcessor.from_pretrained(source, config=config, **its_kwargs)
    check_base(source, family, processor, processor.tokenizer.get_vocab())
    ids = _token_ids(source, processor, num_tokens)

    origin = base or module.get("model_name_or_path") or (saved.get("text_config") or {}).get("_name_or_path")
    if "model_name_or_path" not in module:
        renamings = {rf"^_modules_dict\.{re.escape(name)}\.model\.": ""}
        model, _ = load_stock_model(source, config, dtype="auto", key_mapping=renamings, **its_kwargs)
    elif adapters is None:
        raise ValueError(
            f"{source} holds no weights, only the name of a base model, {origin!r}: the reproduction writes it before "
            "it trains adapters. Name a folder of adapters beside it, e.g. checkpoint-5000."
        )
    else:
        model = _load_base(str(origin), config, checkpoint, its_kwargs)
    rows = model.get_input_embeddings().num_embeddings
    if max(ids) >= rows:
        raise ValueError(
            f"The model of {checkpoint} has {rows} embedding rows, but the Bottleneck Tokens have the ids {ids}: "
            "their rows are missing. Use the tokenizer and the weights of one training run."
        )
    lm_head = untied_head(model)  # before there are adapters, behind which the embedding is another module
    if adapters is not None:
        _check_adapters(checkpoint, adapters, ids)
        load_adapters(model.model, checkpoint, f"_modules_dict.{name}.model.model.", **hub_kwargs)

    _describe(model, processor, family, ids)
    model.config.btok_base_model = origin if origin and is_hub_id(origin) else None
    model.config.btok_base_revision = None  # the reproduction does not record it
    on_hub = is_hub_id(checkpoint)  # the name of a local folder is not published
    model.config.btok_converted_from = {
        "checkpoint": checkpoint if on_hub else None,
        "revision": extract_commit_hash(path, None) if on_hub and adapters is None else None,
    }
    card = card or CardArguments()
    files: dict[str, str | bytes] = {"README.md": render_card(model.config, processor, {}, card)}
    if card.model_license == "apache-2.0":
        files["LICENSE"] = apache_license()
    output_dir = write_repository(
        output_dir,
        model.model,
        processor,
        lm_head=lm_head,
        generation_config=model.generation_config,
        files=files,
    )
    write_golden_vectors(output_dir, BTokSentenceTransformer(str(output_dir), device="cpu"))
    return output_dir


def _read_adapters(checkpoint: str, hub_kwargs: Mapping[str, Any]) -> Any:
    """The PEFT configuration of a checkpoint; `None` if it is a full one."""
    if find_adapter_config_file(checkpoint, **hub_kwargs) is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(
            f"{checkpoint} holds adapters. Merging them needs PEFT: pip install 'btok-hf[train]'"
        ) from error
    adapters = PeftConfig.from_pretrained(checkpoint, **hub_kwargs)
    check_exportable(adapters)
    return adapters


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what belongs to the run: local folders, and the dtype, which is that of the weights."""
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if key not in ("_name_or_path", "dtype", "torch_dtype")
    }


def _modules(source: str, content: Mapping[str, Any]) -> tuple[str, dict[str, Any], int]:
    """The name and the settings of the backbone in `config.json`, and K.

    Raises:
        ValueError: Another layout, other modules, or settings that this library has no counterpart of.
    """
    modules = content.get("modules")
    if content.get("model_type") not in ("btoks", "vlm2emb") or not isinstance(modules, dict):
        raise ValueError(
            f"{source} is no checkpoint of the public reproduction: its config.json has the model_type "
            f"{content.get('model_type')!r} and {'no' if modules is None else 'a list of'} modules, but must have "
            "'btoks' or 'vlm2emb' and modules by name. A stock checkpoint gets its tokens with `btok add-tokens`."
        )
    names = content.get("_module_order") or list(modules)  # JSON keys are sorted, so their order says nothing
    types = [str(modules.get(name, {}).get("type")) for name in names]
    # The wrapper of each family has a name of its own, which ends so.
    kinds = ["Backbone" if given.endswith("Backbone") else given for given in types]
    if kinds != [kind for kind, _ in PIPELINE]:
        raise ValueError(
            f"{source} must have the modules {', '.join(kind for kind, _ in PIPELINE)} in this order, got "
            f"{', '.join(types)}. Other poolings, projections and places of the tokens have no counterpart here: keep "
            "the model in the reproduction's code, or train it again without them."
        )
    for name, (kind, known) in zip(names, PIPELINE):
        unknown = sorted(modules[name].keys() - {"type", *known}) if known is not None else []
        if unknown:
            raise ValueError(
                f"The module {name!r} ({kind}) of {source} has the settings {', '.join(unknown)}, which are not known "
                "here: its vectors may differ. Convert a model without them."
            )
    num_tokens = modules[names[0]].get("num_tokens")
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(
            f"The module {names[0]!r} of {source} must have num_tokens of at least 1, got {num_tokens}. Without "
            "Bottleneck Tokens the reproduction pools the last token of the text, where a row here ends in EOS."
        )
    return names[1], modules[names[1]], num_tokens


def _token_ids(source: str, processor: ProcessorMixin, num_tokens: int) -> list[int]:
    """The ids of the Bottleneck Tokens; raises `ValueError` if they are not what the modules say."""
    names = [bottleneck_token(index) for index in range(num_tokens)]
    vocabulary = processor.tokenizer.get_vocab()
    present = sorted(token for token in vocabulary if token.startswith("<|btok_"))
    if present != sorted(names):
        raise ValueError(
            f"The modules of {source} have K = {num_tokens} Bottleneck Tokens, but its tokenizer has {len(present)}"
            f"{': ' * bool(present)}{', '.join(present)}. Put the tokenizer of the same training run there."
        )
    if "<|btok_" in cast(str, processor.chat_template):  # checked by check_base
        raise ValueError(
            f"The chat template of {source} already has Bottleneck Tokens, but the modules append them to every row. "
            "Restore the chat template of the base model."
        )
    return processor.tokenizer.convert_tokens_to_ids(names)


def _load_base(base: str, config: PreTrainedConfig, checkpoint: str, hub_kwargs: Mapping[str, Any]) -> StockModel:
    """The stock model that adapters were trained on."""
    try:
        return load_stock_model(base, config, dtype="auto", **hub_kwargs)[0]
    except OSError as error:
        raise OSError(
            f"The base model {base!r} of the adapters in {checkpoint} cannot be read ({error}). Give its folder or "
            "Hub id as base, or --base."
        ) from error


def _check_adapters(checkpoint: str, adapters: Any, ids: list[int]) -> None:
    """Raise `ValueError` if adapters do not hold the rows of the tokens."""
    trained = adapters.trainable_token_indices
    trained = next(iter(trained.values()), None) if isinstance(trained, dict) else trained
    if sorted(trained or []) != sorted(ids):
        raise ValueError(
            f"The adapters in {checkpoint} hold the embedding rows {trained}, but the Bottleneck Tokens have the ids "
            f"{ids}: their rows are missing. Use adapters and modules of the same training run."
        )


def _describe(model: StockModel, processor: ProcessorMixin, family: Family, ids: list[int]) -> None:
    """Set what a repository says of its Bottleneck Tokens, in place."""
    tokens = "".join(processor.tokenizer.convert_ids_to_tokens(ids))
    processor.chat_template = embedding_chat_template(
        cast(str, processor.chat_template), tokens, family, escapes(processor.tokenizer), after_media=AFTER_MEDIA
    )
    bound_rows(processor, model.config)
    family.limit_pixels(processor, None, None)
    model.config.btok_order, model.config.btok_suffix = ORDERS[0], None
    model.config.btok_token_ids, model.config.btok_num_tokens = ids, len(ids)
    model.generation_config.suppress_tokens = ids
