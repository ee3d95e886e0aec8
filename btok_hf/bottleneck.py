"""Give a base vision-language model its Bottleneck Tokens: vocabulary entries, embedding rows, chat template.

K = 0 is the last-token-pooling baseline: nothing is added, and every row ends in the EOS token, which then plays the
part of a single Bottleneck Token everywhere else in the library.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor
from transformers.utils.hub import cached_file, extract_commit_hash

from btok_hf.export import stock_model, untied_head, write_repository
from btok_hf.modeling.modeling_btok import load_stock_model, stock_class

REQUIRED_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Rendered when no generation prompt is asked for: media, instruction (system message), text, Bottleneck Tokens,
# separated by one space. `<|` in anything the user wrote is broken up, so that no text can become a special token.
EMBEDDING_TEMPLATE = Path(__file__).with_name("embedding_template.jinja").read_text("utf-8")


def bottleneck_token(index):
    """The name of the Bottleneck Token with this index, as in the paper's reproduction."""
    return f"<|btok_{index}|>"


def embedding_chat_template(base_template, suffix):
    """A template that renders rows to embed, ending in `suffix`, and the base's chat when a reply is asked for."""
    return (
        "{%- if add_generation_prompt -%}\n"
        + base_template
        + "{%- else -%}\n"
        + EMBEDDING_TEMPLATE
        + ("{{- '" + suffix + "' -}}\n{%- endif -%}\n")
    )


def add_bottleneck_tokens(
    base,
    output_dir,
    num_tokens=4,
    *,
    noise_std=0.0,
    seed=0,
    min_pixels=None,
    max_pixels=None,
    prompts=None,
    dtype="auto",
    **hub_kwargs,
):
    """Turn a base checkpoint into a repository with Bottleneck Tokens, ready to train or (untrained) to load.

    The tokens take spare rows of the vocabulary. Only if none are left is the embedding grown, to a multiple of 64;
    it never shrinks. Their rows start at the EOS row.

    Args:
        base (`str`): Local folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint with its processor.
        output_dir (`str` or `Path`): Folder to write. Must not hold a model yet.
        num_tokens (`int`): K. 4 in the paper; 0 is the last-token-pooling baseline.
        noise_std (`float`): Standard deviation of normal noise added to each row, relative to the EOS row's own.
        seed (`int`): Seed of that noise.
        min_pixels (`int`, *optional*): Smaller images are enlarged to this many pixels. Default: the base's.
        max_pixels (`int`, *optional*): Larger images and frames are reduced to this many pixels. This is the memory
            knob: a merged patch of 28 x 28 pixels is a token (32 x 32 for Qwen3-VL). Default: the base's.
        prompts (`dict[str, str]`, *optional*): Instructions by name, e.g. `query` and `document`, saved with the
            model for `encode_query` and `encode_document`.
        dtype (`str` or `torch.dtype`): Precision to load and save in. Default: the checkpoint's.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: A model in `output_dir`, an unsupported backbone, a base without a chat template or the Qwen-VL
            special tokens, one that has Bottleneck Tokens of another count, or a checkpoint with missing or
            unexpected tensors.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be 0 (last-token pooling) or more, got {num_tokens}.")
    if Path(output_dir, "config.json").exists():
        raise ValueError(f"{output_dir} already holds a model. Remove it or name another output_dir.")
    on_hub = not Path(base).exists()
    if on_hub:  # everything is read from one commit, which is recorded
        hub_kwargs["revision"] = extract_commit_hash(cached_file(base, "config.json", **hub_kwargs), None)
    config = AutoConfig.from_pretrained(base, **hub_kwargs)
    stock_class(config)  # refuses unsupported backbones before anything large is loaded
    processor = AutoProcessor.from_pretrained(base, **hub_kwargs)
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    _check_base(base, processor, known)

    names = [bottleneck_token(index) for index in range(num_tokens)]
    present = [name for name in known if name.startswith("<|btok_")]
    if present and sorted(present) != sorted(names):
        raise ValueError(
            f"{base} already has {len(present)} Bottleneck Tokens and cannot be given {num_tokens}. "
            f"Use num_tokens={len(present)}, or start from a base without them."
        )

    model, _ = load_stock_model(base, config, dtype=dtype, **hub_kwargs)
    if not present:
        tokenizer.add_tokens(names, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(names) or [tokenizer.eos_token_id]
        if max(ids) >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(max(ids) + 1, pad_to_multiple_of=64, mean_resizing=False)
        if num_tokens:
            _initialise_rows(model, ids, tokenizer.eos_token_id, noise_std, seed)
            # Their logits start equal to EOS's: keep plain generation from ever choosing one.
            model.generation_config.suppress_tokens = ids
        processor.chat_template = embedding_chat_template(
            processor.chat_template, "".join(names) or tokenizer.eos_token
        )
        model.config.btok_token_ids = ids
        model.config.btok_num_tokens = num_tokens
        model.config.btok_initialisation = {"row": tokenizer.eos_token, "noise_std": noise_std, "seed": seed}
    # A local folder's name means nothing to others, but it may know what it was made from.
    model.config.btok_base_model = str(base) if on_hub else getattr(config, "btok_base_model", None)
    model.config.btok_base_revision = hub_kwargs["revision"] if on_hub else getattr(config, "btok_base_revision", None)
    # The per-frame cap of the reference implementation, which transformers is moving to.
    processor.video_processor.cap_pixels_per_frame = True
    # Right-truncation would cut the Bottleneck Tokens off. From the left it cuts text, or, where media come first,
    # placeholders, which the processor refuses. Set in both places, because save_pretrained compares the two.
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"
    _set_pixels(processor, min_pixels, max_pixels)
    # A fresh model around the same tensors: the loaded one would be saved in the layout it was read from, and stock
    # AutoModel leaves the vision tower of one of the layouts random.
    model = stock_model(model.model, untied_head(model), model.generation_config)
    return write_repository(output_dir, model, processor, prompts=prompts)


def _check_base(base, processor, known):
    if not isinstance(processor.chat_template, str):
        raise ValueError(
            f"{base} has no (single) chat template, which rows are rendered with. Copy chat_template.jinja or "
            "chat_template.json of the instruction-tuned model into the folder."
        )
    absent = [token for token in REQUIRED_TOKENS if token not in known]
    if absent:
        raise ValueError(f"The tokenizer of {base} lacks {', '.join(absent)}. Use the Qwen-VL tokenizer of the model.")
    if processor.tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {base} has no eos_token, which Bottleneck Tokens are initialised from.")
    odd = [token for token in processor.tokenizer.all_special_tokens if not token.startswith("<|")]
    if odd:
        raise ValueError(
            f"The tokenizer of {base} has special tokens that do not start with '<|': {odd}. The chat template could "
            "not keep users from typing them."
        )


def _initialise_rows(model, ids, eos_id, noise_std, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in filter(None, (model.get_input_embeddings(), untied_head(model))):
            eos = layer.weight[eos_id].float()
            noise = torch.randn(len(ids), len(eos), generator=generator) * noise_std * eos.std().item()
            layer.weight[ids] = (eos + noise.to(eos.device)).to(layer.weight.dtype)


def _set_pixels(processor, min_pixels, max_pixels):
    """Bound the pixels of an image, and of a video frame, through the processors' own `size`."""
    for part in (processor.image_processor, processor.video_processor):
        limits = {
            "shortest_edge": part.size["shortest_edge"] if min_pixels is None else min_pixels,
            "longest_edge": part.size["longest_edge"] if max_pixels is None else max_pixels,
        }
        if limits["shortest_edge"] > limits["longest_edge"]:
            raise ValueError(
                f"min_pixels={limits['shortest_edge']} must not exceed max_pixels={limits['longest_edge']}."
            )
        part.size = limits
