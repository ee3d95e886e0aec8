"""Train the base model of the unified benchmark: a small Qwen2-VL that generates text, like the method's base models.

    python -m benchmarks.unified.base --size small        # minutes on 2 CPU cores

It starts from random weights and uses the training rows only. It learns to describe drawings, clips and figures, to
read pages, to define terms, to name what is defined, and to continue textbook text. The loss is next-token prediction
that sees the full input, without a contrastive loss. A killed run resumes from its last checkpoint.
"""

import argparse
import copy
import shutil
from pathlib import Path

import jinja2
from datasets import Dataset
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from benchmarks import ROOT
from benchmarks.unified.inputs import books
from benchmarks.unified.training_rows import CONDENSE, prepare, training_sets
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.training import CondensationConfig, CondensationLoss, CondensationTrainer
from btok_hf.training.condensation_collator import CondensationCollator
from examples.prepare_emoji import build_base

# For each size: the backbone, then steps and peak learning rate of the base, of each arm and of the examples' model.
# Arms condense for the first 40 % of their steps (2,000 of 5,000 in the paper's first preset).
SIZES = {
    "small": {
        "backbone": {"hidden_size": 128, "num_layers": 4, "vision_size": 64, "vocab_size": 4096},
        "base": {"max_steps": 3600, "learning_rate": 1.5e-3},
        "arm": {"max_steps": 240, "learning_rate": 1e-3, "condensation_steps": 96},
        "long": {"max_steps": 800, "learning_rate": 1e-3, "condensation_steps": 320},
    },
    "base": {
        "backbone": {"hidden_size": 768, "num_layers": 12, "vision_size": 384, "vocab_size": 16384},
        "base": {"max_steps": 20000, "learning_rate": 5e-4},
        "arm": {"max_steps": 5000, "learning_rate": 2e-4, "condensation_steps": 2000},
        "long": {"max_steps": 20000, "learning_rate": 2e-4, "condensation_steps": 8000},
    },
}
BATCH = 128  # of the arms
BASE_BATCH = 32  # there are no in-batch negatives, so more steps with smaller batches are better
BASE_WEIGHTS = {"names": 5, "clips": 2, "motion": 2, "pages": 1, "glossary": 2, "figures": 1, "texts": 1}

MODELS = ROOT / "benchmarks" / "unified" / "models"
CARD = Path(__file__).with_name("base_card.md.jinja")


class Plain(CondensationCollator):
    """Targets follow the end token directly, so that its state learns to predict their first token."""

    prompt = ""


class Generation(CondensationLoss):
    """Only the loss of the target tokens."""

    def _infonce(self, columns):
        return 0.0 * sum(column.sum() for column in columns)


class Generative(CondensationTrainer):
    data_collator_class = Plain


def arguments_for(folder, seed, batch_size=BATCH, **settings):
    """The training arguments that the base and all arms share."""
    return CondensationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        mini_batch_size=batch_size,
        max_target_length=32,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        logging_steps=25,
        save_total_limit=1,
        report_to="none",
        dataloader_num_workers=1,
        seed=seed,
        **settings,
    )


def texts():
    """The first half of a passage and its second half as the target, from the training split's textbooks."""
    rows = []
    for row in books("modules", "train"):
        words = row["text"].split()
        for start in range(0, len(words) - 40, 60):
            first, rest = (" ".join(words[start + a : start + b]) for a, b in ((0, 30), (30, 66)))
            rows.append({"query": first, "positive": row["title"], "target": rest})
    return Dataset.from_list(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "unified", help="folder for the run")
    options = parser.parse_args()
    print(make(options.size, options.output))


def make(size, output):
    """Train the base of one size, unless it exists. Returns its folder."""
    folder = MODELS / f"base-{size}"
    if (folder / "model.safetensors").exists():
        return folder
    prepare(output / "pairs")
    sets = {name: part for name, part in training_sets(output / "pairs").items() if CONDENSE[name] != "none"}
    sets["texts"] = texts()
    start = output / size / "start"
    if not (start / "tokens" / "config.json").exists():
        shutil.rmtree(start, ignore_errors=True)
        words = [text for part in sets.values() for row in text_columns(part) for text in row.values() if text]
        build_base(start / "random", words, patch_size=14, pixels=(56 * 56, 196 * 224), **SIZES[size]["backbone"])
        # The plain layout, with one end token after the input: K = 0.
        add_bottleneck_tokens(start / "random", start / "tokens", num_tokens=0)
    model = BTokSentenceTransformer(str(start / "tokens"))
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    args = arguments_for(
        output / size / "base-run",
        seed=0,
        batch_size=BASE_BATCH,
        # Both sides: a name in any language and its drawing lead to the same description.
        condense={name: "positive" if name == "texts" else "both" for name in sets},
        dataset_weights=BASE_WEIGHTS,
        condensation_weight=1.0,
        condensation_mask=False,
        mask_false_negatives=False,
        save_steps=250,
        **SIZES[size]["base"],
    )
    loss = Generation(model, mini_batch_size=BASE_BATCH, condensation_weight=1.0, condensation_mask=False)
    trainer = Generative(model=model, args=args, train_dataset=sets, loss=loss)
    train(trainer)
    AutoProcessor.from_pretrained(start / "random").save_pretrained(folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-8:]
    parameters = sum(p.numel() for p in model.parameters())
    template = jinja2.Template(CARD.read_text("utf-8"), keep_trailing_newline=True)
    card = template.render(
        size=size, parameters=parameters, steps=args.max_steps, batch=BASE_BATCH, loss=sum(losses) / len(losses)
    )
    (folder / "README.md").write_text(card, "utf-8")
    # The weights are last, because the folder counts as complete once it has them.
    config = copy.deepcopy(model.transformer.config)
    for name in [name for name in vars(config) if name.startswith("btok_") or name == "auto_map"]:
        delattr(config, name)  # the base has neither Bottleneck Tokens nor remote code
    base = Qwen2VLForConditionalGeneration(config)
    base.model.load_state_dict(model.transformer.model.state_dict())
    base.generation_config = model.transformer.generation_config
    base.save_pretrained(folder)
    return folder


def train(trainer):
    """Train, or go on from the last checkpoint of a run that was killed, which may be the end of its training."""
    output = Path(trainer.args.output_dir)
    checkpoint = get_last_checkpoint(output) if output.exists() else None
    if checkpoint and int(checkpoint.rpartition("-")[2]) == trainer.args.max_steps:
        # The trainer refuses to resume where no step is left. It was killed before its result was written.
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(Path(checkpoint, TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=checkpoint)


def text_columns(part):
    """The rows of a dataset without its media."""
    plain = [name for name, kind in part.features.items() if getattr(kind, "dtype", None) == "string"]
    return part.with_format(None).select_columns([name for name in plain if name != "group"])


if __name__ == "__main__":
    main()
