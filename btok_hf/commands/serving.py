"""The command that serves a model: serve."""

from pathlib import Path
from typing import Any

from btok_hf.arguments import named_source
from btok_hf.commands import add_command, needing
from btok_hf.serving.limits import Limits, add_limits


def serve_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        run_serve,
        "Serve a model over HTTP, as OpenAI's /v1/embeddings with vLLM's messages. Clients must send the key in the "
        "environment variable BTOK_API_KEY, if it is set.",
        "btok serve org/btok-2b --port 8000",
    )
    parser.add_argument("repo", help="folder or Hub id of an exported repository")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: REPO)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="device of the model (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--max-seq-length", type=int, help="cut texts to this many tokens (default: the model's)")
    add_limits(parser)
    parser.add_argument(
        "--allow-urls",
        type=lambda value: [host.strip() for host in value.split(",")],
        default=(),
        metavar="HOST[:PORT],…",
        help="open http and https addresses of these hosts that clients name, redirects included (default: none)",
    )
    parser.add_argument(
        "--allow-files",
        type=Path,
        metavar="FOLDER",
        help="open files below this folder that clients name, as file:///… (default: none)",
    )


def run_serve(repo: str, dtype: str, max_pixels: int | None, **options: Any) -> None:
    with needing("btok serve", "serve"):
        from btok_hf.serving.server import serve

    host, port, name = (options.pop(key) for key in ("host", "port", "name"))
    loading = {key: options.pop(key) for key in ("revision", "device", "max_seq_length")}
    pixels = {} if max_pixels is None else {"max_pixels": max_pixels}
    loading |= {"model_kwargs": {"dtype": dtype}, "processor_kwargs": pixels}
    hosts, folder = options.pop("allow_urls"), options.pop("allow_files")
    limits = Limits(**options)
    with named_source(repo):
        serve(repo, host, port, name, limits, hosts, folder, **loading)
