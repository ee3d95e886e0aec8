"""Commands that write, check and publish repositories: add-tokens, convert, export, verify, push."""

import argparse
from pathlib import Path
from typing import Any

from btok_hf.arguments import named_source
from btok_hf.commands import add_command


def add_tokens_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "add-tokens",
        run_add_tokens,
        "Add Bottleneck Tokens to a base checkpoint and write a repository that is ready to train.",
        "btok add-tokens Qwen/Qwen2-VL-2B-Instruct btok-start --max-pixels 501760",
    )
    parser.add_argument(
        "base",
        help="folder or Hub id of a Qwen2-VL, 2.5-VL, 3-VL, 3.5, InternVL3-hf, SmolVLM or LFM2-VL checkpoint",
    )
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
        help="noise added to the token rows, relative to the std of the row they start from (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--min-pixels", type=int, help="enlarge smaller images to this many pixels")
    parser.add_argument("--max-pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--query-prompt", help="instruction for queries")
    parser.add_argument("--document-prompt", help="instruction for documents")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")


def run_add_tokens(query_prompt: str | None, document_prompt: str | None, output_dir: str, **options: Any) -> None:
    from btok_hf.bottleneck import add_bottleneck_tokens
    from btok_hf.files import check_writable

    check_writable(output_dir)
    prompts = {"query": query_prompt, "document": document_prompt}
    with named_source(options["base"]):
        add_bottleneck_tokens(
            output_dir=output_dir, prompts={name: text for name, text in prompts.items() if text}, **options
        )
    print(f"Written to {output_dir}")


def convert_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        run_convert,
        "Write a checkpoint of the public reproduction (github.com/siryuson/BottleneckTokens) as a Hub repository.",
        "btok convert outputs/btoks_qwen2vl_2b_v1/checkpoint-5000 btok-mine --license apache-2.0",
    )
    parser.add_argument("checkpoint", help="folder or Hub id: a full checkpoint or adapters, which are merged")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--base", help="folder or Hub id of the base model (default: as the checkpoint names it)")
    parser.add_argument("--license", help="id of the weights' licence, for the card")
    parser.add_argument("--base-license", help="licence of the base model, for the card")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")


def run_convert(
    checkpoint: str, output_dir: str, base: str | None, license: str | None, base_license: str | None, **options: Any
) -> None:
    from btok_hf.convert import convert_checkpoint
    from btok_hf.hub_card.card import CardArguments

    card = CardArguments(model_license=license, base_license=base_license)
    with named_source(checkpoint):
        convert_checkpoint(checkpoint, output_dir, base=base, card=card, **options)
    print(f"Converted to {output_dir}")


def export_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        run_export,
        "Export a training checkpoint (full model or adapters) as a Hub repository.",
        "btok export btok-run/checkpoint-1000 btok-mine",
    )
    parser.add_argument("checkpoint", help="folder or Hub id of a CondensationTrainer checkpoint or a repository")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapters without merging them")
    parser.add_argument("--base-model", help="with --adapter-only: Hub id of the base that the adapters belong to")
    parser.add_argument("--max-shard-size", default="5GB", help="maximum size of a weight file (default: %(default)s)")


def run_export(
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


def verify_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        run_verify,
        "Load a repository in a fresh process with stock loaders and compare its embeddings with its golden vectors. "
        "With --url, compare a running server instead.",
        "btok verify org/btok-2b --revision main",
    )
    parser.add_argument("path_or_repo", help="folder or Hub id of an exported repository")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="device of the model (default: cpu)")
    parser.add_argument("--url", help="address of a running server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--tolerance", type=float, help="with --url: largest allowed difference (default: the file's)")


def run_verify(
    path_or_repo: str, revision: str | None, device: str | None, url: str | None, tolerance: float | None
) -> None:
    if url is None:
        from btok_hf.verification import verify

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


def push_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "push",
        run_push,
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


def run_push(**options: Any) -> None:
    from btok_hf.hub import push

    print(push(**options))
