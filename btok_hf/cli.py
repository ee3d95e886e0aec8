"""The `btok` command and its subcommands. They only parse arguments and call the library.

Exit status: 0 success · 1 an error, printed in one line (with `--debug` a traceback), or a failed dataset of
`btok mmeb` · 2 invalid arguments · 130 interrupted.

A subcommand imports what it needs when it runs, so that `--help` is fast. To add one, write a function that adds its
parser and a function that runs it, and list the former in `main`.
"""

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btok_hf.errors import RESUME, named_source, one_line_errors, take_debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments (`Sequence[str]`, *optional*): The arguments after `btok`. Default: those of the process.

    Returns:
        `int`: The exit status, as in the module's docstring.
    """
    # OpenMP threads that wait for work would keep cores busy that others could use: on shared cores everything became
    # several times slower. OpenMP reads it when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="btok",
        description="Create, train, publish, verify and evaluate embedding models with Bottleneck Tokens.",
        epilog="`btok COMMAND --help` shows the flags and an example. Flags may be written with - or _.\n"
        "Exit status: 0 success, 1 an error or a failed dataset of `btok mmeb`, 2 invalid arguments, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"btok-hf {version('btok-hf')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in (_add_tokens, _mine, _train, _export, _verify, _push, _serve, _mmeb):
        add_command(commands)
    words, bare_debug = take_debug(sys.argv[1:] if arguments is None else arguments)
    if next((word for word in words if not word.startswith("-")), None) != "train":
        # Accept `--num_tokens`, as in Python and in recipes, for `--num-tokens`. `btok train` reads both.
        words = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    options, rest = parser.parse_known_args(words)
    given = vars(options)
    run, debug = given.pop("run"), given.pop("debug") or bare_debug
    if run is _run_train:
        given["words"] = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with one_line_errors(debug):
            outcome = run(**given)
        # `btok train` returns a function that runs the training. Errors of a long run keep their traceback.
        return (outcome() if callable(outcome) else outcome) or 0
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted" + RESUME * (run is _run_train), file=sys.stderr)
        return 130


def _command(commands: Any, name: str, run: Any, description: str, example: str) -> argparse.ArgumentParser:
    """Add the parser of a subcommand. `run` is called with its parsed arguments."""
    parser = commands.add_parser(
        name,
        help=description[0].lower() + description.partition(".")[0][1:],
        description=textwrap.fill(description, 79),
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # which leaves the example on one line
    )
    # SUPPRESS, because a default would overwrite `btok --debug COMMAND`.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.set_defaults(run=run)
    return parser


def _add_tokens(commands: Any) -> None:
    parser = _command(
        commands,
        "add-tokens",
        _run_add_tokens,
        "Add Bottleneck Tokens to a base checkpoint and write a repository that is ready to train.",
        "btok add-tokens Qwen/Qwen2-VL-2B-Instruct btok-start --max-pixels 501760",
    )
    parser.add_argument("base", help="folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--num-tokens", type=int, default=4, help="K; 0 is last-token pooling (default: %(default)s)")
    parser.add_argument(
        "--order",
        choices=["media_first", "as_given"],
        default="media_first",
        help="order of a row's content: media, instruction, text; or as given (default: %(default)s)",
    )
    parser.add_argument("--suffix", help="words between the content and the tokens of every row")
    parser.add_argument(
        "--noise-std",
        type=float,
        default=0.0,
        help="noise added to the token rows, relative to the std of the EOS row (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--min-pixels", type=int, help="enlarge smaller images to this many pixels")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--query-prompt", help="instruction for queries")
    parser.add_argument("--document-prompt", help="instruction for documents")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")


def _run_add_tokens(query_prompt: str | None, document_prompt: str | None, output_dir: str, **options: Any) -> None:
    from btok_hf.bottleneck import add_bottleneck_tokens
    from btok_hf.files import check_writable

    check_writable(output_dir)
    prompts = {"query": query_prompt, "document": document_prompt}
    with named_source(options["base"]):
        add_bottleneck_tokens(
            output_dir=output_dir, prompts={name: text for name, text in prompts.items() if text}, **options
        )
    print(f"Written to {output_dir}")


def _train(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train with condensation and write the repository to publish", add_help=False
    )
    parser.set_defaults(run=_run_train)


def _run_train(words: list[str]) -> Callable[[], None]:
    """Set up a training. The parser of `training/train.py` reads the flags of the Trainer and a YAML file."""
    from btok_hf.training.train import set_up

    return set_up(words).run


def _mine(commands: Any) -> None:
    parser = _command(
        commands,
        "mine",
        _run_mine,
        "Mine hard negatives for pairs with a model, and write pairs with a column of negatives to train with.",
        "btok mine pairs.parquet mined.parquet --model org/btok-2b --relative-margin 0.05",
    )
    parser.add_argument("pairs", help="pair file or Hub id, as for `btok train`")
    parser.add_argument("output", help="parquet file to write")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--num-negatives", type=int, default=3, help="most negatives of a row (default: %(default)s)")
    parser.add_argument("--range-min", type=int, default=0, help="nearest candidates to skip (default: %(default)s)")
    parser.add_argument("--range-max", type=int, help="nearest candidates to consider")
    for name, meaning in (
        ("--max-score", "highest cosine of a negative"),
        ("--min-score", "lowest cosine of a negative"),
        ("--absolute-margin", "distance of a negative's cosine to the lowest positive's"),
        ("--relative-margin", "the same, as a fraction of that positive's cosine"),
    ):
        parser.add_argument(name, type=float, help=meaning)
    parser.add_argument(
        "--sampling-strategy",
        choices=["top", "random"],
        default="top",
        help="take the nearest, or draw from them (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="as in encode (default: %(default)s)")
    parser.add_argument("--use-faiss", action="store_true", help="search with faiss instead of torch")
    parser.add_argument("--seed", type=int, default=0, help="seed of random sampling (default: %(default)s)")


def _run_mine(pairs: str, output: str, model: str, revision: str | None, **options: Any) -> None:
    from btok_hf.files import check_writable
    from btok_hf.sentence_transformer import BTokSentenceTransformer
    from btok_hf.training.data import load_pairs
    from btok_hf.training.mining import mine_hard_negatives

    check_writable(Path(output).parent)
    dataset = load_pairs(pairs)
    with named_source(model):
        loaded = BTokSentenceTransformer(model, revision=revision)
    print(mine_hard_negatives(dataset, loaded, output, **options))


def _export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _run_export,
        "Export a training checkpoint (full model or adapters) as a Hub repository.",
        "btok export btok-run/checkpoint-1000 btok-mine",
    )
    parser.add_argument("checkpoint", help="folder or Hub id of a CondensationTrainer checkpoint or a repository")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapters without merging them")
    parser.add_argument("--base-model", help="with --adapter-only: Hub id of the base that the adapters belong to")
    parser.add_argument("--max-shard-size", default="5GB", help="maximum size of a weight file (default: %(default)s)")


def _run_export(
    checkpoint: str, output_dir: str, adapter_only: bool, base_model: str | None, max_shard_size: str
) -> None:
    from btok_hf.export import export_adapters, export_model
    from btok_hf.files import check_writable
    from btok_hf.sentence_transformer import BTokSentenceTransformer

    if base_model and not adapter_only:
        raise argparse.ArgumentError(
            None,
            f"--base-model needs --adapter-only, got --base-model {base_model} without it: merged weights have no "
            "base. Add --adapter-only, or leave --base-model out.",
        )
    if Path(output_dir).resolve() == Path(checkpoint).resolve():
        raise argparse.ArgumentError(
            None,
            f"output_dir must not be the checkpoint, got {output_dir}: training could not resume from it. Choose "
            "another folder.",
        )
    check_writable(output_dir)
    with named_source(checkpoint):
        model = BTokSentenceTransformer(checkpoint, device="cpu")
    if adapter_only:
        export_adapters(model, output_dir, base_model)
    else:
        export_model(model, output_dir, max_shard_size=max_shard_size)
    print(f"Exported to {output_dir}")


def _verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        _run_verify,
        "Load a repository in a fresh process with stock loaders and compare its embeddings with its golden vectors. "
        "With --url, compare a running server instead.",
        "btok verify org/btok-2b --revision main",
    )
    parser.add_argument("path_or_repo", help="folder or Hub id of an exported repository")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="device of the model (default: cpu)")
    parser.add_argument("--url", help="address of a running server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--tolerance", type=float, help="with --url: largest allowed difference (default: the file's)")


def _run_verify(
    path_or_repo: str, revision: str | None, device: str | None, url: str | None, tolerance: float | None
) -> None:
    if url is None:
        from btok_hf.hub import verify

        if tolerance is not None:
            raise argparse.ArgumentError(
                None, "--tolerance needs --url: files must fit the golden vectors as they are."
            )
        largest = verify(path_or_repo, revision=revision, device=device or "cpu")
    else:
        from btok_hf.serving.verify_url import verify_url

        if device is not None:
            raise argparse.ArgumentError(None, "--device has no meaning with --url: the server chose its own.")
        largest = verify_url(path_or_repo, url, revision=revision, tolerance=tolerance)
    print(f"verified: largest difference {largest:.1e}")


def _push(commands: Any) -> None:
    parser = _command(
        commands,
        "push",
        _run_push,
        "Upload an exported repository to the Hub in one commit. The token comes from HF_TOKEN or `hf auth login`. "
        "There is no flag for it, because other users of the machine can see flags.",
        "btok push btok-mine org/btok-2b --private",
    )
    parser.add_argument("path", help="folder written by `btok export` or `btok add-tokens`")
    parser.add_argument("repo_id", help="Hub id of the repository; created if it does not exist")
    parser.add_argument(
        "--private", action="store_true", default=None, help="create a private repository, or require that it is one"
    )
    parser.add_argument("--revision", help="branch to commit to; created from main if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit-message", default=argparse.SUPPRESS, help="first line of the commit message")


def _run_push(**options: Any) -> None:
    from btok_hf.hub import push

    print(push(**options))


def _serve(commands: Any) -> None:
    parser = _command(
        commands,
        "serve",
        _run_serve,
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
    for name, kind, default, meaning in (
        ("--max-rows", int, 256, "most rows of a request"),
        ("--queue-rows", int, 1024, "most rows of all requests together"),
        ("--batch-rows", int, 64, "most rows of a batch"),
        ("--max-body", int, 32 * 2**20, "most bytes of a request"),
        ("--max-image-pixels", int, 50_000_000, "most pixels of an image, or of a video, that a client sends"),
        ("--timeout", float, 60.0, "most seconds of a request"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} (default: %(default)s)")


def _run_serve(repo: str, dtype: str, max_pixels: int | None, **options: Any) -> None:
    try:
        from btok_hf.serving.server import Limits, serve
    except ModuleNotFoundError as error:
        raise ImportError(f"btok serve needs the package {error.name}: pip install 'btok-hf[serve]'.") from error

    host, port, name = (options.pop(key) for key in ("host", "port", "name"))
    loading = {key: options.pop(key) for key in ("revision", "device", "max_seq_length")}
    loading |= {"model_kwargs": {"dtype": dtype}, "processor_kwargs": {"max_pixels": max_pixels} if max_pixels else {}}
    limits = Limits(**options)
    with named_source(repo):
        serve(repo, host, port, name, limits, **loading)


def _mmeb(commands: Any) -> None:
    parser = _command(
        commands,
        "mmeb",
        _run_mmeb,
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
    parser.add_argument("--prompt", help="instruction for every input (default: the model's default)")
    parser.add_argument("--eval-task", help="task id from the benchmark's eval.yaml on the Hub; writes .eval_results")
    parser.add_argument("--cache", help="folder for embeddings (default: embeddings in the output folder)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run_mmeb(
    model: str,
    data: str,
    output: str,
    revision: str | None,
    dtype: str,
    max_pixels: int | None,
    modality: list[str] | None,
    cache: str | None,
    **options: Any,
) -> int:
    from accelerate import PartialState

    from btok_hf.evaluation import mmeb
    from btok_hf.files import check_writable

    # Before the model is loaded.
    mmeb.chosen(options["datasets"], modality)
    if not Path(data).is_dir():
        raise FileNotFoundError(f"There is no folder {data!r} with the benchmark. docs/evaluation.md downloads it.")
    check_writable(output)
    with named_source(model):
        loaded = mmeb.load_model(
            model, revision=revision, dtype=dtype, max_pixels=max_pixels, device=str(mmeb.processes().device)
        )
    _, errors = mmeb.evaluate(
        loaded, data, output, modalities=modality, name=Path(model).name, cache_dir=cache, **options
    )
    PartialState().destroy_process_group()  # without it, torch aborts some processes at exit
    return int(bool(errors))
