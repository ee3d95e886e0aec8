"""Commands that train and prepare training data: train, mine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from btok_hf.arguments import named_source
from btok_hf.commands import add_command, needing


def train_command(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train with condensation and write the repository to publish", add_help=False
    )
    parser.set_defaults(run=run_train)


def run_train(words: list[str]) -> Callable[[], None]:
    """Set up a training. The parser of `training/train.py` reads the flags of the Trainer and a YAML file."""
    with needing("btok train", "train"):
        from btok_hf.training.train import set_up

    return set_up(words).run


def mine_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "mine",
        run_mine,
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


def run_mine(pairs: str, output: str, model: str, revision: str | None, **options: Any) -> None:
    with needing("btok mine", "train"):
        from btok_hf.sentence_transformer import BTokSentenceTransformer
        from btok_hf.training.data import load_pairs
        from btok_hf.training.mining import check_output, mine_hard_negatives

    check_output(output)
    if Path(pairs).exists() and Path(output).exists() and Path(output).samefile(pairs):
        raise ValueError(
            f"{output} is the file of the pairs, which mining leaves as it is. Name another file to write."
        )
    dataset = load_pairs(pairs)
    with named_source(model):
        loaded = BTokSentenceTransformer(model, revision=revision)
    print(mine_hard_negatives(dataset, loaded, output, **options))
