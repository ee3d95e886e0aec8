"""Run everything that needs a GPU: correctness first, then speed and memory at the size of Qwen2-VL-2B.

    python -m benchmarks.gpu --minutes 8        # writes benchmarks/results/*-gpu.json, a file after each step
    python -m benchmarks.gpu --minutes 8        # again: what the first run could not finish
    python -m benchmarks.gpu --steps correctness attention

Steps that have results are skipped, unless they are named. A step that fails, or that the time ends in, is reported,
its rows so far are written as "unfinished", and the next one runs. Without a GPU the same steps run on the CPU at a
small size, with `--output runs/trial`: that is how this script is tried.

- correctness: embeddings, token losses and gradients of the packed forward against the CPU's in fp32, for texts,
  images and videos, with targets that see fewer queries than keys; vectors of `encode`. The same in bf16, with flash
  attention and with grouped SDPA.
- attention, vision: those benchmarks. throughput, profile, overhead: the tables of `encode`. train_step, train_memory:
  the tables of `train_step`.
- batch: batches of texts that train, doubled until memory runs out or a step takes seconds: in one forward a side, the
  same with activation checkpointing, in mini-batches (GradCache).
- recipe: two steps of the recipe for 24 GB from random weights, with its export, by `btok train` and `btok verify`.
- compile: encoding with torch's RMS norm in place of transformers', and with MLPs and norms compiled. (Whole layers
  would be compiled anew for every packed layout.)
"""

import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks import ROOT, attention, bench, encode, train_step, vision
from benchmarks.bench import (
    DEVICE,
    arguments,
    compare,
    folder,
    free,
    matrix_rate,
    mixture,
    names,
    peak_of,
    record,
    repository,
    result_file,
    show,
    summary,
    synchronise,
)
from btok_hf import BTokSentenceTransformer
from btok_hf.condensation import condense

RECIPE = "training/recipes/btok_qwen2vl_2b_24gb.yaml"


def outputs(model, kind):
    """Embeddings, token losses and gradients of a batch with targets, on the CPU."""
    features = train_step.batch(model, kind, 8)[0]
    features = {name: x.to(model.device) if torch.is_tensor(x) else x for name, x in features.items()}
    targets, labels = (features.pop(name)[:, 0] for name in ("target_ids", "target_labels"))
    output = condense(model[0].model, features, targets, labels)
    (output.embeddings.sum() + output.token_losses.sum()).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()
    model.zero_grad(set_to_none=True)
    return {
        "embeddings": output.embeddings.detach().cpu(),
        "token losses": output.token_losses.detach().cpu(),
        "gradients": gradients,
    }


def correctness(size, rounds, limit=1e-3):
    """Largest relative differences of this device to the CPU; an error above `limit`."""
    repo, rows = repository("small", 4), []
    here, cpu = (BTokSentenceTransformer(repo, device=device) for device in (DEVICE, "cpu"))
    items = mixture("mixed", 48) + [{"video": [picture] * 2} for picture in mixture("images", 2)]
    for kind in ("ragged", "media"):
        found, right = outputs(here, kind), outputs(cpu, kind)
        for name, exact in right.items():
            error = ((found[name] - exact).abs().max() / exact.abs().max()).item()
            rows.append({"what": f"{name} of {kind} in fp32", "error": float(f"{error:.1e}")})
    vectors, ours = cpu.encode(items, convert_to_tensor=True), here.encode(items, convert_to_tensor=True).cpu()
    rows.append({"what": "vectors of encode in fp32", "error": float(f"{(ours - vectors).abs().max():.1e}")})
    for row in rows:
        show(row)
        if not row["error"] <= limit:
            raise RuntimeError(f"{row['what']} on {DEVICE} differ from those on the CPU by {row['error']}.")
    half = BTokSentenceTransformer(repo, model_kwargs={"dtype": torch.bfloat16})
    for kind in ("ragged", "media"):
        right = outputs(cpu, kind)
        for way in ("flash", "grouped"):
            with train_step.without_flash(way):
                found = outputs(half, kind)
            for name, exact in right.items():
                error = ((found[name].float() - exact).norm() / exact.norm()).item()
                rows.append(show({"what": f"{name} of {kind} in bf16, {way}", "error": float(f"{error:.1e}")}))
    cosine = F.cosine_similarity(vectors, half.encode(items, convert_to_tensor=True).float().cpu()).min().item()
    return [*rows, show({"what": "smallest cosine of bf16 and fp32 vectors", "cosine": round(cosine, 6)})]


def table_of_encode(name, size, rounds):
    return encode.measure(size, rounds, [name])[0]


def training(size, rounds):
    return train_step.speed(size, rounds)


def memory(size, rounds):
    return train_step.memory(size)


def fused_norm(norm, hidden):
    """A Qwen2RMSNorm in one kernel."""
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def compiled(size, rounds):
    """Encoding with torch's own RMS norm, and with compiled MLPs and norms; the first, untimed round compiles."""
    contenders, rows = {}, []
    for what in ("nothing", "torch's rms_norm", "mlp", "mlp, input_layernorm, post_attention_layernorm"):
        model = BTokSentenceTransformer(repository(size, 4))
        for layer in model[0].model.language_model.layers:
            if what == "torch's rms_norm":
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.forward = partial(fused_norm, norm)
            elif what != "nothing":
                for name in what.split(", "):
                    getattr(layer, name).compile(dynamic=True)
        contenders[what] = model
    for kind, count in (("long", 64), ("texts", 768)) if DEVICE == "cuda" else (("texts", 96),):
        items = encode.inputs_of(kind, count, contenders["nothing"])
        calls = {what: partial(model.encode, items) for what, model in contenders.items()}
        for what, part in summary(compare(calls, rounds), "nothing").items():
            rows.append(show({"inputs": f"{count} {kind}", "changed": what, **part}))
    return rows


def largest_batch(size, rounds, seconds=4):
    """Rows of a batch that takes a step, doubled until memory or patience ends, by the way that it is taken.

    Seconds are those of one step. The first of all is not timed.
    """
    rows, first = [], train_step.contender("packed", size, "ragged", 16, 16)
    first()
    model = first.model
    ways = {"one forward a side": None, "the same, checkpointing": None, "mini-batches of 16": 16}
    for way, mini_batch in ways.items():
        count, taken = 16 if mini_batch is None else 2 * mini_batch, 0
        while 2 * taken < seconds:
            step = train_step.contender(
                "packed", size, "ragged", count, mini_batch or count, way.endswith("checkpointing"), four=model
            )
            started = time.perf_counter()
            try:
                memory = peak_of(step)
                synchronise()
            except torch.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                rows.append(show({"way": way, "rows": count, "result": "out of memory"}))
                break
            taken = time.perf_counter() - started
            part = {"way": way, "rows": count, "tokens": step.tokens + step.targets}
            rows.append(show({**part, "seconds": round(taken, 2), "peak_gb": round(memory, 2)}))
            count *= 2
    return rows


def recipe(size, rounds):
    """Seconds of two steps of the recipe for 24 GB with export, and of its verification, in processes of their own."""
    repository(size, 4)
    work = folder(size) / "recipe"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    pairs, count = work / "pairs.jsonl", 1024 if DEVICE == "cuda" else 16
    # Different texts, because equal ones are not drawn into one batch.
    texts = list(dict.fromkeys([*names(), *mixture("texts", 4 * count)]))[: 2 * count]
    rows = [{"query": query, "positive": positive} for query, positive in zip(texts[::2], texts[1::2])]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    train = ["train", "--config", RECIPE, "--model_name_or_path", folder(size) / "base", "--output_dir", work / "out"]
    train += ["--train_files", pairs, "--max_steps", "2", "--save_steps", "2"]
    train += ["--use_cpu"] if DEVICE == "cpu" else []
    train += ["--condense", "positive", "--condensation_steps", "2", "--per_device_train_batch_size", str(count // 2)]
    found = []
    for name, command in (("two steps and export", train), ("verify", ["verify", work / "out"])):
        started = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "btok_hf", *map(str, command)], cwd=ROOT, capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(f"btok {command[0]} ended with {run.returncode}: {(run.stdout + run.stderr)[-1500:]}")
        row = {"what": name, "rows": count, "seconds": round(time.perf_counter() - started, 1)}
        found.append(show(row | {"output": run.stdout.replace(f"{ROOT}/", "").strip().splitlines()[-1:]}))
    return found


STEPS = {
    "correctness": correctness,
    "throughput": partial(table_of_encode, "throughput"),
    "train_step": training,
    "attention": attention.measure,
    "profile": partial(table_of_encode, "profile"),
    "train_memory": memory,
    "recipe": recipe,
    "batch": largest_batch,
    "vision": vision.measure,
    "compile": compiled,
    "overhead": partial(table_of_encode, "overhead"),
}


def stop(*_):
    raise TimeoutError("the time is over")


def finished(name):
    """Whether the step has a complete result."""
    path = result_file(name)
    return path.exists() and not json.loads(path.read_text("utf-8")).get("unfinished")


def main():
    options = arguments(
        __doc__,
        steps={"nargs": "+", "choices": STEPS},
        minutes={"type": float, "default": 60, "help": "time for all steps"},
        output={"type": Path, "default": bench.RESULTS, "help": "folder of the results"},
    )
    bench.RESULTS = options.output
    started, left = time.monotonic(), []
    rate = matrix_rate(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    signal.signal(signal.SIGALRM, stop)
    for name in options.steps or STEPS:
        if not options.steps and finished(name):
            print(f"{name}: {result_file(name).name} is there", flush=True)
            continue
        rest, begun = int(60 * options.minutes - (time.monotonic() - started)), time.monotonic()
        if rest < 1:
            left.append(name)
            continue
        bench.SHOWN.clear()
        more = {"size": options.size, "matrix_gflop_per_s": round(rate, 1)}
        signal.alarm(rest)
        try:
            rows = STEPS[name](options.size, options.rounds)
        except (Exception, SystemExit):  # the next step may run all the same
            signal.alarm(0)
            traceback.print_exc()
            left.append(name)
            if bench.SHOWN and not finished(name):
                record(name, list(bench.SHOWN), **more, unfinished=True)
        else:
            signal.alarm(0)
            seconds = round(time.monotonic() - begun)
            record(name, rows, **more, seconds=seconds)
            print(f"{name}: {seconds} s", flush=True)
        finally:
            signal.alarm(0)
            free()
    if left:
        raise SystemExit(f"Not finished: {', '.join(left)}. Run this again.")


if __name__ == "__main__":
    main()
