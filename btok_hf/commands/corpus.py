"""Commands for a collection of files or rows: embed, index, search, app."""

import argparse
import sys
from pathlib import Path
from typing import Any

from btok_hf.commands import add_command, needing

# Formats of a contact sheet, by suffix.
SHEETS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SHEET_HITS = 300  # 60 rows of 240 pixels; WebP has at most 16,383


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
    parser.add_argument("--id", metavar="COLUMN", help="column of the rows' ids (default: file and row number)")
    parser.add_argument(
        "--columns", metavar="NAMES", type=_names, default=(), help="columns to keep beside the embeddings: a,b,c"
    )
    parser.add_argument("--prompt", help="instruction for every row (default: the model's for documents)")
    parser.add_argument("--dimensions", type=int, help="vector dimensions to keep, if the model was trained for it")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--device", help="device of the model (default: a GPU if there is one)")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--max-seq-length", type=int, help="cut texts to this many tokens (default: the model's)")
    for flag, default, meaning in (
        ("--unit-rows", 512, "most rows of an output file; an interrupted run loses at most one file"),
        ("--thumbnail-pixels", 192, "longest side of the thumbnails; 0 makes none"),
        ("--batch-size", 32, "size of a batch, in rows of 512 tokens (on a CPU of 64)"),
        ("--threads", 4, "threads that read and decode ahead"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--retry-failed", action="store_true", help="embed files with failed rows again")
    parser.add_argument("--fail-on-error", action="store_true", help="end with status 1 if any row of OUT failed")
    parser.add_argument("--ray", metavar="ADDRESS", help="use Ray: local, auto, or the address of a cluster")
    parser.add_argument(
        "--workers", type=int, help="workers of Ray (default: one per GPU, without GPUs one per CPU core)"
    )


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
    with needing("btok embed", "corpus"):
        from btok_hf.corpus.job import Options
        from btok_hf.corpus.tables import Columns
        from btok_hf.corpus.workers import run

    options["columns"] = Columns(text, image, video, id, columns)
    errors = run(input, out, Options(**options), retry_failed=retry_failed, ray=ray, workers=workers)
    return int(fail_on_error and bool(errors))


def index_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "index",
        run_index,
        "Write the units of btok embed into a database to search, or bring it up to date. Readers of the database "
        "need not stop. Or write the vectors as an index of faiss or usearch.",
        "btok index embedded --db db",
    )
    parser.add_argument("out", help="folder or address that btok embed wrote")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--db", help="folder or address of the LanceDB database")
    target.add_argument("--faiss", metavar="FILE", help="file of a faiss index; the ids are in FILE.ids.parquet")
    target.add_argument("--usearch", metavar="FILE", help="file of a usearch index; the ids are in FILE.ids.parquet")
    parser.add_argument(
        "--precision",
        choices=["float32", "float16", "int8", "binary"],
        help="how vectors are stored (default: float32, or as the database has them); int8: faiss and usearch only",
    )
    parser.add_argument("--dimensions", type=int, help="vector dimensions to keep, if the model was trained for it")
    parser.add_argument("--rebuild", action="store_true", help="train the vector index again (with --db)")


def run_index(
    out: str,
    db: str | None,
    faiss: str | None,
    usearch: str | None,
    precision: Any,
    dimensions: int | None,
    rebuild: bool,
) -> None:
    if rebuild and db is None:
        raise argparse.ArgumentError(None, "--rebuild needs --db: other indexes are always written anew.")
    if precision == "int8" and db is not None:
        raise argparse.ArgumentError(
            None, "LanceDB cannot search int8 vectors. Use --precision float16 or binary, or --faiss or --usearch."
        )
    if db is None:
        from btok_hf.corpus import vector_libraries

        write = vector_libraries.write_faiss if faiss else vector_libraries.write_usearch
        file = faiss or usearch
        changes = write(out, str(file), precision or "float32", dimensions)
        print(f"{file}: {changes.added:,} vectors{changes.left_out}; their ids are in {file}{vector_libraries.IDS}")
        return
    from btok_hf.corpus.index import Index
    from btok_hf.corpus.recall import measure_recall
    from btok_hf.files import check_writable

    if "://" not in db:
        check_writable(db)
    index, changes, sample = Index.build(out, db, precision=precision, dimensions=dimensions, rebuild=rebuild)
    print(f"{db}: {index.count():,} rows ({changes})")
    if index.lossless:
        print("search is exact: every row is compared in float32")
        return
    found = [[hit.id for hit in index.search(vector, k=11)] for vector in sample]
    recall = measure_recall(out, sample, found)
    print(f"recall@10 {recall:.3f} against exact search in float32 ({len(sample)} rows as queries)")


def search_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "search",
        run_search,
        "Search a database of btok index with a text, an image, a video, or a text with one of them.",
        'btok search --db db "a dog on the beach" --where "kind = \'image\'"',
    )
    parser.add_argument("text", nargs="?", help="text to search for; never taken for the name of a file")
    parser.add_argument("--db", required=True, help="folder or address of the database")
    parser.add_argument("--image", help="image to search for")
    parser.add_argument("--video", help="video to search for")
    parser.add_argument("-k", type=int, default=10, help="most hits (default: %(default)s)")
    parser.add_argument("--where", help="SQL condition on the columns, e.g. \"kind = 'image' AND year > 2020\"")
    parser.add_argument(
        "--hybrid", action="store_true", help="also rank by the words of the text, and fuse both rankings"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet of up to 300 hits, e.g. out.png")
    parser.add_argument(
        "--html", metavar="FILE", help="write the hits as an HTML page: one file that loads nothing else"
    )
    parser.add_argument("--model", help="where the model is (default: where it was when the corpus was embedded)")
    parser.add_argument("--device", help="device of the model (default: a GPU if there is one)")


def run_search(
    text: str | None,
    db: str,
    image: str | None,
    video: str | None,
    k: int,
    where: str | None,
    hybrid: bool,
    json: bool,
    sheet: str | None,
    html: str | None,
    model: str | None,
    device: str | None,
) -> None:
    # Before the model is loaded, because that takes a while.
    if not (text and text.strip()) and image is None and video is None:
        raise argparse.ArgumentError(None, "the query is empty: give a text, --image or --video")
    if hybrid and not (text and text.strip()):
        raise argparse.ArgumentError(None, "--hybrid searches for the words of a text: give one, or leave it out")
    for name, file in (("image", image), ("video", video)):
        if file is not None and not Path(file).is_file():
            raise argparse.ArgumentError(None, f"--{name} {file} is not a file")
    if sheet is not None and Path(sheet).suffix.lower() not in SHEETS:
        raise argparse.ArgumentError(None, f"--sheet {sheet} must end in {', '.join(SHEETS)}")
    if sheet is not None and k > SHEET_HITS:
        raise argparse.ArgumentError(None, f"--sheet shows at most {SHEET_HITS} hits, got -k {k}: use --html")
    from btok_hf.corpus import results
    from btok_hf.corpus.index import MOST_HITS, Index
    from btok_hf.corpus.search import Searcher
    from btok_hf.files import check_writable, replacing

    if not 1 <= k <= MOST_HITS:
        raise argparse.ArgumentError(None, f"-k is the number of hits and must be 1 to {MOST_HITS:,}, got {k}")
    for path in filter(None, (sheet, html)):
        check_writable(Path(path).parent)
    if where is not None:
        Index.open(db).count(where)
    hits = Searcher(db, model, device).search(
        text, None if image is None else Path(image), None if video is None else Path(video), k, where, hybrid
    )
    print(results.as_json(hits) if json else results.as_lines(hits))
    if hybrid and not json:
        print("ordered by words and meaning; the scores are of the meaning alone", file=sys.stderr)
    if sheet and not hits:
        print(f"{sheet} is not written: there is nothing to show", file=sys.stderr)
    elif sheet:
        with replacing(Path(sheet)) as opened:
            results.as_sheet(hits).save(opened, SHEETS[Path(sheet).suffix.lower()])
    if html:
        query = " + ".join(part for part in (text, image, video) if part)
        with replacing(Path(html)) as opened:
            opened.write(results.as_html(query, hits).encode())


def app_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "app",
        run_app,
        "Show a page that searches a database by text, picture or clip.",
        "btok app --db db",
    )
    parser.add_argument("--db", required=True, help="folder or address of the database")
    parser.add_argument("--model", help="where the model is (default: where it was when the corpus was embedded)")
    parser.add_argument("--device", help="device of the model (default: a GPU if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument("--public-host", help="the host that browsers ask for, if a proxy shows the page")


def run_app(db: str, host: str, port: int, **load: Any) -> None:
    with needing("btok app", "app"):
        import gradio  # noqa: F401
    from btok_hf.corpus.app import serve

    serve(db, host, port, **load)
