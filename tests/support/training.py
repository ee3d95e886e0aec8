"""Tiny training runs."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F

from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.condensation_collator import CondensationCollator
from support.media import image

QUERIES = [
    "a short one",
    {"image": image(60, 40), "text": "and a picture"},
    "a much longer query than all of the others here",
    {"image": image(56, 84), "text": "see"},
    "five",
    {"image": [image(30, 30), image(40, 60)], "text": "two"},
]

POSITIVES = ["yes", "the answer is longer", "no", "an image of noise", "5", {"image": image(50, 50), "text": "both"}]

NEGATIVES = ["wrong", "also wrong", "not it", "other", "6", "none of them"]


def config(tmp_path, **kwargs):
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0}
    return CondensationConfig(output_dir=str(tmp_path / "out"), **{**defaults, **kwargs})


def batch_features(model, rows=slice(None), condense="both", negatives=True, **kwargs):
    """Features as the trainer hands them to the loss."""
    args = CondensationConfig(output_dir="unused", condense=condense, report_to="none", use_cpu=True, **kwargs)
    collator = CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args)
    columns = [QUERIES, POSITIVES, NEGATIVES][: 3 if negatives else 2]
    batch = collator([dict(zip(("query", "positive", "negative"), row)) for row in list(zip(*columns))[rows]])
    prefixes = ["query_", "positive_", "negative_"][: 3 if negatives else 2]
    return [{key[len(p) :]: value for key, value in batch.items() if key.startswith(p)} for p in prefixes]


def reference_loss(model, features, weight, temperature=0.02, symmetric=False, mask=True):
    """The loss by definition: the whole batch in one graph, without Sentence-Transformers."""
    embeddings, losses = [], []
    for feature in features:
        target = [feature[key][:, 0] if key in feature else None for key in ("target_ids", "target_labels")]
        output = condense(model[0].model, feature, *target, condensation_mask=mask)
        embeddings.append(output.embeddings)
        losses.append(output.token_losses)
    scores = embeddings[0] @ torch.cat(embeddings[1:]).T / temperature
    right = torch.arange(len(scores))
    infonce = F.cross_entropy(scores, right)
    if symmetric:
        infonce = (infonce + F.cross_entropy(scores[:, : len(scores)].T, right)) / 2
    return infonce, torch.cat(losses).mean(), infonce + weight * torch.cat(losses).mean()


def text_pairs(count=12):
    words = ["red", "old", "tall", "wet", "loud", "thin", "deep", "odd", "warm", "slow", "flat", "gray"][:count]
    return Dataset.from_dict({"query": [f"find {w}" for w in words], "positive": [f"{w} thing" for w in words]})


def checkpointed_trainer(repo, folder, lora=None, evaluator=None, pairs=None, **kwargs):
    """A trainer of 6 steps in 2 epochs with a checkpoint every 2."""
    args = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1}
    # It would shrink weights that have zero gradients, and not those that have none.
    args["weight_decay"] = 1.0
    args = {**args, "save_strategy": "steps", "save_steps": 2, **kwargs}
    return CondensationTrainer(
        model=BTokSentenceTransformer(repo, device="cpu"),
        args=config(Path(folder), **args),
        train_dataset=text_pairs() if pairs is None else pairs,
        evaluator=evaluator,
        peft_config=LoraConfig(r=4, lora_dropout=0.0, use_dora=lora == "dora") if lora else None,
    )


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def collator(repo, tmp_path, **kwargs):
    model = BTokSentenceTransformer(repo, device="cpu")
    args = config(tmp_path, **kwargs)
    return CondensationCollator(preprocess_fn=model.preprocess, tokenizer=model.tokenizer, args=args), model.tokenizer
