"""Upload an exported repository to the Hub (`push`), and check a repository with stock loaders (`verify`).

- A push is one commit (`HfApi.create_commit`), so that nobody loads a partial repository. `upload_folder` may create
  several commits.
- A failed push does not change the folder. Uploaded files stay on the Hub, and the same command resumes.
- Tokens must not leak: every message and chained exception of this module is searched for them.

`btok_hf/export.py` writes repositories, `btok_hf/golden.py` computes the comparison in the fresh process.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open

from btok_hf import golden
from btok_hf.hub_card.card import for_hub
from btok_hf.hub_names import HUB_TOKEN, is_hub_id

# Files of a training folder that are not part of the exported repository.
NOT_PUBLISHED = [
    "start/*",  # the base model with Bottleneck Tokens, written by train.py
    "runs/*",
    "*.bin",  # training_args.bin; weights are safetensors
    "*.pt",  # optimizer and scheduler
    "*.pth",  # random states
    "trainer_state.json",
    "*__pycache__/*",
]
# Files of an earlier push that are deleted if this push has none of that name. Loaders would use the old ones.
REPLACED = ["model*.safetensors", "model.safetensors.index.json", "adapter_*", golden.FILE_NAME]
# Adapters have none of these.
OF_MERGED = ["config.json", "modeling_btok.py", "inputs_btok.py", "generation_config.json"]
RESULTS_FOLDER = ".eval_results"  # where the Hub looks for results
MESSAGE = "Upload Bottleneck-Token model with btok-hf"


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = MESSAGE,
    token: str | None = None,
) -> str:
    """Upload an exported repository to the Hub in one commit, without hidden files, checkpoints, optimizer states.

    Args:
        path (`str` or `Path`): Folder written by `export_model`, `export_adapters` or `add_bottleneck_tokens`.
        repo_id (`str`): Hub id, e.g. `org/btok-2b`. The repository is created if it does not exist.
        private (`bool`, *optional*): Visibility of a new repository; an existing repository must have the same.
            Default: the organisation's setting.
        revision (`str`, *optional*): Branch to commit to. It is created from the main branch if it does not exist.
        create_pr (`bool`): Open a pull request instead of committing.
        commit_message (`str`): First line of the commit message.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the login of `hf auth login`.

    Returns:
        `str`: URL of the commit or of the pull request.

    Raises:
        ValueError: A folder that is not a complete exported repository or that contains a token, or an invalid
            `repo_id`.
        RuntimeError: The upload failed. The folder is unchanged, and the message contains the command to resume with.
    """
    path = Path(path)
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(
            f"A pull request goes to the main branch, got create_pr=True and revision={revision!r}. Leave one out."
        )
    files = _files_to_publish(path, _secrets(token))
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and api.model_info(repo_id).private != private:
            kinds = ("public", "private")
            raise ValueError(
                f"{repo_id} exists and is {kinds[not private]}, not {kinds[private]}. Change it in the "
                "settings of the repository, or leave private out."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = (name for name in api.list_repo_files(repo_id, revision=revision) if "/" not in name)
        of_merged = OF_MERGED if "adapter_config.json" in files else []
        stale = set(filter_repo_objects(present, allow_patterns=REPLACED + of_merged))
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, _content(path, name, repo_id)) for name in files),
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale - set(files))),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
        return commit.pr_url or commit.commit_url
    except Exception as error:
        cause = _without_secrets(error, token)
    command = ["btok", "push", str(path), repo_id]
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision is not None else []
    command += ["--create-pr"] if create_pr else []
    command += ["--commit-message", commit_message] if commit_message != MESSAGE else []
    # Raised outside of `except`: inside, Python would chain the original exception, which may contain the token.
    raise RuntimeError(
        f"The upload to {repo_id} failed ({type(cause).__name__}: {cause}). The repository in {path} is complete and "
        "unchanged. Files that were already uploaded are kept. If access was refused, log in with `hf auth login` or "
        f"set HF_TOKEN. Retry with: {shlex.join(command)}"
    ) from cause


def _is_private(part: str) -> bool:
    """Whether a file or folder of this name is not part of a repository: hidden ones, and checkpoints at any depth."""
    return part.startswith("checkpoint-") or (part.startswith(".") and part != RESULTS_FOLDER)


def _files_to_publish(path: Path, secrets: Collection[str]) -> list[str]:
    """Relative paths of the files to upload. Raises `ValueError` if the repository is not complete."""
    adapter = path / "adapter_config.json"
    is_adapter = adapter.is_file()
    required = [adapter.name, "adapter_model.safetensors"] if is_adapter else ["config.json"]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        required += sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    elif not is_adapter:
        required.append("model.safetensors")
    if (path / "config.json").is_file():
        auto_map = json.loads((path / "config.json").read_text("utf-8")).get("auto_map", {})
        code = [f"{name.split('.')[0]}.py" for name in auto_map.values()]
        texts = [(path / name).read_text("utf-8") for name in code if (path / name).is_file()]
        required += code + [f"{name}.py" for text in texts for name in re.findall(r"^from \.(\w+) import", text, re.M)]
    required += ["modules.json", "config_sentence_transformers.json", "chat_template.jinja"]
    missing = [name for name in required if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} is not an exported repository: {', '.join(missing)} missing. Write one with "
            "btok_hf.export_model, or from a training checkpoint with: btok export CHECKPOINT FOLDER"
        )
    if is_adapter:
        base = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
        if not is_hub_id(base):
            raise ValueError(
                f"The base model of the adapters in {path} must be a Hub id, got {base!r}, which nobody else can "
                "load. Export the merged model with: btok export CHECKPOINT FOLDER; or, if the base is on the Hub, "
                "the adapters alone with --adapter-only --base-model HUB_ID"
            )
    everything = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and not any(_is_private(part) for part in file.relative_to(path).parts)
    )
    files = list(filter_repo_objects(everything, ignore_patterns=NOT_PUBLISHED))
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, "np"):  # checks the file size against the header
                    pass
            except SafetensorError as error:
                raise ValueError(f"{path / name} is damaged ({error}). Export the model again.") from error
        elif _scrub(content := (path / name).read_bytes().decode("utf-8", "replace"), secrets) != content:
            raise ValueError(
                f"{path / name} contains a Hub token, which the upload would publish. Remove it from the file, and "
                "revoke it at https://huggingface.co/settings/tokens if anybody else could read it."
            )
    return files


def _content(path: Path, name: str, repo_id: str) -> Path | bytes:
    """A file to upload; of the card, what it says with the id of its repository in its snippets."""
    if name != "README.md":
        return path / name
    card = (path / name).read_bytes().decode("utf-8", "surrogateescape")
    return for_hub(card, repo_id).encode("utf-8", "surrogateescape")


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
        raise RuntimeError(_scrub(f"Verifying {source} failed:\n{run.stderr[-4000:]}", _secrets(token)))
    answer = json.loads(run.stdout.splitlines()[-1])
    largest = 0.0
    problems = []
    print(f"{'loader':21}{'input':18}{'alone':>9}{'batched':>9}")
    for loader, differences in answer["results"].items():
        if isinstance(differences, str):
            problems.append(f"{loader} fails with {differences}")
            print(_scrub(f"{loader:21}{differences}", _secrets(token)))
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
        raise RuntimeError(_scrub(f"{source} cannot be loaded and run: {failures[0]}", _secrets(token)))
    then, now = content["versions"], answer["versions"]
    advice = (
        "Restore the exported files, or export the model again."
        if then == now
        else "First try again with the package versions of the export."
    )
    versions = (", ".join(f"{name} {value}" for name, value in x.items()) for x in (then, now))
    raise RuntimeError(
        _scrub(
            f"{source} does not reproduce its golden vectors (a component differs by more than {tolerance:.0e}): "
            f"{'; '.join(problems)}. Exported with {next(versions)}; verified with {next(versions)}. {advice}",
            _secrets(token),
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
        cause = _without_secrets(error, token)
    raise RuntimeError(
        f"{repo_id} is neither a local folder nor a readable Hub repository ({type(cause).__name__}: {cause}). Check "
        "the name, the revision and, for a private repository, your login (`hf auth login`, HF_TOKEN)."
    ) from cause


def _secrets(token: str | None) -> set[str]:
    """The tokens known to this process, to remove them from messages."""
    known = (token, get_token(), os.environ.get("HF_TOKEN"))
    return {value.strip() for value in known if isinstance(value, str) and value.strip()}


def _scrub(text: str, secrets: Collection[str]) -> str:
    """`text` without these tokens and without anything that looks like a token."""
    for secret in secrets:
        text = text.replace(secret, "<token>")
    return HUB_TOKEN.sub("<token>", text)


def _without_secrets(error: Exception, token: str | None) -> Exception:
    """`error` itself, or, if its traceback contains a token, a new exception with the message without the token."""
    secrets, text = _secrets(token), "".join(traceback.format_exception(error))
    if _scrub(text, secrets) == text:
        return error
    return RuntimeError(_scrub(f"{type(error).__name__}: {error}", secrets))
