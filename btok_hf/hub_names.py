"""Names on the Hub: what is the id of a repository, and what looks like a token."""

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")


def is_hub_id(source: Path | str) -> bool:
    """Whether `source` is the id of a repository, `owner/name`, and not a local file or folder."""
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return "/" in str(source) and not Path(source).exists()
