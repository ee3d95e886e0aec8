"""Check a repository with stock loaders: its golden vectors must come out again, in a fresh process.

`btok_hf/golden.py` is what runs there. `btok_hf/serving/verify_url.py` compares a running server in the same way.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from btok_hf import golden
from btok_hf.hub_names import known_tokens, scrub, without_secrets


def verify(
    path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None, device: str = "cpu"
) -> float:
    """Check in a fresh process that stock loaders reproduce the golden vectors of a repository.

    `SentenceTransformer` without remote code and `AutoModel` with remote code embed every golden input in fp32, one by
    one and in a batch. A table of the differences is printed.

    Args:
        path_or_repo (`str` or `Path`): Folder or Hub id of a repository written by `export_model`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the login of `hf auth login`.
        device (`str`): Device of the model. The golden vectors were computed on the CPU.

    Returns:
        `float`: The largest difference of a component of an embedding.

    Raises:
        ValueError: No golden vectors, golden vectors that are nearly equal, or a revision of a local folder.
        RuntimeError: The repository cannot be read, or its vectors differ.
    """
    source = str(path_or_repo)
    path = golden_file(source, revision=revision, token=token)
    content = golden.read_golden(path)
    check_distinct(source, content)
    tolerance = content["tolerance"]
    run = subprocess.run(
        [sys.executable, "-P", golden.__file__],
        input=json.dumps({"source": source, "golden": str(path), "revision": revision, "device": device}),
        env={**os.environ, "HF_TOKEN": token} if token else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if run.returncode:
        raise RuntimeError(scrub(f"Verifying {source} failed:\n{run.stderr[-4000:]}", known_tokens(token)))
    answer = json.loads(run.stdout.splitlines()[-1])
    largest = 0.0
    problems = []
    print(f"{'loader':21}{'input':18}{'alone':>9}{'batched':>9}")
    for loader, differences in answer["results"].items():
        if isinstance(differences, str):
            problems.append(f"{loader} fails with {differences}")
            print(scrub(f"{loader:21}{differences}", known_tokens(token)))
            continue
        for name, pair in differences.items():
            fits = all(difference <= tolerance for difference in pair)  # false for NaN
            largest = max(largest, *pair)
            print(f"{loader:21}{name:18}{pair[0]:9.1e}{pair[1]:9.1e}  {'ok' if fits else 'DIFFERS'}")
            if not fits:
                problems.append(f"{loader}, {name!r}: {max(pair):.1e}")
    if not problems:
        return largest
    failures = [difference for difference in answer["results"].values() if isinstance(difference, str)]
    if len(failures) == len(answer["results"]):
        raise RuntimeError(scrub(f"{source} cannot be loaded and run: {failures[0]}", known_tokens(token)))
    then, now = content["versions"], answer["versions"]
    advice = (
        "Restore the exported files, or export the model again."
        if then == now
        else "First try again with the package versions of the export."
    )
    versions = (", ".join(f"{name} {value}" for name, value in x.items()) for x in (then, now))
    raise RuntimeError(
        scrub(
            f"{source} does not reproduce its golden vectors (a component differs by more than {tolerance:.0e}): "
            f"{'; '.join(problems)}. Exported with {next(versions)}; verified with {next(versions)}. {advice}",
            known_tokens(token),
        )
    )


def golden_file(path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The file of golden vectors of a repository, downloaded if it is on the Hub.

    Args:
        path_or_repo (`str` or `Path`): Folder or Hub id of a repository written by `export_model`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the login of `hf auth login`.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No golden vectors, or a revision of a local folder.
        RuntimeError: The repository cannot be read.
    """
    source = str(path_or_repo)
    path: Path | None = Path(source, golden.FILE_NAME)
    if Path(source).exists():
        if revision is not None:
            raise ValueError(f"{source} is a folder and has no revision {revision!r}. Leave it out, or pass a Hub id.")
    else:
        path = _download_golden(source, revision, token)
    if path is None or not path.is_file():
        raise ValueError(
            f"{source} has no {golden.FILE_NAME} to compare with. btok_hf.export_model writes it. Adapters, untrained "
            "repositories and training checkpoints have none. Export the model, and verify the export."
        )
    return path


def check_distinct(source: str | Path, content: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the vectors of a golden file are so similar that they verify nothing."""
    if not content["closest"] > golden.DISTINCT * content["tolerance"]:
        raise ValueError(
            f"The golden vectors of {source} are too similar to verify anything: those of two different inputs differ "
            f"by {content['closest']:.1e}, with a tolerance of {content['tolerance']:.0e}. The exported model was "
            "untrained or collapsed. Export a trained one."
        )


def _download_golden(repo_id: str, revision: str | None, token: str | None) -> Path | None:
    """Path of the golden vectors in the cache; `None` if the repository has none."""
    try:
        return Path(hf_hub_download(repo_id, golden.FILE_NAME, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:
        cause = without_secrets(error, token)
    raise RuntimeError(
        f"{repo_id} is neither a local folder nor a readable Hub repository ({type(cause).__name__}: {cause}). Check "
        "the name, the revision and, for a private repository, your login (`hf auth login`, HF_TOKEN)."
    ) from cause
