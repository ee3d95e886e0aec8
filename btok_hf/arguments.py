"""Check arguments of loading, encoding and serving, and name the model in errors of reading it."""

import contextlib
import numbers
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OF_MODELS = ("config.json", "adapter_config.json", "modules.json")
HUB = ("revision", "token", "cache_folder", "local_files_only", "subfolder")
# Names of the same arguments in Sentence-Transformers and transformers.
OTHER_NAMES = {"tokenizer_kwargs": "processor_kwargs", "cache_dir": "cache_folder", "use_auth_token": "token"}
# Arguments of Sentence-Transformers that have no meaning here.
NOT_HERE = {
    "backend": "The model runs in torch, and not in ONNX or OpenVINO; leave it out",
    "config_kwargs": "The configuration belongs to the weights; leave it out, or edit config.json",
    "model_card_data": "The card is kept, or written by the trainer; leave it out",
    "modules": "The modules are those of the repository; leave it out, and append others to the model",
}


def check_loading(prompts: Any, hub_kwargs: Mapping[str, Any]) -> None:
    """Raise `TypeError` if prompts are not a mapping of texts, or if there is no argument of a name."""
    if prompts is not None and not (
        isinstance(prompts, Mapping) and all(isinstance(text, str) for pair in prompts.items() for text in pair)
    ):
        raise TypeError(f"prompts must be a dict of texts by name, e.g. {{'query': 'Find it. '}}, got {prompts!r}.")
    for name in hub_kwargs:
        if name not in HUB:
            known = f"Use {OTHER_NAMES[name]}" if name in OTHER_NAMES else f"Leave it out, or use {', '.join(HUB)}"
            known = NOT_HERE.get(name, known)
            raise TypeError(f"BTokSentenceTransformer has no argument {name!r}. {known}.")


def check_pixels(pixels: Mapping[str, Any]) -> None:
    """Raise `ValueError` if `min_pixels` or `max_pixels` is below 1, or the first exceeds the second."""
    given = {name: pixels[name] for name in ("min_pixels", "max_pixels") if pixels.get(name) is not None}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}. Leave it out for the model's own.")
    if len(given) == 2 and given["min_pixels"] > given["max_pixels"]:
        raise ValueError(
            f"min_pixels must not exceed max_pixels, got {given['min_pixels']} and {given['max_pixels']}. Lower "
            "min_pixels or raise max_pixels."
        )


def check_free(host: str, port: int) -> None:
    """Raise `ValueError` if no server can listen on an address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            tried.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Nothing can listen on {host}, port {port} ({getattr(error, 'strerror', None) or error}). Give another "
            "--port or --host."
        ) from error


def check_truncate_dim(truncate_dim: Any) -> None:
    """Raise `ValueError` if embeddings are cut to no whole number of dimensions above 0."""
    is_number = isinstance(truncate_dim, numbers.Integral) and not isinstance(truncate_dim, bool)
    if truncate_dim is not None and (not is_number or truncate_dim < 1):
        raise ValueError(f"truncate_dim must be a number of dimensions above 0, got {truncate_dim!r}.")


def check_prompt(prompt: Any) -> None:
    """Raise `ValueError` if a prompt is not a text."""
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, got {prompt!r}. One of the model's prompts goes by prompt_name.")


def check_row_length(value: Any, least: int) -> None:
    """Raise `ValueError` for a `max_seq_length` that leaves no token of the content."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"max_seq_length must be a whole number of tokens, and at least {least}, got {value!r}: every row ends in "
            f"{least - 1} tokens that are never cut, the suffix and the Bottleneck Tokens."
        )


@contextlib.contextmanager
def named_damage(model_name_or_path: str) -> Iterator[None]:
    """Name the model in errors of damaged files: JSON, Jinja and tokenizers raise errors of many types without it."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError or isinstance(error, (OSError, ImportError, RuntimeError, MemoryError)):
            raise
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):  # of model_kwargs
            raise
        raise ValueError(
            f"{model_name_or_path!r} cannot be loaded ({type(error).__name__}: {error}). A file of it is damaged "
            "or was edited. Export or download it again."
        ) from error


@contextlib.contextmanager
def named_source(source: str) -> Iterator[None]:
    """Add the name of a model to an error of reading it, which transformers leaves out.

    Raises `OSError` for the folder of a run, in which only the checkpoints are models.
    """
    from huggingface_hub.errors import HFValidationError  # slow: the command line imports this file

    folder = Path(source)
    if folder.is_dir() and not _is_model(folder):
        steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if _is_model(path)]
        if newest := max((int(step) for step in steps if step.isdecimal()), default=None):
            raise OSError(
                f"{source} holds checkpoints and is no model itself. Name one of them, e.g. "
                f"{folder / f'checkpoint-{newest}'}"
            )
    try:
        yield
    except (OSError, HFValidationError) as error:  # the latter for a path that is no name on the Hub
        if Path(source).exists() or (source in str(error) and isinstance(error, OSError)):
            raise
        raise OSError(
            f"{source} is neither a local folder nor a readable Hub repository ({error}). Check the name and, for a "
            "private one, your login (`hf auth login`, HF_TOKEN)."
        ) from error


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in OF_MODELS)
