"""Generative Information Condensation: one packed forward over [encoded side | Bottleneck Tokens | target].

The target text is predicted token by token. The *Condensation Mask* hides the encoded side from the target tokens.
Information about the input can therefore reach the prediction only through the keys and values of the K Bottleneck
Tokens (BToks) in each layer (Bottleneck Tokens, arXiv 2604.11095, section on the Condensation Mask).

Implementation:
- All rows of a batch are concatenated without padding. A row has up to two segments. The prefix (encoded side and
  BToks) is causal. The target has the BToks and the previous target tokens as its keys. This choice of keys is the
  Condensation Mask: there is no mask of the packed row, no cache and no second forward. It holds for every token
  mixer of a layer: linear attention and convolutions run over the keys of a segment from a zero state.
- All segments share one call of flash attention on a GPU, in half precision. Elsewhere, and in other mixers, those of
  similar shape share a call, with a mask of that shape if they are padded or are targets.
- The layout is passed to the mixers as a keyword argument, so that activation checkpointing recomputes the same.
  (Checkpointing silently drops a key/value cache.)
- Checks, positions and layout are computed on the CPU and copied to the device before the first kernel is queued. On a
  GPU, reading a value waits for all queued kernels.
- Target tokens get the positions after the maximum of the encoded side, as in generation.
- The cross-entropy is computed for 256 target tokens at a time.

The mixers are in `btok_hf/packed_attention.py`, the training loss in `training/condensation_loss.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from btok_hf.backbones import family_of
from btok_hf.features import IGNORED, MEDIA_KEYS, ROW_KEYS, to_device
from btok_hf.modeling.inputs_btok import complete_rows
from btok_hf.modeling.modeling_btok import Backbone, bottleneck_token_ids
from btok_hf.packed_attention import ATTENTION, VISION_ATTENTION, PackedLayout, pack_mixers

CROSS_ENTROPY_ROWS = 256  # rows of logits in memory at once: 256 x 151,936 x 4 bytes = 156 MB


class Condensed(NamedTuple):
    """Output of `condense`.

    Args:
        embeddings (`torch.FloatTensor` of shape `(batch, hidden)`): fp32, L2-normalised.
        token_losses (`torch.FloatTensor` of shape `(supervised,)`):
            Cross-entropy in nats of every supervised target token, row by row.
    """

    embeddings: Tensor
    token_losses: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` in blocks of rows. The backward pass recomputes their logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses, normalisers = [], []
        for rows, targets in zip(hidden.split(CROSS_ENTROPY_ROWS), labels.split(CROSS_ENTROPY_ROWS)):
            logits = (rows @ weight.T).float()
            normalisers.append(logits.logsumexp(1))
            losses.append(normalisers[-1] - logits.gather(1, targets[:, None])[:, 0])
        ctx.save_for_backward(hidden, weight, labels, torch.cat(normalisers))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        blocks = [tensor.split(CROSS_ENTROPY_ROWS) for tensor in (ctx.saved_tensors[0], *ctx.saved_tensors[2:], grad)]
        weight = ctx.saved_tensors[1]
        grad_hidden = []
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows, targets, normaliser, scale in zip(*blocks):
            probabilities = ((rows @ weight.T).float() - normaliser[:, None]).exp_()
            probabilities[torch.arange(len(rows), device=rows.device), targets] -= 1
            grad_logits = probabilities.mul_(scale[:, None]).to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, rows)
        return torch.cat(grad_hidden), grad_weight, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every row, without all `(rows, vocabulary)` logits in memory.

    Args:
        hidden (`torch.Tensor` of shape `(rows, hidden)`): Hidden states that predict the labels.
        weight (`torch.Tensor` of shape `(vocabulary, hidden)`): The language-modelling head.
        labels (`torch.LongTensor` of shape `(rows,)`): Token ids.

    Returns:
        `torch.FloatTensor` of shape `(rows,)`: The loss of each row in nats, fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if len(labels) == 0:
        return hidden.new_zeros(0, dtype=torch.float32)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), labels)


def backbone_and_head(model: torch.nn.Module) -> tuple[Backbone, Tensor | None]:
    """The stock backbone inside `model`, and the weight of its language-modelling head.

    Args:
        model (`torch.nn.Module`): A stock backbone, its `…ForConditionalGeneration`, a `BTokForEmbedding`, or one of
            them wrapped by PEFT.

    Returns:
        `tuple`: The backbone, and the weight of shape `(vocabulary, hidden)` or `None` if there is no head.

    Raises:
        ValueError: An unsupported backbone.
    """
    stock: Any = model
    if hasattr(stock, "get_base_model"):  # wrapped by PEFT
        stock = stock.get_base_model()
    family_of(stock.config)  # refuses unsupported backbones
    backbone = stock.base_model
    head = stock.get_output_embeddings()
    if head is None and stock.config.tie_word_embeddings:
        head = stock.get_input_embeddings()
    return backbone, None if head is None else head.weight


def condense(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    target_ids: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    condensation_mask: bool = True,
    lm_head: Tensor | None = None,
) -> Condensed:
    """Embed a batch and, in the same forward, predict a target text from the Bottleneck Tokens.

    Args:
        model (`torch.nn.Module`): A Qwen-VL backbone with Bottleneck Tokens: stock (`AutoModel`,
            `AutoModelForImageTextToText`), `BTokForEmbedding`, or one of them wrapped by PEFT. Its attention
            implementations are set to `"btok_packed"` (language model) and `"btok_flash_packed"` (vision tower).
            Calls without a packed layout run transformers' SDPA. The vision tower computes the same as SDPA in fewer
            calls. Other token mixers are wrapped (`pack_mixers`).
        inputs (`Mapping[str, torch.Tensor]`): What a processor returns for the encoded side: `input_ids`,
            `attention_mask` and, with media, `mm_token_type_ids`, pixels and grids. Bottleneck Tokens are appended to
            rows that do not end in them. Leave the tensors on the CPU: they are checked there and then copied to the
            model's device.
        target_ids (`torch.LongTensor` of shape `(batch, target_length)`, *optional*):
            Target token ids, right-padded. Without them the batch is only embedded.
        labels (`torch.LongTensor` of shape `(batch, target_length)`, *optional*):
            Aligned with `target_ids` and shifted inside, as in transformers: `labels[:, t]` is predicted from the
            token before `target_ids[:, t]`. For `t = 0` this is the last Bottleneck Token. -100 is unsupervised.
            Tokens after the last supervised label are padding.
        condensation_mask (`bool`): `False` lets the target attend to the encoded side too (ablation).
        lm_head (`torch.Tensor` of shape `(vocabulary, hidden)`, *optional*):
            Head weight, for an untied backbone that was loaded without its head.

    Returns:
        [`Condensed`]: The embeddings, and the loss of every supervised token.

    Raises:
        ValueError: Shapes that do not match, no head to predict with, or media that do not match their placeholders.
    """
    backbone, tied_head = backbone_and_head(model)
    head = tied_head if lm_head is None else lm_head
    if target_ids is None:
        target_ids = labels = torch.empty(len(inputs["input_ids"]), 0, dtype=torch.long)
    if labels is None or labels.shape != target_ids.shape or len(target_ids) != len(inputs["input_ids"]):
        raise ValueError(
            f"target_ids and labels must both have shape (batch={len(inputs['input_ids'])}, target_length), got "
            f"{tuple(target_ids.shape)} and {None if labels is None else tuple(labels.shape)}. Pass both, "
            "right-padded to the same length."
        )
    target_ids, labels = target_ids.cpu(), labels.cpu()
    supervised = labels != IGNORED
    real_target = supervised.flip(1).cummax(1).values.flip(1) if target_ids.shape[1] else supervised
    if target_ids.shape[1]:
        _check_head(head)
    packed, ends = _pack(backbone, inputs, target_ids, real_target, condensation_mask)
    device = packed["input_ids"].device
    num_tokens = len(bottleneck_token_ids(backbone.config))
    bottleneck = to_device(ends[:, None] + torch.arange(-num_tokens, 0), device)
    predictors = to_device((ends[:, None] - 1 + torch.arange(target_ids.shape[1]))[supervised], device)
    labels = to_device(labels[supervised], device)

    hidden = _forward(backbone, packed)
    embeddings = F.normalize(hidden[bottleneck].float().mean(1), dim=-1)
    if len(predictors) == 0:
        return Condensed(embeddings, hidden.new_zeros(0, dtype=torch.float32))
    assert head is not None  # checked above, because there are target tokens
    return Condensed(embeddings, linear_cross_entropy(hidden[predictors], head, labels))


@torch.no_grad()
def reconstruct(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    prompt_ids: list[int],
    stop_id: int,
    *,
    max_new_tokens: int = 32,
    lm_head: Tensor | None = None,
) -> list[list[int]]:
    """Decode the text that the Bottleneck Tokens encode. The decoded tokens attend to them and not to the input.

    Use it to inspect what an embedding keeps. Decoding is greedy. The encoded side runs once, because what follows
    needs only the keys and values of the Bottleneck Tokens. Families with other mixers than attention run the full
    batch for every token.

    Args:
        model, inputs, lm_head: As in [`condense`].
        prompt_ids (`list[int]`): Tokens that every target begins with.
        stop_id (`int`): Token that ends a target.
        max_new_tokens (`int`): Maximum number of decoded tokens per row.

    Returns:
        `list[list[int]]`: The decoded tokens of each row, without prompt and `stop_id`.

    Raises:
        ValueError: No head to predict with, or media that do not match their placeholders.
    """
    backbone, tied_head = backbone_and_head(model)
    head = _check_head(tied_head if lm_head is None else lm_head)
    # The backbone would expect media for a placeholder, and a target never holds a Bottleneck Token: untrained models,
    # whose token rows are close to the last hidden states, would repeat it. With K = 0 it is the token that ends rows.
    tokens = set(bottleneck_token_ids(backbone.config)) - {stop_id}
    excluded = [*family_of(backbone.config).placeholders(backbone.config), *tokens]
    ids = torch.tensor([prompt_ids] * len(inputs["input_ids"]), dtype=torch.long)
    cache = None if family_of(backbone.config).mixers else DynamicCache()
    for count in range(max_new_tokens):
        if cache is None or count == 0:
            packed, ends = _pack(backbone, inputs, ids, torch.ones_like(ids, dtype=torch.bool))
            last = (ends - 1 + ids.shape[1]).to(packed["input_ids"].device)
            states = _forward(backbone, packed, cache)[last]
        else:
            place = packed["position_ids"][..., 0, last, None] + count
            states = _continue(backbone, ids[:, -1:], place, cache)
        if cache is not None and count == 0:
            tokens_and_prompt = len(bottleneck_token_ids(backbone.config)) + len(prompt_ids)
            cache = _rows_of(cache, last[:, None] + torch.arange(1 - tokens_and_prompt, 1, device=last.device))
        logits = states @ head.T.to(states.dtype)
        logits[:, excluded] = -torch.inf
        ids = torch.cat([ids, logits.argmax(1)[:, None].cpu()], 1)
        if (ids[:, len(prompt_ids) :] == stop_id).any(1).all():
            break
    rows = [row[len(prompt_ids) :] for row in ids.tolist()]
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


def check_head(model: torch.nn.Module, lm_head: torch.nn.Module | None) -> None:
    """Raise `ValueError` if neither a model nor `lm_head` can predict targets."""
    _check_head(backbone_and_head(model)[1] if lm_head is None else cast(Tensor, lm_head.weight))


def _check_head(head: Tensor | None) -> Tensor:
    if head is None:
        raise ValueError(
            "This backbone has no language-modelling head to predict the target with: its embeddings are not tied. "
            "Load it with AutoModelForImageTextToText, or pass lm_head. A repository that AutoModel or stock "
            "Sentence-Transformers saved again has lost its head: use the one that it was loaded from."
        )
    return head


@torch.compiler.disable  # host work on NumPy arrays, whose guards fail
def _pack(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    target_ids: Tensor,
    real_target: Tensor,
    condensation_mask: bool = True,
) -> tuple[dict[str, Any], Tensor]:
    """Concatenate the rows of a batch.

    Args:
        backbone, inputs, condensation_mask: As in [`condense`].
        target_ids (`torch.LongTensor` of shape `(batch, target_length)`): On the CPU.
        real_target (`torch.BoolTensor` of shape `(batch, target_length)`): False for padding. On the CPU.

    Returns:
        `tuple`: The arguments of the backbone, on its device, and the start of each row's target, shape `(batch,)`, on
        the CPU.
    """
    device = inputs["input_ids"].device
    if device.type == "cpu":
        device = backbone.device
    token_ids = bottleneck_token_ids(backbone.config)
    rows = {key: torch.as_tensor(inputs[key], device="cpu") for key in ROW_KEYS if inputs.get(key) is not None}
    media = {key: inputs[key] for key in MEDIA_KEYS if inputs.get(key) is not None}
    input_ids, attention_mask, types = complete_rows(backbone.config, token_ids, **{**media, **rows})
    family = family_of(backbone.config)
    positions = family.positions(backbone, input_ids, attention_mask, types, rows)
    real = attention_mask.bool()

    # Each row becomes [encoded side | BToks | target].
    keep = torch.cat([real, real_target], 1)
    # In NumPy: for arrays of this size torch wakes a thread for each core, and waits for those that do other work.
    places = positions.numpy()
    after = np.where(real.numpy(), places, -1).max((0, 2))[:, None] + 1 + np.arange(target_ids.shape[1])
    places = np.concatenate([places, np.broadcast_to(after, (len(places), *after.shape))], 2)[:, keep.numpy()]
    prefix_lengths, target_lengths = real.sum(1), real_target.sum(1)
    starts = F.pad((prefix_lengths + target_lengths).cumsum(0), (1, 0))[:-1]
    segments = []
    for start, prefix, target in torch.stack([starts, prefix_lengths, target_lengths], 1).tolist():
        if not condensation_mask:
            segments.append((start, prefix + target, start, prefix + target))
            continue
        segments.append((start, prefix, start, prefix))
        if target:
            first_key = start + prefix - len(token_ids)
            segments.append((start + prefix, target, first_key, len(token_ids) + target))
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else backbone.dtype
    layout = PackedLayout(segments, device, dtype=dtype, mixes=bool(family.mixers))
    packed = {
        "input_ids": to_device(torch.cat([input_ids, target_ids], 1)[keep][None], device),
        "attention_mask": family.masks(backbone.config),
        # No axis for the only kind of position.
        "position_ids": to_device(torch.from_numpy(places)[:, None].squeeze(0), device),
        "packed_layout": layout,
        **({"seq_idx": layout} if family.mixers else {}),
        **{key: to_device(value, device) for key, value in family.pixels(media).items()},
    }
    return packed, starts + prefix_lengths


def _forward(backbone: Backbone, packed: dict[str, Any], cache: DynamicCache | None = None) -> Tensor:
    """Last hidden states of the packed rows. Shape (length, hidden). A cache takes their keys and values."""
    # Not restored after this call, because activation checkpointing reads it again in the backward pass.
    family = family_of(backbone.config)
    language_model = family.language_model(backbone)
    language_model.config._attn_implementation = ATTENTION
    pack_mixers(language_model, family.mixers)
    if family.packs_images:
        cast(PreTrainedModel, family.vision_tower(backbone)).config._attn_implementation = VISION_ATTENTION
    kept = {"use_cache": cache is not None, "past_key_values": cache}
    return backbone(**packed, **kept, vision_layouts={}).last_hidden_state[0]


def _rows_of(cache: DynamicCache, columns: Tensor) -> DynamicCache | None:
    """The keys and values in these columns `(batch, kept)` of packed rows, as a batch; `None` if there are none."""
    if not cache.get_seq_length():  # with activation checkpointing, in training mode
        return None
    rows = DynamicCache()
    for number, layer in enumerate(cast(list[Any], cache.layers)):
        rows.update(*(states[0][:, columns].transpose(0, 1) for states in (layer.keys, layer.values)), number)
    return rows


def _continue(backbone: Backbone, ids: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """The last hidden state of one more token a row, `(batch, hidden)`, after those in the cache.

    It attends to all of them, so that no mask is needed.
    """
    output = backbone(
        input_ids=to_device(ids, positions.device),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state[:, 0]
