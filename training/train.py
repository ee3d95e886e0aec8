"""Train an embedding model with Bottleneck Tokens and condensation, and write the repository to publish.

    btok train --config training/recipes/emoji.yaml        (or: python training/train.py --config …)
    accelerate launch --config_file training/accelerate/ddp.yaml -m btok_hf train \\
        --config training/recipes/btok_qwen2vl_2b.yaml --push_to_hub --hub_model_id org/btok-2b

Memory on the device is set by four arguments, the strongest first; the batch size is not one of them:

    --max_pixels              pixels of an image or frame: a token is 28 x 28 of them (32 x 32 for Qwen3-VL)
    --mini_batch_num_tokens   tokens whose activations are alive at once, or
    --mini_batch_size         rows whose activations are alive at once
    --gradient_checkpointing  recomputes the activations of every layer but one, which takes time

The host holds the pixels of whole batches, 24 bytes each (12 with --bf16), times 1 + dataloader_num_workers x
dataloader_prefetch_factor, in every process.

Every field of the arguments below is a flag, and a key of the YAML file. A killed run goes on with
`--resume_from_checkpoint true`.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import AutoConfig, TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, push
from btok_hf.errors import one_line_errors
from btok_hf.files import check_writable
from btok_hf.hub_card.card import CardArguments
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.data import retrieval_evaluator
from btok_hf.training.mixture import condense_of, load_mixture, read_mixture, source_of

logger = logging.get_logger("btok_hf.train")


@dataclass
class ScriptArguments:
    """What to train on and evaluate with."""

    max_pixels: int | None = field(
        default=None, metadata={"help": "Reduce larger images and frames to this many pixels. The first memory knob."}
    )
    train_files: Union[str, None, dict[str, dict]] = field(  # noqa: UP007, RUF036 (what HfArgumentParser can read)
        default=None,
        metadata={
            "help": "A pair file (parquet, jsonl, csv), a Hub dataset or a source of training/sources.py; or a "
            "mapping (in JSON or a YAML file) from dataset name to one of them, or to {file, weight, condense}."
        },
    )
    sources_root: str | None = field(
        default=None, metadata={"help": "Folder that holds the sources of training/sources.py. Default: the Hub."}
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Pair file to evaluate retrieval on before, after and (--eval_strategy) during training."},
    )
    num_tokens: int = field(
        default=4, metadata={"help": "K, for a base model without Bottleneck Tokens; 0 is last-token pooling."}
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Enlarge smaller images to this many pixels."})


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments with defaults that condensation can work with."""

    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Must be 0: GradCache embeds each row twice."})
    lora_task_type: str = field(default="FEATURE_EXTRACTION", metadata={"help": "Task type passed to PEFT."})


def main(arguments=None):
    """Train, export and, if asked, push.

    Args:
        arguments (`list[str]`, *optional*): Flags. Default: those of the process.
    """
    set_up(arguments).run()


def set_up(arguments=None):
    """Everything before the first step: read the flags, check what can be wrong, load data and model.

    Returns:
        `TrainingJob`

    Raises:
        OSError, ValueError: Arguments or data that cannot work.
    """
    parser = TrlParser(
        (ScriptArguments, CondensationConfig, ModelArguments, CardArguments),
        description=__doc__,
        usage="btok train --config RECIPE.yaml [--FIELD VALUE …]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    script, args, model_args, card_args = parser.parse_args_and_config(arguments)

    if model_args.model_name_or_path is None or script.train_files is None:
        raise ValueError("Set model_name_or_path (a Qwen-VL model, with Bottleneck Tokens or not) and train_files.")
    for name in ("load_in_8bit", "load_in_4bit", "attn_implementation"):
        if getattr(model_args, name):
            raise ValueError(
                f"{name} is not supported: weights are trained unquantised, in dtype, with adapters if use_peft is "
                f"set, and the packed forward brings its own attention. Remove {name}."
            )
    check_writable(args.output_dir)
    check_push(args)
    evaluator = retrieval_evaluator(script.eval_file) if script.eval_file else None
    if evaluator is None and args.eval_strategy != "no":
        raise ValueError("eval_strategy asks for evaluation during training: set eval_file.")
    if evaluator is None and args.metric_for_best_model:
        raise ValueError("The best checkpoint is asked for, but nothing is evaluated: set eval_file.")
    files = read_mixture(script.train_files)
    train_dataset, weights, condense = load_mixture(files, script.sources_root)
    args.dataset_weights = args.dataset_weights or weights
    args.condense = condense_of(train_dataset, args.condense, condense)
    card_args.check([*train_dataset, *([evaluator.name] if evaluator else [])], script.eval_file)

    pixels = {name: getattr(script, name) for name in ("min_pixels", "max_pixels") if getattr(script, name)}
    path, revision = starting_point(model_args, script.num_tokens, pixels, args)
    model = BTokSentenceTransformer(
        path,
        revision=revision,
        model_kwargs={"dtype": model_args.dtype or "float32"},
        processor_kwargs=pixels or None,
    )
    # What is pushed is the export; the Trainer would push checkpoints.
    to_push, args.push_to_hub = args.push_to_hub, False
    trainer = CondensationTrainer(
        model=model,
        args=args,
        peft_config=get_peft_config(model_args),
        train_dataset=train_dataset,
        evaluator=evaluator,
    )
    if to_push and args.hub_strategy == HubStrategy.EVERY_SAVE:
        trainer.add_callback(PushEverySave(trainer, card_args))
    sources = {name: source_of(name, entry) for name, entry in files.items()}
    return TrainingJob(trainer, card_args, sources, script.eval_file, to_push)


@dataclass
class TrainingJob:
    """A run that is set up.

    Args:
        trainer (`CondensationTrainer`): With its datasets and, perhaps, evaluator.
        card (`CardArguments`): For the model card.
        sources (`dict[str, str]`): Where each dataset comes from, by name.
        eval_source (`str`, *optional*): Where the evaluator's data comes from.
        to_push (`bool`): Whether to push the export to `args.hub_model_id`.
    """

    trainer: CondensationTrainer
    card: CardArguments
    sources: dict[str, str]
    eval_source: str | None
    to_push: bool

    def run(self):
        """Evaluate, train, evaluate again, export, push."""
        trainer, args = self.trainer, self.trainer.args
        before = trainer.evaluate_retrieval()
        self._choose_best_metric(before)
        resume = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
        after = trainer.evaluate_retrieval()

        measured = {"evaluator": trainer.evaluator, "eval_source": self.eval_source, "before": before, "after": after}
        trainer.export(
            args.output_dir,
            self.card,
            sources=self.sources,
            command=sys.argv,
            **(measured if trainer.evaluator is not None else {}),
        )
        if not trainer.is_world_process_zero():
            return
        metrics = {name: {"before": before[name], "after": after[name]} for name in after}
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
        print(f"Exported to {args.output_dir}")
        for name, values in metrics.items():
            print(f"  {name}: {values['before']:.4f} before, {values['after']:.4f} after training")
        if self.to_push:
            print(f"Pushed to {push_export(args)}")

    def _choose_best_metric(self, metrics):
        """The evaluator's nDCG@10 where `load_best_model_at_end` names no metric; refuse one that is not measured."""
        args = self.trainer.args
        best = args.metric_for_best_model
        if best == "loss":  # what the Trainer sets where load_best_model_at_end is given without a metric
            args.metric_for_best_model = next(name for name in metrics if name.endswith("ndcg@10"))
            args.greater_is_better = True
        elif best and not {best, best.removeprefix("eval_")} & set(metrics):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(metrics)}, got {best!r}. Set it to one of them."
            )


def check_push(args):
    """Refuse a push that could not work, before training."""
    if not args.push_to_hub:
        return
    if args.hub_model_id is None:
        raise ValueError("push_to_hub needs the repository's id, e.g. --hub_model_id org/btok-2b.")
    if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            f"hub_strategy must be end or every_save, got {args.hub_strategy.value}: checkpoints stay on disk, and "
            "what is pushed is always a whole repository."
        )
    try:
        HfApi(token=args.hub_token).whoami()
    except Exception as error:
        # Not chained: the original may hold the token.
        raise ValueError(
            f"push_to_hub needs a Hub login, but asking who you are failed ({type(error).__name__}). Run `hf auth "
            "login`, or set HF_TOKEN to a token that may write."
        ) from None


def push_export(args):
    return push(
        args.output_dir,
        args.hub_model_id,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        token=args.hub_token,
    )


class PushEverySave(TrainerCallback):
    """Exports the model after every checkpoint and pushes it in the background; skipped while the last push runs."""

    def __init__(self, trainer, card):
        self.trainer, self.card = trainer, card
        self.executor = ThreadPoolExecutor(1)
        self.running = None

    def on_save(self, args, state, control, **kwargs):
        # All processes export together, or none.
        if broadcast_object_list([self.running is not None and not self.running.done()])[0]:
            return
        self.trainer.export(args.output_dir, self.card)
        if state.is_world_process_zero:
            self.running = self.executor.submit(self._push, args)

    def _push(self, args):
        try:
            logger.warning(f"Pushed to {push_export(args)}")
        except RuntimeError as error:  # Training goes on; the last push, after it, stops with the error.
            logger.warning(str(error))

    def on_train_end(self, args, state, control, **kwargs):
        self.executor.shutdown()  # waits: the final export writes the same folder


def starting_point(model_args, num_tokens, pixels, args):
    """Path and revision of the model to train; a base model is given its Bottleneck Tokens in `output_dir`/start."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if hasattr(AutoConfig.from_pretrained(name, revision=revision), "btok_token_ids"):
        return name, revision
    start = Path(args.output_dir, "start")
    origin = {"base": name, "revision": revision, "num_tokens": num_tokens, **pixels}
    record = start / "made_from.json"
    with args.main_process_first(local=False):
        if not start.exists():
            unfinished = start.with_name("start.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            add_bottleneck_tokens(name, unfinished, num_tokens, revision=revision, **pixels)
            Path(unfinished, record.name).write_text(json.dumps(origin), "utf-8")
            unfinished.rename(start)
    found = json.loads(record.read_text("utf-8")) if record.is_file() else "something else"
    if found != origin:
        raise ValueError(
            f"{start} was made from {found}, but this run starts from {origin}. Remove it, or name another output_dir."
        )
    return start, None


if __name__ == "__main__":
    with one_line_errors():  # an error of a long run keeps its traceback
        job = set_up()
    job.run()
