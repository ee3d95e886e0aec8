"""The commands for a collection: embed."""

from typing import Any

from btok_hf.commands import add_command


def embed_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "embed",
        run_embed,
        "Embed a folder, tables or a dataset into parquet files. The same command goes on after an interruption, and "
        "embeds only what is new or changed. With several processes: accelerate launch -m btok_hf embed …",
        "btok embed photos photos-embedded --model org/btok-2b",
    )
    parser.add_argument(
        "input",
        help="folder of images, videos, texts and PDFs; with --text, --image or --video parquet, JSON lines or CSV; a "
        "path, a pattern in quotes, an address (s3://…, hf://…), or the Hub id of a dataset",
    )
    parser.add_argument("out", help="folder or address to write to")
    parser.add_argument("--model", required=True, help="folder or Hub id of an exported repository")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    for name in ("text", "image", "video"):
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"column of tables with the {name} of a row")
    parser.add_argument("--id", metavar="COLUMN", help="column with the rows' ids (default: file and row number)")
    parser.add_argument(
        "--columns", metavar="NAMES", type=_names, default=(), help="columns to keep beside the embeddings: a,b,c"
    )
    parser.add_argument("--prompt", help="instruction for every row (default: the model's for documents)")
    parser.add_argument("--dimensions", type=int, help="fewer numbers a vector, if the model was trained for it")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--device", help="device of the model (default: a GPU if there is one)")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--max-seq-length", type=int, help="cut texts to this many tokens (default: the model's)")
    for flag, default, meaning in (
        ("--unit-rows", 512, "most rows of a file; a killed run loses at most one of them"),
        ("--thumbnail-pixels", 192, "longest side of the thumbnails; 0 makes none"),
        ("--batch-size", 32, "as in encode"),
        ("--threads", 4, "threads that read and decode ahead"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--retry-failed", action="store_true", help="embed files with failed rows again")
    parser.add_argument("--fail-on-error", action="store_true", help="end with status 1 if any row of OUT failed")
    parser.add_argument("--ray", metavar="ADDRESS", help="use Ray: local, auto, or the address of a cluster")
    parser.add_argument("--workers", type=int, help="workers of Ray (default: one a GPU, or one a CPU core)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run_embed(
    input: str,
    out: str,
    text: str | None,
    image: str | None,
    video: str | None,
    id: str | None,
    columns: tuple[str, ...],
    retry_failed: bool,
    fail_on_error: bool,
    ray: str | None,
    workers: int | None,
    **options: Any,
) -> int:
    try:
        from btok_hf.corpus.job import Options
        from btok_hf.corpus.tables import Columns
        from btok_hf.corpus.workers import run
    except ModuleNotFoundError as error:
        raise ImportError(f"btok embed needs the package {error.name}: pip install 'btok-hf[corpus]'.") from error

    options["columns"] = Columns(text, image, video, id, columns)
    errors = run(input, out, Options(**options), retry_failed=retry_failed, ray=ray, workers=workers)
    return int(fail_on_error and bool(errors))
