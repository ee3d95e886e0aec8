"""Command line of `btok_hf.add_bottleneck_tokens`."""

import argparse
import sys

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m btok_hf.add_tokens",
        description="Turn a base checkpoint into a repository with Bottleneck Tokens, ready to train.",
        epilog="example: python -m btok_hf.add_tokens Qwen/Qwen2-VL-2B-Instruct btok-start --max_pixels 501760",
    )
    parser.add_argument("base", help="folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--num_tokens", type=int, default=4, help="K; 0 is last-token pooling (default: %(default)s)")
    parser.add_argument(
        "--noise_std", type=float, default=0.0, help="noise on the rows, relative to the EOS row's std"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--min_pixels", type=int, help="enlarge smaller images to this many pixels")
    parser.add_argument("--max_pixels", type=int, help="reduce larger images and frames to this many pixels")
    parser.add_argument("--query_prompt", help="instruction for queries")
    parser.add_argument("--document_prompt", help="instruction for documents")
    parser.add_argument("--dtype", default="auto", help="precision to load and save in (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    arguments = vars(parser.parse_args())
    named = {name: arguments.pop(f"{name}_prompt") for name in ("query", "document")}
    from btok_hf.bottleneck import add_bottleneck_tokens
    from btok_hf.export import check_writable

    try:
        check_writable(arguments["output_dir"])
        add_bottleneck_tokens(**arguments, prompts={name: text for name, text in named.items() if text})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Written to {arguments['output_dir']}")
