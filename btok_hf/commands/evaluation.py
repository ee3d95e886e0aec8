"""The command that evaluates a model: mmeb."""

from pathlib import Path
from typing import Any

from btok_hf.arguments import named_source
from btok_hf.commands import add_command, needing


def mmeb_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "mmeb",
        run_mmeb,
        "Evaluate a Sentence-Transformers model on MMEB-V2. The same command resumes an interrupted run. To use "
        "several processes: accelerate launch -m btok_hf mmeb …",
        "btok mmeb --model org/btok-2b --data MMEB-V2 --modality image,visdoc --output results/btok-2b",
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="folder of the benchmark (see docs/evaluation.md)")
    parser.add_argument("--output", required=True, help="folder for scores, rankings and report")
    parser.add_argument("--modality", type=_names, help="image, video, visdoc, separated by commas (default: all)")
    parser.add_argument("--datasets", type=_names, help="names of datasets, separated by commas (default: all)")
    parser.add_argument("--limit", type=int, help="use only the first queries of each dataset, for a trial run")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="approximate tokens per forward (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code of the model's repository; ours need none"
    )
    parser.add_argument("--prompt", help="instruction for every input (default: the model's default)")
    parser.add_argument("--eval-task", help="task id from the benchmark's eval.yaml on the Hub; writes .eval_results")
    parser.add_argument("--cache", help="folder for embeddings (default: embeddings in the output folder)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run_mmeb(
    model: str,
    data: str,
    output: str,
    revision: str | None,
    dtype: str,
    max_pixels: int | None,
    trust_remote_code: bool,
    modality: list[str] | None,
    cache: str | None,
    **options: Any,
) -> int:
    with needing("btok mmeb", "evaluation"):
        from accelerate import PartialState

        from btok_hf.evaluation import mmeb, models
        from btok_hf.files import check_writable

    # Before the model is loaded.
    kinds = {mmeb.TASKS[name].modality for name in mmeb.chosen(options["datasets"], modality)}
    folders = [f"{kind}-tasks" for kind in sorted(kinds)]
    if not any((Path(data) / folder).is_dir() for folder in folders):
        raise FileNotFoundError(
            f"There is no folder {data!r} with the benchmark ({', '.join(folders)}). docs/evaluation.md downloads it."
        )
    check_writable(output)
    with named_source(model):
        loaded = models.load_model(
            model,
            revision=revision,
            dtype=dtype,
            max_pixels=max_pixels,
            device=str(mmeb.processes().device),
            trust_remote_code=trust_remote_code,
        )
    name = Path(model).resolve().name if Path(model).exists() else Path(model).name
    _, errors = mmeb.evaluate(loaded, data, output, modalities=modality, name=name, cache_dir=cache, **options)
    PartialState().destroy_process_group()  # without it, torch aborts some processes at exit
    return int(bool(errors))
