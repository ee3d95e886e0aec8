"""The card and its files for a training run. Their facts are measured in the run or stated in `CardArguments`.

The text of the card is in `card.md.jinja`; how it is rendered is in `hub_card/card.py`.
"""

import dataclasses
import datetime
import io
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from matplotlib.figure import Figure

from btok_hf.hub_card.card import CardArguments, apache_license, hub_id, render_card
from btok_hf.hub_card.examples import evaluation_name, hardware, measured_examples, precision
from btok_hf.hub_names import HUB_TOKEN

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

LOSSES = ("loss", "infonce", "condensation")
PACKAGES = ("btok-hf", "torch", "transformers", "sentence-transformers", "datasets", "peft")
# Arguments of `Trainer` that the card always shows. It also shows all arguments that this library and
# Sentence-Transformers add, and other arguments if they were changed, unless they do not affect the weights (HIDDEN).
SHOWN = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "optim", "max_grad_norm", "seed"),
)
HIDDEN = re.compile(
    r"output_dir|run_name|report_to|(push|hub|logging|log|save|eval|load_best)_.*|disable_tqdm|use_cpu|debug"
    r"|accelerator_config|prediction_loss_only|dataloader_.*|ddp_.*|resume_from_checkpoint"
)


def card_files(
    trainer: "SentenceTransformerTrainer",
    arguments: CardArguments | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    evaluator: "InformationRetrievalEvaluator | None" = None,
    eval_source: str | None = None,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    command: list[str] | None = None,
) -> dict[str, str | bytes]:
    """The files that describe a trained model: card, licence, figures and results.

    Args:
        trainer (`CondensationTrainer`): The trainer after `train()`. Its model, arguments, datasets and log are
            described. The snippets use `trainer.args.hub_model_id`, if set.
        arguments (`CardArguments`, *optional*): Licences and languages.
        sources (`dict[str, str]`, *optional*): File or Hub id of each dataset, by name.
        evaluator (`InformationRetrievalEvaluator`, *optional*): The evaluator of the model. The snippets show its
            first queries, their answers and one more candidate.
        eval_source (`str`, *optional*): File or Hub id of the evaluation data.
        before, after (`dict[str, float]`, *optional*): Metrics of the evaluator before and after training. Required
            with an `evaluator`.
        command (`list[str]`, *optional*): Arguments of the process, `sys.argv`. Tokens are removed, and the home
            directory is replaced by `$HOME`.

    Returns:
        `dict[str, str | bytes]`: Content by path: `README.md`; `LICENSE`, if the licence is `apache-2.0`;
        `.eval_results/<name>.yaml`, if the evaluation data is a benchmark's task (`arguments.eval_task`);
        `assets/loss.png`, if losses were logged; `assets/example_<n>.png`, the images of the snippets.

    Raises:
        ValueError: Metrics without an evaluator or an evaluator without metrics, licences of unknown datasets, or an
            `eval_task` for data that is not on the Hub.
    """
    # A BTokSentenceTransformer and a CondensationConfig: naming them here would import what imports this module.
    model: Any = trainer.model
    args: Any = trainer.args
    arguments = arguments or CardArguments()
    _check_metrics(evaluator, before, after)
    data = _data(trainer.train_dataset, sources or {}, evaluator, eval_source, arguments)
    files: dict[str, str | bytes] = {}
    examples = measured_examples(model, evaluator, files)
    curves = loss_curves(trainer.state.log_history)
    if curves is not None:
        files["assets/loss.png"] = curves
    if arguments.eval_task:
        assert evaluator is not None and eval_source is not None and after is not None  # checked above
        results = _eval_results(evaluator, eval_source, arguments.eval_task, after)
        files[f".eval_results/{Path(eval_source).name}.yaml"] = results
    if arguments.model_license == "apache-2.0":
        files["LICENSE"] = apache_license()
    evaluation = None
    if evaluator is not None:
        assert before is not None and after is not None  # checked above
        evaluation = _evaluation(evaluator, eval_source, before, after)
    files["README.md"] = render_card(
        model.transformer.config,
        model.processor,
        model.prompts,
        arguments,
        repo_id=args.hub_model_id,
        truncate_dim=model.truncate_dim,
        examples=examples,
        training={
            "command": command and _command(command, args),
            "arguments": _arguments(args),
            "rows": _measured(trainer),
            "curves": curves is not None,
            "matryoshka_dims": args.matryoshka_dims,
        }
        if trainer.state.global_step
        else None,
        data=data,
        evaluation=evaluation,
    )
    return files


def _check_metrics(
    evaluator: "InformationRetrievalEvaluator | None",
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
) -> None:
    given = {"evaluator": evaluator, "before": before, "after": after}
    present = [name for name, value in given.items() if value is not None]
    if 0 < len(present) < len(given):
        raise ValueError(f"evaluator, before and after are needed together, got {present}. Pass all three or none.")


def _data(
    train_dataset: Any,
    sources: Mapping[str, str],
    evaluator: "InformationRetrievalEvaluator | None",
    eval_source: str | None,
    arguments: CardArguments,
) -> list[dict[str, Any]]:
    """Rows of the table of datasets."""
    parts = train_dataset if isinstance(train_dataset, dict) else {"pairs": train_dataset}
    rows = [(name, f"{dataset.num_rows:,} rows", sources.get(name), True) for name, dataset in parts.items()]
    if evaluator is not None:
        rows.append((evaluation_name(evaluator), _size(evaluator), eval_source, False))
    arguments.check([name for name, *_ in rows], eval_source)
    return [
        {
            "name": name,
            "size": size,
            "trained": trained,
            "hub_id": hub_id(source),
            "source": source and Path(source).name,
            "license": arguments.data_license(name),
        }
        for name, size, source, trained in rows
    ]


def _metric(evaluator: "InformationRetrievalEvaluator", key: str) -> str:
    return key.removeprefix(f"{evaluator.name}_")


def _size(evaluator: "InformationRetrievalEvaluator") -> str:
    return f"{len(evaluator.queries):,} queries, {len(evaluator.corpus):,} candidates"


def _evaluation(
    evaluator: "InformationRetrievalEvaluator",
    source: str | None,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    rows = [(_metric(evaluator, key), before[key], after[key]) for key in after]
    k = max((k for k in evaluator.accuracy_at_k if k < len(evaluator.corpus)), default=min(evaluator.accuracy_at_k))
    return {
        "name": evaluation_name(evaluator),
        "source": source and Path(source).name,
        "hub_id": hub_id(source),
        "argument": source and repr(hub_id(source) or Path(source).name),
        "size": _size(evaluator),
        "rows": rows,
        "k": k,
        "accuracy": next(value for metric, _, value in rows if metric.endswith(f"_accuracy@{k}")),
    }


def _eval_results(
    evaluator: "InformationRetrievalEvaluator", source: str, task_id: str, after: Mapping[str, float]
) -> str:
    metric = evaluator.primary_metric
    assert metric is not None  # set when the evaluator ran
    entry = EvalResultEntry(
        dataset_id=source,
        task_id=task_id,
        value=float(after[metric]),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=f"{_metric(evaluator, metric)}, {_size(evaluator)}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)


def loss_curves(log_history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Plots of the logged losses over the steps, as PNG; `None` if no loss was logged.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `bytes` or `None`
    """
    curves = {
        name: [(log["step"], log[name]) for log in log_history if "loss" in log and log.get(name) is not None]
        for name in LOSSES
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    figure = Figure(figsize=(3.2 * len(curves), 2.4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axes.plot(*zip(*points), marker="." if len(points) < 20 else None, linewidth=1.5)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _measured(trainer: "SentenceTransformerTrainer") -> list[tuple[str, Any]]:
    """Rows of the table of the run: (name, value)."""
    model: Any = trainer.model
    args: Any = trainer.args
    state = trainer.state
    logs = [log for log in state.log_history if "loss" in log]
    rows: list[tuple[str, Any]] = [
        ("steps", f"{state.global_step:,} ({state.epoch:.2f} epochs)"),
        ("rows per step", args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
    ]
    for log in logs[-1:]:
        losses = ", ".join(f"{name} {log[name]:.4f}" for name in LOSSES if log.get(name) is not None)
        rows.append(("last logged losses", f"{losses} (step {log['step']:,})"))
        speed = [median(part[f"{unit}_per_second"] for part in logs) for unit in ("samples", "tokens")]
        rows.append(("median speed", f"{speed[0]:,.1f} rows, {speed[1]:,.0f} tokens per second"))
    runtimes = [log["train_runtime"] for log in state.log_history if "train_runtime" in log]
    rows += [("minutes", f"{seconds / 60:.1f}") for seconds in runtimes[-1:]]
    rows.append(("hardware", f"{args.world_size} x {hardware(args.device)}"))
    if args.device.type == "cuda":
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated(args.device) / 2**30:.1f} GiB"))
    autocast = ", bf16 autocast" if args.bf16 else ", fp16 autocast" if args.fp16 else ""
    rows += [
        ("precision", f"{precision(model)} weights{autocast}"),
        ("trained parameters", f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"),
    ]
    for adapter in getattr(model.transformer.model, "peft_config", {}).values():
        rows.append(("LoRA", f"rank {adapter.r}, alpha {adapter.lora_alpha}, modules {adapter.target_modules}"))
    rows.append(("versions", ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)))
    return rows


def _arguments(args: Any) -> str:
    """The arguments that affect the weights, as YAML for `--config`."""
    plain = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    values = json.loads(json.dumps(args.to_dict(), default=str))
    chosen = {
        name: value
        for name, value in values.items()
        if value not in (None, "", [], {})
        and not HIDDEN.fullmatch(name)
        and (name not in plain or name in SHOWN or ((value or plain[name]) and value != plain[name]))
    }
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _command(words: list[str], args: Any) -> str:
    """The shell command of the run, without tokens and with `$HOME` for the home directory."""
    launcher = (
        ["python"] if args.world_size == 1 else ["accelerate", "launch", "--num_processes", str(args.world_size)]
    )
    if Path(words[0]).name == "btok" or Path(words[0]).parts[-2:] == ("btok_hf", "__main__.py"):
        launcher = ["btok"] if args.world_size == 1 else [*launcher, "-m", "btok_hf"]
        words = words[1:]
    home = os.path.expanduser("~")
    shown = []
    for word in [*launcher, *words]:
        word = HUB_TOKEN.sub("***", word.replace(args.hub_token, "***") if args.hub_token else word)
        pieces = word.split(home) if len(home) > 1 else [word]
        shown.append('"$HOME"'.join(shlex.quote(piece) if piece or len(pieces) == 1 else "" for piece in pieces))
    return " ".join(shown)
