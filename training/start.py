"""The model that a training starts from: one with Bottleneck Tokens, or a base, which gets them first."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, TrainingArguments

from btok_hf.arguments import named_source
from btok_hf.backbones import family_of
from btok_hf.bottleneck import add_bottleneck_tokens

MADE_FROM = "made_from.json"  # in the folder of a base with tokens: what it was made from


def check_starting_point(
    model: str, folder: str | Path, num_tokens: int | None = None, revision: str | None = None, **pixels: Any
) -> bool:
    """Check the model to train by its configuration, without loading weights.

    Args:
        model, folder, num_tokens, revision, pixels: As in `starting_point`.

    Returns:
        `bool`: Whether it has Bottleneck Tokens.

    Raises:
        OSError, ValueError: As in `starting_point`.
    """
    with named_source(model):
        config = AutoConfig.from_pretrained(model, revision=revision)
    family_of(config)  # raises
    if Path(model).is_dir() and not [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]:
        raise FileNotFoundError(f"The folder {model} has no weights (*.safetensors). Name that of a whole model.")
    if hasattr(config, "btok_token_ids"):
        if num_tokens not in (None, config.btok_num_tokens):
            raise ValueError(
                f"{model} has {config.btok_num_tokens} Bottleneck Tokens, and num_tokens is {num_tokens}. Leave it "
                "out, or start from the base model."
            )
        return True
    if Path(folder).exists():
        origin, record = _origin(model, num_tokens, revision, pixels), Path(folder, MADE_FROM)
        found = json.loads(record.read_text("utf-8")) if record.is_file() else "something that it does not record"
        if found != origin:
            raise ValueError(
                f"{folder} was made from {found}, but this run starts from {origin}. Remove it, or name another "
                "output folder."
            )
    return False


def starting_point(
    model: str,
    folder: str | Path,
    args: TrainingArguments,
    num_tokens: int | None = None,
    revision: str | None = None,
    **pixels: Any,
) -> str:
    """The folder or Hub id of the model to train: `model` if it has Bottleneck Tokens, else `folder`.

    A base is written to `folder` with Bottleneck Tokens, completely or not at all. A later run takes what is there.

    Args:
        model (`str`): Folder or Hub id of a model with Bottleneck Tokens, or of a base.
        folder (`str` or `Path`): Where to write the base with Bottleneck Tokens.
        args (`TrainingArguments`): Those of the run. Of several processes, the main one writes.
        num_tokens (`int`, *optional*): K. Default: that of the model; 4 for a base.
        revision (`str`, *optional*): Of `model`, on the Hub.
        pixels: `min_pixels` and `max_pixels` of `add_bottleneck_tokens`, for a base.

    Raises:
        OSError, ValueError: A model that cannot be read or is not supported, or has another number of Bottleneck
            Tokens; a `folder` that was made from something else.
    """
    folder = Path(folder)  # drops a "/" at the end
    with args.main_process_first(local=False):
        if check_starting_point(model, folder, num_tokens, revision, **pixels):
            return model
        if not folder.exists():
            origin = _origin(model, num_tokens, revision, pixels)
            unfinished = Path(f"{folder}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            add_bottleneck_tokens(model, unfinished, origin["num_tokens"], revision=revision, **pixels)
            Path(unfinished, MADE_FROM).write_text(json.dumps(origin), "utf-8")
            unfinished.rename(folder)
    return str(folder)


def _origin(model: str, num_tokens: int | None, revision: str | None, pixels: dict[str, Any]) -> dict[str, Any]:
    tokens = 4 if num_tokens is None else num_tokens
    return {"base": model, "revision": revision, "num_tokens": tokens, **pixels}
