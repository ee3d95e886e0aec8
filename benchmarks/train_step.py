"""Speed and memory of a training step: packed condensation against alternatives.

    python -m benchmarks.train_step    # 16 minutes on one CPU core with --rounds 3

It writes benchmarks/results/train_step.json. On a GPU the batches are larger, and LoRA adapters are trained instead of
all weights.

Contenders, all with GradCache over the same mini-batches, InfoNCE and (but the last) condensation of λ = 5:

- packed: this library.
- dense: padded batches, the Condensation Mask as a matrix.
- split: the encoded side in one forward, the target in a second over the Bottleneck Tokens' cached keys and values.
- stock: CachedMultipleNegativesRankingLoss of Sentence-Transformers with last-token pooling, no condensation.

Loss and gradients of the first three are compared before anything is timed. Peak memory is measured in a fresh process
for each setting: the process's peak above what it held before the step. On a GPU it is the allocator's peak, and one
process is enough.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

from benchmarks import ROOT
from benchmarks.bench import (
    DEVICE,
    arguments,
    compare,
    exact_texts,
    free,
    mixture,
    names,
    peak_of,
    record,
    repository,
    show,
    summary,
    texts,
)
from benchmarks.dense_mask import dense_condensation_mask
from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import (
    Condensed,
    backbone_and_head,
    condense,
    linear_cross_entropy,
)
from btok_hf.features import IGNORED
from btok_hf.modeling.inputs_btok import last_positions
from btok_hf.modeling.modeling_btok import bottleneck_token_ids
from btok_hf.training import CondensationConfig, CondensationLoss
from btok_hf.training.condensation_collator import CondensationCollator

TEMPERATURE = 0.05
MEMORY_BATCHES = (64, 256, 1024, 4096)
BATCHES = (("ragged", 16, 4), ("long", 4, 2)) if DEVICE == "cpu" else (("ragged", 64, 16), ("long", 16, 4))
LORA = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")


def _moved(parts, device):
    return tree_map_only(torch.Tensor, lambda x: x.to(device), parts)


def _after(positions, target_ids):
    """Positions of the targets, shape (batch, target_length)."""
    return positions.amax(1)[:, None] + 1 + torch.arange(target_ids.shape[1], device=positions.device)


def _condensed(hidden, prefix, target_hidden, labels, head, num_tokens):
    """What `condense` returns, from padded states of the encoded side and of the targets."""
    columns = last_positions(prefix, num_tokens)
    bottleneck = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
    embeddings = F.normalize(bottleneck.float().mean(1), dim=-1)
    if labels is None:
        return Condensed(embeddings, hidden.new_zeros(0, dtype=torch.float32))
    predictors = torch.cat([bottleneck[:, -1:], target_hidden[:, :-1]], 1)[labels != IGNORED]
    return Condensed(embeddings, linear_cross_entropy(predictors, head, labels[labels != IGNORED]))


def condense_dense(model, inputs, target_ids=None, labels=None, *, condensation_mask=True, lm_head=None):
    """Texts only: padded rows and the mask as a matrix."""
    backbone, head = backbone_and_head(model)
    num_tokens = len(bottleneck_token_ids(backbone.config))
    inputs, target_ids, labels = _moved((dict(inputs), target_ids, labels), backbone.device)
    prefix, ids = inputs["attention_mask"], inputs["input_ids"]
    positions, mask = (prefix.cumsum(1) - 1).clamp(min=0) * prefix, prefix
    if target_ids is not None:
        target = (labels != IGNORED).flip(1).cummax(1).values.flip(1)
        visible = dense_condensation_mask(prefix, target, num_tokens)
        dtype = backbone.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device)
        mask = mask.masked_fill(~visible, torch.finfo(dtype).min)
        positions = torch.cat([positions, _after(positions, target_ids)], 1)
        ids = torch.cat([ids, target_ids], 1)
    hidden = backbone(
        input_ids=ids, attention_mask=mask, position_ids=positions.expand(3, -1, -1), use_cache=False
    ).last_hidden_state
    length = prefix.shape[1]
    return _condensed(hidden[:, :length], prefix, hidden[:, length:], labels, head, num_tokens)


def condense_split(model, inputs, target_ids=None, labels=None, *, condensation_mask=True, lm_head=None):
    """Texts only: two forwards, the second over the keys and values of the Bottleneck Tokens."""
    backbone, head = backbone_and_head(model)
    num_tokens = len(bottleneck_token_ids(backbone.config))
    inputs, target_ids, labels = _moved((dict(inputs), target_ids, labels), backbone.device)
    prefix = inputs["attention_mask"]
    positions = (prefix.cumsum(1) - 1).clamp(min=0) * prefix
    output = backbone(
        input_ids=inputs["input_ids"],
        attention_mask=prefix,
        position_ids=positions.expand(3, -1, -1),
        use_cache=target_ids is not None,
    )
    target_hidden = None
    if target_ids is not None:
        columns, kept = last_positions(prefix, num_tokens)[:, None, :, None], DynamicCache()
        for index, layer in enumerate(output.past_key_values.layers):
            at = columns.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            kept.update(layer.keys.gather(2, at), layer.values.gather(2, at), index)
        target = (labels != IGNORED).flip(1).cummax(1).values.flip(1).long()
        target_hidden = backbone(
            input_ids=target_ids,
            attention_mask=torch.cat([prefix.new_ones(len(prefix), num_tokens), target], 1),
            position_ids=_after(positions, target_ids).expand(3, -1, -1),
            past_key_values=kept,
        ).last_hidden_state
    return _condensed(output.last_hidden_state, prefix, target_hidden, labels, head, num_tokens)


CONDENSE = {"packed": condense, "dense": condense_dense, "split": condense_split}
# On a GPU, also packed without flash attention, and with activation checkpointing.
COMPARED = tuple(CONDENSE) if DEVICE == "cpu" else ("packed", "dense", "grouped", "checkpointing")


def batch(model, kind, rows):
    """Features of a batch: `ragged` texts and targets from real data, `long` ones, `names`, or `media` and names."""
    if kind == "ragged":
        queries = mixture("texts", rows)
        # Of any kind too: a name may ask for a module.
        positives = [pool[-1 - i // 4 % len(pool)] for i in range(rows) for pool in [texts()[(i + 1) % 4]]]
        targets = positives
    elif kind == "long":
        queries = exact_texts(model.tokenizer, 1024, rows)
        positives = exact_texts(model.tokenizer, 32, rows)
        targets = exact_texts(model.tokenizer, 63, rows)  # and the end token
    else:
        queries = [names()[2 * i % len(names())] for i in range(rows)]
        if kind == "media":  # images alone and with a text, and videos of two frames, in turns
            pictures = mixture("images", rows)
            forms = (lambda x: x, lambda x: {"image": x, "text": "a"}, lambda x: {"video": [x.resize((56, 56))] * 2})
            queries = [forms[i % 3](picture) for i, picture in enumerate(pictures)]
        positives = targets = [names()[(2 * i + 1) % len(names())] for i in range(rows)]
    args = CondensationConfig(output_dir=str(ROOT / "runs" / "bench" / "args"), report_to="none", condense="positive")
    collator = CondensationCollator(
        preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args, deduplicate=False
    )
    collated = collator([{"query": q, "positive": p, "target": t} for q, p, t in zip(queries, positives, targets)])
    features = []
    for side in ("query", "positive"):
        part = {key.removeprefix(f"{side}_"): value for key, value in collated.items() if key.startswith(f"{side}_")}
        features.append({k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in part.items()})
    return features


def stock_batch(model, kind, rows, tokenizer_model):
    """The same texts for the stock pipeline."""
    features = []
    for part in batch(tokenizer_model, kind, rows):
        ids = [row[mask.bool()] for row, mask in zip(part["input_ids"], part["attention_mask"])]
        # Rows end in the end token instead of the Bottleneck Tokens.
        ends = model.tokenizer.eos_token_id
        ids = [torch.cat([row[:-4], row.new_tensor([ends])]) for row in ids]
        pad = {"batch_first": True, "padding_side": "right"}
        features.append(
            {
                "input_ids": torch.nn.utils.rnn.pad_sequence(ids, padding_value=model.tokenizer.pad_token_id, **pad),
                "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], **pad),
            }
        )
    return features


def contender(name, size, kind, rows, mini_batch, checkpointing=False, four=None):
    """A callable that takes one training step (forward, backward, gradients dropped) and returns the loss.

    Contenders may share the model `four`, but not the stock one.
    """
    free()
    if four is None:
        four = BTokSentenceTransformer(repository(size, 4))
        adapt(four)
    if name == "stock":
        model = SentenceTransformer(repository(size, 0), device=four.device)
        features = _moved(stock_batch(model, kind, rows, four), model.device)  # as its trainer does
        adapt(model)
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch)
    else:
        model, features = four, batch(four, kind, rows)
        loss = CondensationLoss(model, temperature=TEMPERATURE, mini_batch_size=mini_batch)
    model.train()

    def step(keep=False):
        # The model may be shared.
        if checkpointing:
            model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model[0].model.gradient_checkpointing_disable()
        with patch("btok_hf.transformer.condense", CONDENSE.get(name, condense)), without_flash(name):
            value = loss([dict(feature) for feature in features], None)
            value.backward()
        if not keep:
            model.zero_grad(set_to_none=True)
        return value.detach()

    step.model = model
    step.tokens = sum(int(feature["attention_mask"].sum()) for feature in features)
    step.targets = sum(int((f["target_labels"] != IGNORED).sum()) for f in features if "target_labels" in f)
    return step


def adapt(model):
    """On a GPU, LoRA adapters are trained."""
    if DEVICE == "cuda":
        inject_adapter_in_model(LORA, model[0].model)


def without_flash(name):
    """Packed attention as grouped SDPA, for the contender with this name."""
    if name != "grouped":
        return nullcontext()
    return patch("btok_hf.packed_attention._has_flash", lambda device, dtype: False)


def check_equal(steps):
    """The contenders with condensation must have the same gradients. Returns the largest difference, and GPU peaks."""
    found, peaks = {}, {}
    if DEVICE == "cuda":  # the first step starts libraries; on a CPU, peaks need processes of their own
        peaks["stock"] = peak_of(steps["stock"])
    for name in COMPARED:
        step = partial(steps[name], keep=True)
        if DEVICE == "cuda":
            peaks[name] = peak_of(step)
        else:
            step()
        found[name] = {key: p.grad.clone() for key, p in steps[name].model.named_parameters() if p.grad is not None}
        steps[name].model.zero_grad(set_to_none=True)
    flat = {name: torch.cat([part.float().flatten() for part in parts.values()]) for name, parts in found.items()}
    error = max(((flat["packed"] - other).norm() / other.norm()).item() for other in flat.values())
    limit = 1e-4 if steps["packed"].model.dtype == torch.float32 else 0.1
    if not error <= limit:
        raise SystemExit(f"Contenders disagree: largest difference of gradients {error:.1e}. Nothing was timed.")
    return error, peaks


def speed(size, rounds):
    rows = []
    for kind, count, mini_batch in BATCHES:
        steps = {"packed": contender("packed", size, kind, count, mini_batch)}
        for name in (*COMPARED[1:], "stock"):
            setting = (name, size, kind, count, mini_batch, name == "checkpointing")
            steps[name] = contender(*setting, four=steps["packed"].model)
        error, peaks = check_equal(steps)
        found = summary(compare(steps, rounds), "packed")
        for name, step in steps.items():
            rows.append(
                show(
                    {
                        "table": "speed",
                        "batch": kind,
                        "rows": count,
                        "mini_batch": mini_batch,
                        "tokens": step.tokens,
                        "target_tokens": step.targets,
                        "contender": name,
                        "median_s": found[name]["median_s"],
                        "quartiles_s": found[name]["quartiles_s"],
                        "tokens_per_s": round((step.tokens + step.targets) / found[name]["median_s"]),
                        "times_packed": round(1 / found[name]["speed_ratio"], 3),
                        "gradients_differ_by": float(f"{error:.1e}"),
                        **({"peak_gb": round(peaks[name], 2)} if peaks else {}),
                    }
                )
            )
    return rows


def _peak_of_a_process(setting):
    command = [sys.executable, "-m", "benchmarks.train_step", "--one", json.dumps(setting)]
    command += ["--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def memory(size):
    settings = [
        (name, size, *BATCHES[0], checkpointing)
        for checkpointing in (False, True)
        for name in (*CONDENSE, "stock")
        # A key/value cache is dropped under checkpointing.
        if not (name == "split" and checkpointing)
    ]
    settings += [("packed", size, "names", count, 32, False) for count in MEMORY_BATCHES]
    rows = []
    for setting in settings:
        value = peak_of(contender(*setting)) if DEVICE == "cuda" else _peak_of_a_process(setting)
        keys = ("contender", "size", "batch", "rows", "mini_batch", "checkpointing")
        rows.append(show({"table": "memory", **dict(zip(keys, setting)), "peak_gb": round(value, 3)}))
    return rows


def main():
    options = arguments(
        __doc__,
        rounds=5,
        tables={"nargs": "+", "default": ["speed", "memory"]},
        one={"type": json.loads, "help": "(internal) measure one setting"},
    )
    if options.one:
        print(peak_of(contender(*options.one)))
        return
    rows = speed(options.size, options.rounds) if "speed" in options.tables else []
    free()
    rows += memory(options.size) if "memory" in options.tables else []
    record("train_step", rows, size=options.size)


if __name__ == "__main__":
    main()
