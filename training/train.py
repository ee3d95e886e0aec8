"""Train an embedding model with Bottleneck Tokens and condensation, and write the repository to publish.

    python training/train.py --config training/recipes/emoji.yaml
    python training/train.py --config training/recipes/emoji.yaml --condensation_weight 0 --output_dir runs/no_gic
    accelerate launch training/train.py --config my.yaml --push_to_hub --hub_model_id org/btok-2b

Every field of the arguments below is a flag, and a key of the YAML file. The largest memory knobs are
`--mini_batch_size`, `--max_pixels` and `--gradient_checkpointing`.
"""

import json
import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from trl import ModelConfig, TrlParser, get_peft_config

from btok_hf import BTokSentenceTransformer, export_model
from btok_hf.hub_card import render_card
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.data import load_pairs, retrieval_evaluator


@dataclass
class ScriptArguments:
    """What to train on and evaluate with."""

    train_files: Union[str, None, dict[str, str]] = field(  # noqa: UP007, RUF036 (what HfArgumentParser can read)
        default=None,
        metadata={
            "help": "A pair file (parquet, jsonl, csv) or Hub dataset with the columns query, positive[, negative…, "
            "target], or a mapping (in JSON) from dataset name to file."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Pair file to evaluate retrieval on before and after training."}
    )
    max_pixels: int | None = field(default=None, metadata={"help": "Reduce larger images to this many pixels."})
    model_license: str | None = field(default=None, metadata={"help": "License id for the model card."})


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments with defaults that condensation can work with."""

    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Must be 0: GradCache embeds each row twice."})
    lora_task_type: str = field(default="FEATURE_EXTRACTION", metadata={"help": "Task type passed to PEFT."})


def main():
    parser = TrlParser((ScriptArguments, CondensationConfig, ModelArguments))
    script, args, model_args = parser.parse_args_and_config()
    if model_args.model_name_or_path is None or script.train_files is None:
        raise ValueError("Set model_name_or_path (a repository with Bottleneck Tokens) and train_files.")
    files = script.train_files
    if isinstance(files, str):
        files = json.loads(files) if files.lstrip().startswith("{") else {Path(files).stem: files}
    train_dataset = {name: load_pairs(source) for name, source in files.items()}
    evaluator = retrieval_evaluator(script.eval_file) if script.eval_file else None

    model = BTokSentenceTransformer(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        model_kwargs={"dtype": model_args.dtype or "float32"},
        processor_kwargs={"max_pixels": script.max_pixels} if script.max_pixels else None,
    )
    # The repository is pushed once, after export; the Trainer would push checkpoints with optimizer states.
    push, args.push_to_hub = args.push_to_hub, False
    trainer = CondensationTrainer(
        model=model, args=args, peft_config=get_peft_config(model_args), train_dataset=train_dataset
    )
    before = evaluator(model) if evaluator else {}
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = evaluator(model) if evaluator else {}

    if trainer.is_world_process_zero():
        metrics = {key: {"before": before[key], "after": after[key]} for key in after}
        card = render_card(
            model.config,
            model.processor,
            model.prompts,
            license=script.model_license,
            command=" ".join(map(shlex.quote, ["python", *sys.argv])),
            evaluation=[(key, f"{before[key]:.4f}", f"{after[key]:.4f}") for key in after],
            evaluation_note=evaluator
            and f"{len(evaluator.queries)} queries, {len(evaluator.corpus)} candidates "
            f"(`{Path(script.eval_file).name}`).",
            training=training_summary(args, train_dataset, result),
        )
        export_model(model, args.output_dir, card=card)
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
        print(f"Exported to {args.output_dir}")
        for key, values in metrics.items():
            print(f"  {key}: {values['before']:.4f} before, {values['after']:.4f} after training")
        if push:
            push_folder(args)


def training_summary(args, train_dataset, result):
    """Rows of the card's training table."""
    rows = [(f"pairs in {name}", f"{len(dataset):,}") for name, dataset in train_dataset.items()]
    rows += [
        ("steps", f"{math.ceil(result.global_step):,}"),
        ("global batch", args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
        ("learning rate", args.learning_rate),
        ("temperature", args.temperature),
        ("condense", args.condense),
        ("λ", args.condensation_weight),
        ("λ is 0 after step", args.condensation_steps or "never"),
        ("seed", args.seed),
        ("training loss, mean over the run", f"{result.training_loss:.4f}"),
        ("minutes", f"{result.metrics['train_runtime'] / 60:.1f}"),
    ]
    return rows


def push_folder(args):
    """Upload the exported repository."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    repo_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    try:
        url = api.upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=["checkpoint-*", "runs/*", "*.bin"]
        )
    except Exception as error:
        raise RuntimeError(
            f"The upload to {repo_id} failed ({type(error).__name__}). The exported repository in {args.output_dir} "
            f"is whole; retry with: hf upload {repo_id} {args.output_dir} . --exclude 'checkpoint-*'"
        ) from error
    print(f"Pushed to {url}")


if __name__ == "__main__":
    main()
