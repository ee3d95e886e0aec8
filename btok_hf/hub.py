"""Upload an exported repository to the Hub.

- A push is one commit (`HfApi.create_commit`), so that nobody loads a partial repository. `upload_folder` may create
  several commits.
- A failed push does not change the folder. Uploaded files stay on the Hub, and the same command resumes.
- Tokens must not leak: every message and chained exception is searched for them.

`btok_hf/export.py` writes repositories, `btok_hf/verification.py` checks them.
"""

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open

from btok_hf import golden
from btok_hf.hub_card.card import for_hub
from btok_hf.hub_names import is_hub_id, known_tokens, scrub, without_secrets

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
    files = _files_to_publish(path, known_tokens(token))
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
        cause = without_secrets(error, token)
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
        elif scrub(content := (path / name).read_bytes().decode("utf-8", "replace"), secrets) != content:
            raise ValueError(
                f"{path / name} contains a Hub token, which the upload would publish. Remove it from the file, and "
                "revoke it at https://huggingface.co/settings/tokens if anybody else could read it."
            )
    return files


def _content(path: Path, name: str, repo_id: str) -> Path | bytes:
    """A file to upload. The snippets of the card get the id of the repository."""
    if name != "README.md":
        return path / name
    card = (path / name).read_bytes().decode("utf-8", "surrogateescape")
    return for_hub(card, repo_id).encode("utf-8", "surrogateescape")
