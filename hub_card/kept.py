"""The card that a model was loaded with: kept when the model is saved again, unless it no longer describes it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers.util import load_file_path

from btok_hf.hub_card.card import for_folder
from btok_hf.hub_names import is_hub_id

logger = logging.getLogger(__name__)

# Pictures of the repository that a card shows or loads: in Markdown, and in its snippets.
PICTURES = re.compile(
    r"""(?:\]\(|\{folder\}/|src=["'])([\w-][\w.-]*(?:/[\w-][\w.-]*)*\.(?:png|jpe?g|gif|webp|svg))[)"'\s]"""
)


class Described(NamedTuple):
    """What a card says of how its model embeds.

    Args:
        prompts (`dict[str, str]`): Instructions by name.
        default_prompt_name (`str`, *optional*): Name of the prompt that `encode` uses.
        truncate_dim (`int`, *optional*): Dimensions that embeddings are cut to.
        max_seq_length (`int`, *optional*): The longest row in tokens.
        max_pixels (`int`): Larger images are reduced to this many pixels.
    """

    prompts: Mapping[str, str | None]
    default_prompt_name: str | None
    truncate_dim: int | None
    max_seq_length: int | None
    max_pixels: int


class LoadedCard:
    """The card of the repository that a model was loaded from.

    Args:
        source (`str`): Folder or Hub id of the repository.
        hub_kwargs (`dict`): `revision`, `token`, `cache_folder`, `local_files_only`, `subfolder`.
        described (`Described`, *optional*): What the card describes. `None`: the model was loaded with other settings.

    Attributes:
        text (`str`, *optional*): The content of README.md, if there is one.
    """

    def __init__(self, source: str, hub_kwargs: Mapping[str, Any], described: Described | None) -> None:
        self.source = str(Path(source).resolve()) if Path(source).is_dir() else source
        self.hub_kwargs, self.described = hub_kwargs, described
        card = self._read("README.md")
        self.text = None if card is None else card.decode("utf-8", errors="replace")

    def _read(self, name: str) -> bytes | None:
        """A file of the repository; `None` if it has none of this name."""
        path = load_file_path(self.source, name, **self.hub_kwargs)
        return None if path is None else Path(path).read_bytes()

    def files(self, now: Described | None) -> dict[str, str | bytes] | None:
        """The card with its licence and its pictures, to be written to another repository.

        Args:
            now (`Described`, *optional*): The settings of the model now. `None`: its weights were changed.

        Returns:
            `dict[str, str | bytes]`, *optional*: Content by path. `None` if there is no card, or if it describes other
            settings, which a warning says.
        """
        if self.text is None:
            return None
        if now is None or self.described != now:
            logger.warning(
                f"The README.md of {self.source} is not kept: it describes other weights, prompts, truncate_dim, "
                "max_seq_length or pixels. A new one is written, without results and licence. To state them, export "
                "with files."
            )
            return None
        found = {name: self._read(name) for name in ("LICENSE", *sorted(set(PICTURES.findall(self.text))))}
        if gone := [name for name in found if found[name] is None and name != "LICENSE"]:
            logger.warning(f"The README.md of {self.source} shows {', '.join(gone)}, which cannot be found there.")
        # Snippets load the repository that the card is in, not the one it comes from.
        card = for_folder(self.text, self.source) if is_hub_id(self.source) else self.text
        return {"README.md": card, **{name: content for name, content in found.items() if content is not None}}
