"""Train an embedding model with Bottleneck Tokens and condensation, and write the repository to publish.

    btok train --config training/recipes/emoji.yaml        (or: python training/train.py --config …)
    accelerate launch --config_file training/accelerate/ddp.yaml -m btok_hf train \\
        --config training/recipes/btok_qwen2vl_2b.yaml --push_to_hub --hub_model_id org/btok-2b

Four arguments set the memory on the device. The batch size is not one of them. Strongest first:

    --max_pixels              pixels of an image or frame: a token is 28 x 28 (Qwen3-VL, Qwen3.5: 32 x 32)
    --mini_batch_num_tokens   tokens per forward pass, or
    --mini_batch_size         rows per forward pass
    --gradient_checkpointing  recomputes the activations of all layers but one, which takes time

Each process also holds complete batches in host memory, 24 bytes a pixel (12 with --bf16):
2 x gradient_accumulation_steps + 1 + dataloader_num_workers x dataloader_prefetch_factor of them.

Every argument below is a flag and a key of the YAML file. --config takes a file, or the name of a recipe of this
library. `--resume_from_checkpoint auto` continues a run that was killed, and starts if there is nothing to continue.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

import yaml
from transformers.trainer_utils import HubStrategy
from trl import ModelConfig, TrlParser, get_peft_config

from btok_hf import BTokSentenceTransformer
from btok_hf.adapters import check_exportable
from btok_hf.arguments import check_pixels
from btok_hf.errors import EXPECTED, RESUME, one_line_errors, take_debug
from btok_hf.files import check_writable
from btok_hf.hub_card.card import CardArguments
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.checkpoints import checkpoint_to_resume
from btok_hf.training.checks import checked_datasets
from btok_hf.training.evaluator import retrieval_evaluator
from btok_hf.training.mixture import condense_of, load_mixture, read_mixture
from btok_hf.training.publishing import PushEverySave, check_push
from btok_hf.training.start import check_starting_point, starting_point

if TYPE_CHECKING:
    from peft import LoraConfig

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ScriptArguments:
    """What to train on and evaluate with."""

    max_pixels: int | None = field(
        default=None,
        metadata={"help": "Reduce larger images and frames to this many pixels. Lower it first to save memory."},
    )
    train_files: Union[str, None, dict[str, dict]] = field(  # noqa: UP007, RUF036 (HfArgumentParser reads no |)
        default=None,
        metadata={
            "help": "A pair file (parquet, jsonl, csv), a Hub dataset or a source of training/sources.py. Or a "
            "mapping (in JSON or a YAML file) from dataset name to one of these, or to {file, name, split, "
            "revision, columns, weight, condense}, of which all but file may be left out."
        },
    )
    sources_root: str | None = field(
        default=None, metadata={"help": "Folder with the downloaded sources of training/sources.py. Default: the Hub."}
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Pair file for retrieval metrics before, after and (--eval_strategy) during training."},
    )
    num_tokens: int | None = field(
        default=None,
        metadata={"help": "Bottleneck Tokens (K) to add to a base model (default: 4); 0 is last-token pooling."},
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Enlarge smaller images to this many pixels."})


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, with defaults that suit condensation."""

    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Must be 0: target tokens run in one GradCache pass only."}
    )
    lora_task_type: str = field(default="FEATURE_EXTRACTION", metadata={"help": "Task type passed to PEFT."})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export and, with `push_to_hub`, push.

    Args:
        arguments (`list[str]`, *optional*): Flags. Default: those of the process.
    """
    set_up(arguments).run()


def set_up(arguments: Sequence[str] | None = None) -> "TrainingJob":
    """Everything before the first step: read the flags, check arguments and data, load the model.

    Returns:
        `TrainingJob`: The run, ready to start.

    Raises:
        OSError, ValueError: Arguments or data that cannot work.
    """
    try:
        return _set_up(arguments)
    except Exception as error:
        if isinstance(error, EXPECTED):
            raise
        # transformers and TRL do not check the types of values in a recipe, and use them in many places.
        raise ValueError(
            f"A flag or a value of the recipe has a wrong type ({type(error).__name__}: {error}). Compare the values "
            "with `btok train --help`; `btok --debug train …` shows where it was used."
        ) from error


def parse(arguments: Sequence[str] | None) -> tuple[Any, ...]:
    """Arguments of each class, from flags and the file of `--config`."""
    parser = TrlParser(
        # TRL's annotation allows several classes only if they are of one type.
        (ScriptArguments, CondensationConfig, ModelArguments, CardArguments),  # type: ignore[arg-type]
        description=__doc__,
        usage="btok train --config RECIPE.yaml [--FIELD VALUE …]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    if "--config" in words:
        place = words.index("--config") + 1
        words[place] = str(find_recipe(words[place]))
    try:
        *parsed, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The file of --config is not YAML ({error}).") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"The file of --config must hold names of flags with their values ({error}).") from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def find_recipe(name: str) -> Path:
    """The file of `--config`: a path, or the name of a recipe of this library, with or without `.yaml`."""
    own = [RECIPES / name, RECIPES / f"{name}.yaml"] if Path(name).name == name else []
    found = next((path for path in (Path(name), *own) if path.is_file()), None)
    if found is None:
        known = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("mixture"))
        raise FileNotFoundError(
            f"--config {name!r} is not a file and not one of this library's recipes: {', '.join(known)}."
        )
    return found


def _set_up(arguments: Sequence[str] | None) -> "TrainingJob":
    script, args, model_args, card_args = parse(arguments)
    # First what is checked in seconds: the data of a large run takes an hour to load.
    if model_args.model_name_or_path is None or script.train_files is None:
        raise ValueError("Set model_name_or_path (a model with Bottleneck Tokens, or without) and train_files.")
    for name in ("load_in_8bit", "load_in_4bit", "attn_implementation"):
        if getattr(model_args, name):
            raise ValueError(
                f"{name} is not supported: weights are trained without quantisation, in dtype, and the packed forward "
                f"has its own attention. Remove {name}; for adapters set use_peft."
            )
    if script.eval_file is None and args.eval_strategy != "no":
        raise ValueError("eval_strategy needs data to evaluate on: set eval_file.")
    if script.eval_file is None and args.metric_for_best_model:
        raise ValueError("The best checkpoint is requested, but nothing is evaluated: set eval_file.")
    saves = args.save_strategy != "no" or args.enable_jit_checkpoint
    args.resume_from_checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir, saves)
    check_writable(args.output_dir)
    pixels = {
        name: getattr(script, name) for name in ("min_pixels", "max_pixels") if getattr(script, name) is not None
    }
    check_pixels(pixels)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    start = (name, Path(args.output_dir, "start"))
    has_tokens = check_starting_point(*start, script.num_tokens, revision, **pixels)
    adapters = adapters_of(model_args)
    check_push(args)
    with args.main_process_first():  # the others read what it has cached
        evaluator = retrieval_evaluator(script.eval_file) if script.eval_file else None
    entries = read_mixture(script.train_files)
    names = list(entries) if isinstance(entries, Mapping) else []
    card_args.check([*names, *([evaluator.name] if evaluator else [])], script.eval_file)
    with args.main_process_first():
        mixture = load_mixture(script.train_files, script.sources_root)
    args.dataset_weights = args.dataset_weights or mixture.weights
    args.condense = condense_of(mixture.datasets, args.condense, mixture.condense)
    # Before a large model is written and loaded. The trainer checks all rows.
    checked_datasets("train_dataset", {name: part.take(1000) for name, part in mixture.datasets.items()}, args)
    model = BTokSentenceTransformer(
        starting_point(*start, args, script.num_tokens, revision, **pixels),
        revision=revision if has_tokens else None,
        model_kwargs={"dtype": model_args.dtype or "float32"},
        processor_kwargs=pixels or None,
    )
    # The Trainer would push checkpoints. This script pushes the export.
    to_push, args.push_to_hub = args.push_to_hub, False
    trainer = CondensationTrainer(
        model=model,
        args=args,
        peft_config=adapters,
        train_dataset=mixture.datasets,
        evaluator=evaluator,
    )
    if to_push and args.hub_strategy == HubStrategy.EVERY_SAVE:
        trainer.add_callback(PushEverySave(trainer, card_args))
    trainer.check_start(args.resume_from_checkpoint, export=True)
    return TrainingJob(trainer, card_args, mixture.sources, script.eval_file, to_push)


@dataclass
class TrainingJob:
    """A run that is set up.

    Args:
        trainer (`CondensationTrainer`): The trainer with its datasets and, if there is one, its evaluator.
        card (`CardArguments`): Arguments of the model card.
        sources (`dict[str, str]`): Where each dataset comes from, by name.
        eval_source (`str`, *optional*): Where the evaluator's data comes from.
        to_push (`bool`): Whether to push the export to `args.hub_model_id`.
    """

    trainer: CondensationTrainer
    card: CardArguments
    sources: dict[str, str]
    eval_source: str | None
    to_push: bool

    def run(self) -> None:
        """Evaluate, train, evaluate again, export, push.

        Raises:
            RuntimeError: With `enable_jit_checkpoint`, the training was stopped before its last step, as by SIGTERM.
                An unfinished model is neither exported nor pushed.
        """
        trainer, args = self.trainer, self.trainer.args
        before = trainer.evaluate_retrieval()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        done, planned = trainer.state.global_step, trainer.state.max_steps
        if args.enable_jit_checkpoint and done < planned:
            raise RuntimeError(f"Training stopped at step {done} of {planned}, so nothing is exported{RESUME}.")
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
            print(f"Pushed to {trainer.push_export()}")


def adapters_of(model_args: ModelArguments) -> "LoraConfig | None":
    """The adapters of `use_peft`, if they can be trained and exported; else `ValueError`."""
    if not model_args.use_peft:
        of_lora = [one for one in fields(model_args) if re.match(r"lora_|use_rslora|use_dora", one.name)]
        if given := [one.name for one in of_lora if getattr(model_args, one.name) != one.default]:
            raise ValueError(
                f"{', '.join(given)} would change nothing without use_peft: all weights would be trained. Set "
                "use_peft, or leave that out."
            )
    modules = model_args.lora_target_modules
    # TRL makes a text of a list of one name, and PEFT reads a text as a regular expression of whole names.
    if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        model_args.lora_target_modules = [modules]
    adapters = cast("LoraConfig | None", get_peft_config(model_args))  # annotated as its base class
    if adapters is not None:
        check_exportable(adapters)
        if model_args.lora_dropout:
            raise ValueError(
                f"lora_dropout must be 0, got {model_args.lora_dropout}: the two passes of GradCache would use "
                "different dropout masks. Set it to 0."
            )
    return adapters


if __name__ == "__main__":
    sys.argv[1:], debug = take_debug(sys.argv[1:])
    try:
        with one_line_errors(debug):  # an error of a long run keeps its traceback
            job = set_up()
        job.run()
    except KeyboardInterrupt:
        print("interrupted" + RESUME, file=sys.stderr)
        sys.exit(130)
