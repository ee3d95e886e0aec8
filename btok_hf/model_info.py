"""What can be said of a stored model without loading its weights: its identity, and its embeddings' dimensions.

`btok embed`, `btok search` and mteb keep results under the identity of a model, so that vectors of two models are
never mixed.
"""

import json
from fnmatch import fnmatch
from hashlib import blake2b, file_digest
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedConfig

from btok_hf.modeling.modeling_btok import bottleneck_token_ids

# Files that the vectors of a model depend on: weights, configurations, tokenizer, processor, prompts, modules. Not the
# remote code, which a newer release exports with other comments: what uses the identity loads the model without it.
# All else may lie in the folder and change: the card, golden vectors, scores, results and states of a training.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config*.json",
    "modules.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
)
# Weights in another format. Loaders read them only where there are no safetensors.
OTHER_WEIGHTS = "pytorch_model*.bin*"


def model_hash(folder: Path | str) -> str:
    """A hash of the files of a local model that its vectors depend on. It takes about a second per gigabyte.

    Args:
        folder (`str` or `Path`): The model. Of its folders, only those that `modules.json` names are read, so that
            checkpoints of a training do not count.

    Returns:
        `str`: 40 hexadecimal digits, the same wherever the folder is.
    """
    folder = Path(folder)
    modules = folder / "modules.json"
    named = [module["path"] for module in json.loads(modules.read_text("utf-8"))] if modules.is_file() else []
    patterns = MODEL_FILES if any(folder.glob("*.safetensors")) else (*MODEL_FILES, OTHER_WEIGHTS)
    found = {
        path
        for part in ("", *named)
        for path in (folder / part).glob("*")
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    }
    digest = blake2b(digest_size=20)
    for path in sorted(found):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(folder).as_posix()} {file_digest(file, blake2b).hexdigest()}\n".encode())
    return digest.hexdigest()


def identify(model: str, revision: str | None = None) -> tuple[str, PreTrainedConfig]:
    """The identity and the configuration of a model. Models with the same identity give the same vectors.

    Args:
        model (`str`): Folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        The commit of a model on the Hub, or the `model_hash` of a local one; and its configuration.

    Raises:
        OSError: There is no such model.
        ValueError: It has no Bottleneck Tokens, or is not merged.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{model} has no config.json. Give an exported repository; adapters are merged with: btok export"
            )
        identity = model_hash(folder)
        config = AutoConfig.from_pretrained(model)
    else:
        path = Path(hf_hub_download(model, "config.json", revision=revision))
        identity = path.parent.name  # …/snapshots/COMMIT/config.json
        config = AutoConfig.from_pretrained(model, revision=identity)
    bottleneck_token_ids(config)
    return identity, config


def trained_dimensions(config: PreTrainedConfig) -> list[int]:
    """The numbers of dimensions that a model's embeddings may be cut to, ascending. The last is the full size.

    Training with `matryoshka_dims` records the smaller ones in `config.json`, under the key that vLLM reads too.
    """
    full = config.get_text_config().hidden_size
    return sorted({*(getattr(config, "matryoshka_dimensions", None) or ()), full})


def check_dimensions(model: str, config: PreTrainedConfig, dimensions: int, full: int | None = None) -> None:
    """Raise `ValueError` if a model was not trained for embeddings of so many dimensions.

    Args:
        model (`str`): Its name, for the message.
        config (`PreTrainedConfig`): Its configuration.
        dimensions (`int`): Leading dimensions that shall be kept.
        full (`int`, *optional*): Dimensions that there are, if they were cut before. Default: those of the model.
    """
    trained = [size for size in trained_dimensions(config) if full is None or size <= full]
    if dimensions not in trained:
        raise ValueError(
            f"dimensions must be a size that {model} was trained for, {' or '.join(map(str, trained))}, got "
            f"{dimensions}. Vectors cut to other sizes lose much of their quality (train with matryoshka_dims)."
        )
