"""Names on the Hub: what is the id of a repository; and tokens, which no message may contain."""

import os
import re
import traceback
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import get_token
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


def known_tokens(token: str | None) -> set[str]:
    """The tokens known to this process, to remove them from messages."""
    known = (token, get_token(), os.environ.get("HF_TOKEN"))
    return {value.strip() for value in known if isinstance(value, str) and value.strip()}


def scrub(text: str, secrets: Collection[str]) -> str:
    """`text` without these tokens and without anything that looks like a token."""
    for secret in secrets:
        text = text.replace(secret, "<token>")
    return HUB_TOKEN.sub("<token>", text)


def without_secrets(error: Exception, token: str | None) -> Exception:
    """`error` itself, or, if its traceback contains a token, a new exception with the message without the token."""
    secrets, text = known_tokens(token), "".join(traceback.format_exception(error))
    if scrub(text, secrets) == text:
        return error
    return RuntimeError(scrub(f"{type(error).__name__}: {error}", secrets))
