"""Peak memory of a training mini-batch at the size of Qwen2-VL-2B, by pixels, rows and checkpointing.

GradCache keeps one mini-batch alive, so its peak is the peak of the run for any batch size. AdamW's moments of the
adapters (rank 16, fp32) add 0.15 GB. Weights are bf16 and hold constants, because memory does not depend on their
values. Every setting runs in a fresh process. On a GPU the allocator's peak is measured. On a CPU it is the process's
peak, which includes Python and its libraries (0.6 to 0.8 GB).

    python -m benchmarks.memory            # about 10 minutes on 2 CPU cores, 16 GB
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.initialization import no_init_weights

from btok_hf.backbones import family_of
from btok_hf.condensation import condense

VOCABULARY, IMAGE, START, END = 151_936, 151_655, 151_652, 151_653
TEXT_TOKENS, TARGET_TOKENS = 32, 64
# (pixels of an image, rows of the mini-batch, checkpointing)
SETTINGS = [
    (501_760, 1, False),
    (501_760, 1, True),
    (501_760, 2, True),
    (1_003_520, 1, False),
    (1_003_520, 1, True),
]


def build(device):
    """A backbone of Qwen2-VL-2B's shape with LoRA on its language model."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "patch_size": 14},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
        btok_token_ids=list(range(VOCABULARY - 4, VOCABULARY)),
        btok_num_tokens=4,
    )
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights(), torch.device(device):
        model = Qwen2VLModel(config)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    tokens = {"language_model.embed_tokens": config.btok_token_ids}
    model.add_adapter(
        peft.LoraConfig(
            r=16, lora_alpha=32, target_modules=family_of(config).lora_targets, trainable_token_indices=tokens
        )
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def measure(pixels, rows, checkpointing):
    """One forward and backward of [image, text | BToks | target] rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    height = round((pixels / 784) ** 0.5)
    width = pixels // 784 // height
    ids = [START, *[IMAGE] * (height * width), END, *range(100, 100 + TEXT_TOKENS)]
    ids += model.config.btok_token_ids
    target = torch.arange(200, 200 + TARGET_TOKENS, device=device).repeat(rows, 1)
    inputs = {
        "input_ids": torch.tensor([ids] * rows),
        "attention_mask": torch.ones(rows, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[int(i == IMAGE) for i in ids]] * rows),
        "pixel_values": torch.zeros(rows * height * width * 4, 1176),
        "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]] * rows),
    }
    inputs = {key: value.to(device) for key, value in inputs.items()}
    start = time.perf_counter()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = condense(model, inputs, target, target.clone(), lm_head=model.get_input_embeddings().weight)
    (output.embeddings.sum() + output.token_losses.sum()).backward()
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "max_pixels": pixels,
        "rows": rows,
        "tokens": rows * (len(ids) + TARGET_TOKENS),
        "checkpointing": checkpointing,
        "weights_gb": round(weights / 1e9, 2),
        "peak_gb": round(peak / 1e9, 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    rows = []
    for setting in SETTINGS:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(setting)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()} CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": "python -m benchmarks.memory", "machine": machine, "versions": versions, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
