"""Fine-tune on your own pairs: a CSV, JSON-lines or parquet file, or a Hub dataset.

    python examples/finetune.py pairs.jsonl btok-mine --base Qwen/Qwen2-VL-2B-Instruct

A row has `query` and `positive`, and may have `negative` (or a list `negatives`). Each is a text, the path of an image
or video, or (not in CSV) both: `{"image": "page.png", "text": "page 3"}`.

The same command continues a run that was killed. The base model with Bottleneck Tokens is in OUTPUT-BASE, checkpoints
are in OUTPUT-BASE-run; both may be removed when OUTPUT is written.
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from btok_hf import BTokSentenceTransformer
from btok_hf.errors import one_line_errors
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.checks import checked_datasets
from btok_hf.training.data import load_pairs
from btok_hf.training.start import starting_point

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pairs", help="pair file or Hub id")
parser.add_argument("output", help="folder to write the trained model to")
parser.add_argument("--base", default="Qwen/Qwen2-VL-2B-Instruct", help="default: %(default)s")
parser.add_argument("--epochs", type=float, default=3, help="passes over the pairs (default: %(default)s)")
parser.add_argument("--steps", type=int, default=-1, help="train this many steps of 64 rows, in place of --epochs")
parser.add_argument("--condense", default="positive", help="side whose text is generated: positive, query, both, none")
arguments = parser.parse_args()

with one_line_errors():
    start = f"{Path(arguments.output)}-{Path(arguments.base).name}"
    args = CondensationConfig(
        output_dir=start + "-run",
        num_train_epochs=arguments.epochs,
        max_steps=arguments.steps,
        per_device_train_batch_size=64,  # a query's negatives are the other positives of the batch
        # If memory runs out, lower mini_batch_size, then add gradient_checkpointing=True, then lower max_pixels below.
        mini_batch_size=8,  # rows whose activations are in memory at once; the loss does not depend on it
        condense=arguments.condense,  # positive: encode the query, generate the positive's text
        save_steps=100,
        save_total_limit=2,
        report_to="none",
    )
    pairs = checked_datasets("train_dataset", load_pairs(arguments.pairs), args)  # before the model is written
    path = starting_point(arguments.base, start, args, max_pixels=501_760)
    model = BTokSentenceTransformer(path)  # on a GPU: model_kwargs={"dtype": "bfloat16"}, and bf16=True above
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0)  # the Bottleneck Tokens' rows are trained too
    trainer = CondensationTrainer(model=model, args=args, train_dataset=pairs, peft_config=lora)
    checkpoint = trainer.check_start("auto")  # the newest one, if this run was killed
trainer.train(resume_from_checkpoint=checkpoint)
trainer.export(arguments.output)  # merged weights, remote code, card: a Hub repository
