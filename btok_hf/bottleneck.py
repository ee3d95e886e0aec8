"""Add Bottleneck Tokens to a base vision-language model: vocabulary entries, embedding rows and chat template.

K = 0 is the last-token-pooling baseline. No tokens are added, and every row ends in the EOS token. The rest of the
library treats EOS as the only Bottleneck Token.

The files are written by `btok_hf/export.py`. The row layouts are in `templates/`.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils.hub import cached_file, extract_commit_hash

from btok_hf.arguments import check_loading, check_pixels
from btok_hf.backbones import family_of
from btok_hf.export import check_empty, write_repository
from btok_hf.family import Family
from btok_hf.modeling.modeling_btok import StockModel, load_stock_model
from btok_hf.weights import untied_head

# The order of a row's content: media, instruction, text (as in the paper), or as the user gives it. Parts are
# separated by one space. Special tokens in user text are escaped, so that no text can become one. The templates use no
# filter but `replace`, because llama.cpp reads only part of Jinja.
ORDERS = ("media_first", "as_given")


def bottleneck_token(index: int) -> str:
    """Name of the Bottleneck Token with this index, as in the public reproduction of the paper."""
    return f"<|btok_{index}|>"


def escapes(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Replacements in texts that break up special tokens: a space is put after the first character of each."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    others = [token for token in special if not token.startswith("<|")]
    return [(token, f"{token[0]} {token[1:]}") for token in ("<|", *others)]


def embedding_chat_template(
    base_template: str,
    tokens: str,
    family: Family,
    escaped: Sequence[tuple[str, str]],
    order: str = "media_first",
    suffix: str | None = None,
    after_media: str = " ",
) -> str:
    """A chat template for embedding rows; with a generation prompt, the base's own template.

    Args:
        base_template (`str`): The base's template.
        tokens (`str`): What every row ends in: the Bottleneck Tokens.
        family (`Family`): Says what stands for an image and for a video.
        escaped (`list[tuple[str, str]]`): What is replaced in texts, and by what.
        order (`str`): One of `ORDERS`.
        suffix (`str`, *optional*): Words between the content and the tokens, after one space.
        after_media (`str`): What separates media from the words after them, with the order `media_first`.
    """
    end = tokens if suffix is None else f" {suffix}{tokens}"
    row = Path(__file__).with_name("templates").joinpath(f"{order}.jinja").read_text("utf-8")
    filters = " | ".join(f"replace('{token}', '{instead}')" for token, instead in escaped)
    video = f"'{family.video}'" if family.video else "raise_exception('This model takes no video.')"
    for name, value in (("IMAGE", f"'{family.image}'"), ("VIDEO", video), ("ESCAPED", filters)):
        row = row.replace(name, value)
    return (
        "{%- if add_generation_prompt -%}\n"
        + base_template
        + "{%- else -%}\n"
        + ("{%- set after_media = " + json.dumps(after_media) + " -%}\n" if order == "media_first" else "")
        + row
        + ("{{- " + json.dumps(end, ensure_ascii=False) + " -}}\n{%- endif -%}\n")
    )


def add_bottleneck_tokens(
    base: str | Path,
    output_dir: str | Path,
    num_tokens: int = 4,
    *,
    order: Literal["media_first", "as_given"] = "media_first",
    suffix: str | None = None,
    noise_std: float = 0.0,
    seed: int = 0,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    prompts: Mapping[str, str] | None = None,
    dtype: str | torch.dtype = "auto",
    **hub_kwargs: Any,
) -> Path:
    """Write a copy of a base checkpoint with Bottleneck Tokens added, ready to train.

    The tokens use spare rows of the vocabulary. If there are too few, the embedding grows to a multiple of 64. It
    never shrinks. Their rows start as the EOS row, or after a suffix as the row of its last token, whose state the
    words have made a summary.

    Args:
        base (`str` or `Path`):
            Local folder or Hub id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, InternVL3 (`-hf`), SmolVLM or
            LFM2-VL base with its processor.
        output_dir (`str` or `Path`): Folder to write. Must not contain a model.
        num_tokens (`int`): K. 4 in the paper; 0 is the last-token-pooling baseline.
        order (`str`): Order of a row's content. `media_first` is the paper's: media, instruction, text. `as_given`
            keeps the order of message parts and of the keys of input dicts, e.g. of images between texts; the
            instruction comes first.
        suffix (`str`, *optional*): Words between the content and the tokens of every row, after one space, e.g.
            `This means in one word: "` (PromptEOL, arXiv 2307.16645). Truncation never removes them.
        noise_std (`float`): Standard deviation of normal noise added to each row, relative to that of the
            row they start from.
        seed (`int`): Seed of the noise.
        min_pixels (`int`, *optional*): Smaller images are enlarged to this many pixels. Default: the base's.
        max_pixels (`int`, *optional*): Larger images and frames are reduced to this many pixels. Lower it to save
            memory: a token covers 28 x 28 pixels (32 x 32 for Qwen3-VL and Qwen3.5). InternVL3 counts in tiles of
            448 x 448 pixels, LFM2-VL in tiles of 512 x 512, if two of them or more fit. SmolVLM resizes every image
            to one longest side, a multiple of its tiles' (512 pixels, 384 in SmolVLM-2.2B). Default: the base's.
        prompts (`dict[str, str]`, *optional*): Instructions by name, e.g. `query` and `document`, saved with the
            model for `encode_query` and `encode_document`.
        dtype (`str` or `torch.dtype`): Precision of loading and saving. Default: the checkpoint's.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: A model in `output_dir`, an unknown order, an unsupported backbone, a base without a chat template
            or its family's special tokens, a base with another number of Bottleneck Tokens, another order or suffix,
            or a checkpoint with missing or unexpected tensors.
        TypeError: `prompts` that are no dict of texts.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be 0 (last-token pooling) or more, got {num_tokens}.")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
    if suffix is not None and (not suffix.strip() or "<|" in suffix or suffix != " ".join(suffix.split())):
        raise ValueError(
            f"suffix must be words separated by single spaces, without '<|', got {suffix!r}. Leave it out for none."
        )
    check_loading(prompts, {})
    check_pixels({"min_pixels": min_pixels, "max_pixels": max_pixels})
    if noise_std < 0:
        raise ValueError(f"noise_std must be 0 or more, got {noise_std}.")
    check_empty(output_dir)
    on_hub = not Path(base).exists()
    if on_hub:  # all files are read from the same commit, which is recorded in the configuration
        hub_kwargs["revision"] = extract_commit_hash(cached_file(base, "config.json", **hub_kwargs), None)
    config = AutoConfig.from_pretrained(base, **hub_kwargs)
    family = family_of(config)  # refuses unsupported backbones before the weights are loaded
    processor = getattr(transformers, family.processor).from_pretrained(base, **hub_kwargs)
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    check_base(base, family, processor, known)

    names = [bottleneck_token(index) for index in range(num_tokens)]
    present = [name for name in known if name.startswith("<|btok_")]
    if present and sorted(present) != sorted(names):
        raise ValueError(
            f"{base} already has {len(present)} Bottleneck Tokens, got num_tokens={num_tokens}. "
            f"Use num_tokens={len(present)}, or start from a base without Bottleneck Tokens."
        )

    if present and not getattr(config, "btok_token_ids", None):
        raise ValueError(
            f"The tokenizer of {base} has Bottleneck Tokens, but its config.json has no btok_token_ids. Restore its "
            "config.json, or use btok convert for a checkpoint of the public reproduction."
        )
    for name, given, none in (("order", order, ORDERS[0]), ("suffix", suffix, None)):
        own = getattr(config, f"btok_{name}", none)
        if present and own != given:
            raise ValueError(
                f"{base} already has Bottleneck Tokens and the {name} {own!r}, got {name}={given!r}. Use its {name}, "
                "or start from a base without Bottleneck Tokens."
            )

    settings: dict[str, Any] = {"prompts": prompts}
    if present and prompts is None:  # its instructions are part of its embeddings as its tokens are
        name, missing_is_fine = "config_sentence_transformers.json", {"_raise_exceptions_for_missing_entries": False}
        saved = cached_file(base, name, **hub_kwargs, **missing_is_fine)
        settings = {} if saved is None else json.loads(Path(saved).read_text("utf-8"))

    model, _ = load_stock_model(base, config, dtype=dtype, **hub_kwargs)
    if not present:
        tokenizer.add_tokens(names, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(names) or [tokenizer.eos_token_id]
        if max(ids) >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(max(ids) + 1, pad_to_multiple_of=64, mean_resizing=False)
        row = tokenizer.encode(f" {suffix}", add_special_tokens=False)[-1] if suffix else tokenizer.eos_token_id
        if num_tokens:
            _initialise_rows(model, ids, row, noise_std, seed)
            # Their rows start equal to another token's, so that they would be as likely in plain generation.
            model.generation_config.suppress_tokens = ids
        processor.chat_template = embedding_chat_template(
            processor.chat_template,
            "".join(names) or tokenizer.eos_token,
            family,
            escapes(tokenizer),
            order,
            suffix,
        )
        model.config.btok_order, model.config.btok_suffix = order, suffix
        model.config.btok_token_ids = ids
        model.config.btok_num_tokens = num_tokens
        start = tokenizer.convert_ids_to_tokens(row)
        model.config.btok_initialisation = {"row": start, "noise_std": noise_std, "seed": seed}
    # The name of a local folder is not published. Its configuration may record the Hub id of its own base.
    model.config.btok_base_model = str(base) if on_hub else getattr(config, "btok_base_model", None)
    model.config.btok_base_revision = hub_kwargs["revision"] if on_hub else getattr(config, "btok_base_revision", None)
    bound_rows(processor, model.config)
    family.limit_pixels(processor, min_pixels, max_pixels)
    return write_repository(
        output_dir,
        model.model,
        processor,
        lm_head=untied_head(model),
        generation_config=model.generation_config,
        settings=settings,
    )


def bound_rows(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Have a processor cut rows on the left, and to the model's positions if it knows no limit. In place."""
    # Truncation on the right would remove the Bottleneck Tokens. On the left it removes text. If it would remove media
    # placeholders, the processor raises an error. Both places are set, because save_pretrained compares them.
    tokenizer = processor.tokenizer
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"
    if tokenizer.model_max_length > LARGE_INTEGER:  # what transformers takes for none
        positions = config.get_text_config().max_position_embeddings
        tokenizer.model_max_length = tokenizer.init_kwargs["model_max_length"] = positions


def check_base(base: str | Path, family: Family, processor: ProcessorMixin, known: Collection[str]) -> None:
    """Raise `ValueError` if a processor lacks what rows and targets are made of.

    Args:
        base (`str` or `Path`): Where the processor is from, for the message.
        family (`Family`): The family of its model.
        processor (`ProcessorMixin`): The processor.
        known (`Collection[str]`): The words of its vocabulary.
    """
    if not isinstance(processor.chat_template, str):
        raise ValueError(
            f"{base} must have one chat template, got {type(processor.chat_template).__name__}. Copy "
            "chat_template.jinja or chat_template.json of the instruction-tuned model into the folder."
        )
    absent = [token for token in family.required_tokens if token not in known]
    if absent:
        raise ValueError(f"The tokenizer of {base} lacks {', '.join(absent)}. Use the tokenizer of a {family.name}.")
    if processor.tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {base} has no eos_token, which Bottleneck Tokens are initialised from. Use the "
            f"tokenizer of a {family.name}."
        )
    odd = [token for token, _ in escapes(processor.tokenizer) if not re.fullmatch(r"<[^\s'\\]+", token)]
    if odd:
        raise ValueError(
            f"The tokenizer of {base} has special tokens that are no words after '<': {odd}. The chat template cannot "
            f"escape them in user text. Use the tokenizer of a {family.name}."
        )


def _initialise_rows(model: StockModel, ids: list[int], row: int, noise_std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in filter(None, (model.get_input_embeddings(), untied_head(model))):
            weight = cast(torch.Tensor, layer.weight)
            start = weight[row].float()
            noise = torch.randn(len(ids), len(start), generator=generator) * noise_std * start.std().item()
            weight[ids] = (start + noise.to(start.device)).to(weight.dtype)
