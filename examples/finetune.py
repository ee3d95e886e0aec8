"""Fine-tune on your own pairs: a CSV, JSON-lines or parquet file, or a Hub dataset.

    python examples/finetune.py pairs.jsonl btok-mine --base Qwen/Qwen2-VL-2B-Instruct

A row has `query` and `positive`, and may have `negative` (or a list `negatives`). Each is a text, the path of an image
or video, or (not in CSV) both: `{"image": "page.png", "text": "page 3"}`.
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.errors import one_line_errors
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.data import load_pairs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pairs")
parser.add_argument("output")
parser.add_argument("--base", default="Qwen/Qwen2-VL-2B-Instruct")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--condense", default="positive", help="side whose text is generated: positive, query, both, none")
arguments = parser.parse_args()

with one_line_errors():
    pairs = load_pairs(arguments.pairs)  # before the model is written
    args = CondensationConfig(
        output_dir=arguments.output + "-run",
        per_device_train_batch_size=64,
        mini_batch_size=8,  # rows whose activations are in memory at once; the loss does not depend on it
        condense=arguments.condense,  # positive: encode the query, generate the positive's text
        max_steps=arguments.steps,
        report_to="none",
    )
    start = f"{arguments.output}-{Path(arguments.base).name}"
    if not Path(start).exists():
        add_bottleneck_tokens(arguments.base, start, num_tokens=4, max_pixels=501_760)
    model = BTokSentenceTransformer(start)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0)  # the Bottleneck Tokens' rows are trained too
    trainer = CondensationTrainer(model=model, args=args, train_dataset=pairs, peft_config=lora)
trainer.train()
trainer.export(arguments.output)  # merged weights, remote code, card: a Hub repository
