"""Peak memory of publishing, by the size of the model: add tokens, export with adapters merged, verify.

Every step runs in a fresh process. Measured is the memory of it and its children that the system cannot take back
(anonymous pages; weights that are read through a memory map are not among them), sampled ten times a second. Weights
are bf16 and random. The processor is that of the small model of the repository.

    python -m benchmarks.publish_memory            # 2B: about 10 minutes on 2 CPU cores, 12 GB of disk
    python -m benchmarks.publish_memory --sizes 8b --steps add-tokens export      # 45 GB of disk
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks import RESULTS, ROOT

BASE = ROOT / "benchmarks" / "unified" / "models" / "base-small"
# Qwen2-VL-2B and Qwen2-VL-7B, whose untied embedding and head make it 8.3 billion parameters.
SIZES = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "tied": True},
    "8b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tied": False},
}  # fmt: skip
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
STEPS = ("add-tokens", "export", "verify")


def build(size: str, folder: Path) -> None:
    """Write a base model with random weights, one tensor at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    shape = dict(SIZES[size])
    tied = shape.pop("tied")
    config = AutoConfig.from_pretrained(BASE)
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    for name, value in {**shape, "vocab_size": 152_064, "rope_parameters": rope, "max_window_layers": 28}.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * shape["num_hidden_layers"]
    for name, value in {**VISION, "hidden_size": shape["hidden_size"]}.items():
        setattr(config.vision_config, name, value)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        shards[name] = f"model-{len(shards):05}.safetensors"
        save_file({name: values + 1 if "norm" in name and name.endswith("weight") else values}, folder / shards[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def run_step(step: str, folder: Path) -> None:
    """One step, in this process."""
    import torch

    from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model, verify

    if step == "add-tokens":
        add_bottleneck_tokens(folder / "base", folder / "start", noise_std=0.5)
    elif step == "export":
        from peft import LoraConfig

        from btok_hf.adapters import add_adapters

        model = BTokSentenceTransformer(folder / "start", device="cpu", model_kwargs={"dtype": torch.bfloat16})
        torch.manual_seed(0)
        adapters = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, init_lora_weights="gaussian")
        add_adapters(model.transformer.model, model.transformer.lm_head, adapters)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.01)
        export_model(model, folder / "model")
    else:
        print(f"largest difference {verify(folder / 'model'):.1e}")


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory of a process."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(step: str, folder: Path) -> dict:
    """Run a step in a fresh process and watch its memory."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.publish_memory", "--folder", str(folder), "--one", step]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            peak = max(peak, sum(map(anonymous, [process, *process.children(recursive=True)])))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{step} failed:\n{process.stderr.read()[-4000:]}")
    return {"step": step, "peak_gb": round(peak / 1e9, 2), "seconds": round(time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["2b"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "publish-memory", help="folder for models")
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_step(options.one, options.folder)
        return
    rows = []
    for size in options.sizes:
        folder = options.folder / size
        if not (folder / "base" / "model.safetensors.index.json").exists():
            build(size, folder / "base")
        weights = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        for step in options.steps:
            rows.append({"size": size, "weights_gb": round(weights / 1e9, 2), **measure(step, folder)})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    path = RESULTS / f"publish_memory_{'_'.join(options.sizes)}.json"
    command = " ".join(["python -m benchmarks.publish_memory", *sys.argv[1:]])
    path.write_text(
        json.dumps(
            {"command": command, "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores", "rows": rows},
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
