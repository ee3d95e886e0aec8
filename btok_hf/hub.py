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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError, safe_open

from btok_hf import golden
from btok_hf.hub_card.card import OF_CARD, apache_license, for_hub
from btok_hf.hub_names import is_hub_id, known_tokens, scrub, without_secrets
from btok_hf.stock_pipeline import modules
from btok_hf.weights import WEIGHT_FILES

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
REPLACED = [*WEIGHT_FILES, golden.FILE_NAME]
# Those that are deleted if the weights are others: readers would take them for what this model does.
OF_WEIGHTS = [*OF_CARD, "metrics.json"]
# What stock loaders read beside the weights.
OF_PIPELINE = [
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "chat_template.jinja"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
]
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

    What loaders would read of an earlier push is deleted. If the weights are others, so are its scores, its pictures
    and its licence (if Apache-2.0).

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
        tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
        present = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        added = [CommitOperationAdd(name, _content(path, name, repo_id)) for name in files]
        stale = _stale(present, added)
        commit = api.create_commit(
            repo_id,
            [*added, *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale - set(files)))],
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


def _stale(present: Mapping[str, RepoFile], added: Sequence[CommitOperationAdd]) -> set[str]:
    """Files of an earlier push that would be wrong beside those of this one."""
    names = {operation.path_in_repo for operation in added}
    in_root = [name for name in present if "/" not in name]
    stale = set(filter_repo_objects(in_root, allow_patterns=REPLACED))
    if "adapter_config.json" in names:
        stale |= set(filter_repo_objects(in_root, allow_patterns=OF_MERGED))
    hashes = {name: entry.lfs.sha256 for name, entry in present.items() if entry.lfs}
    weights = [operation for operation in added if operation.path_in_repo.endswith(".safetensors")]
    if any(hashes.get(operation.path_in_repo) != operation.upload_info.sha256.hex() for operation in weights):
        stale |= set(filter_repo_objects(present, allow_patterns=OF_WEIGHTS))
        if "LICENSE" in present and present["LICENSE"].blob_id == git_hash(apache_license().encode()):
            stale.add("LICENSE")
    return stale


def _is_private(part: str) -> bool:
    """Whether a file or folder of this name is not part of a repository: hidden ones, and checkpoints at any depth."""
    return part.startswith("checkpoint-") or (part.startswith(".") and part != RESULTS_FOLDER)


def _files_to_publish(path: Path, secrets: Collection[str]) -> list[str]:
    """Relative paths of the files to upload. Raises an error if there is no folder or it is no whole repository."""
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}. Check the path; it starts at the current folder.")
    everything = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and not any(_is_private(part) for part in file.relative_to(path).parts)
    )
    files = list(filter_repo_objects(everything, ignore_patterns=NOT_PUBLISHED))
    linked = (folder.relative_to(path) for folder in path.rglob("*") if folder.is_symlink() and folder.is_dir())
    links = [folder.as_posix() for folder in linked if not any(map(_is_private, folder.parts))]
    if links := [name for name in links if list(filter_repo_objects([f"{name}/"], ignore_patterns=NOT_PUBLISHED))]:
        raise ValueError(
            f"{path} has links to folders, whose files would not be uploaded: {', '.join(sorted(links))}. Copy them "
            "there, or remove the links."
        )
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
    required += [f"{module['path']}/config.json" for module in modules() if module["path"]]
    if missing := [name for name in [*required, *OF_PIPELINE] if name not in files]:
        raise ValueError(
            f"{path} is not an exported repository: {', '.join(missing)} missing. Write one with "
            "btok_hf.export_model, or from a training checkpoint with: btok export CHECKPOINT FOLDER"
        )
    if is_adapter:
        config = json.loads(adapter.read_text("utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
        if not is_hub_id(base):
            raise ValueError(
                f"The base model of the adapters in {path} must be a Hub id, got {base!r}, which nobody else can "
                "load. Export the merged model with: btok export CHECKPOINT FOLDER; or, if the base is on the Hub, "
                "the adapters alone with --adapter-only --base-model HUB_ID"
            )
        if revision not in (None, "main"):
            raise ValueError(
                f"The adapters in {path} were trained on revision {revision!r} of {base}, and stock loaders would "
                "take its main branch. Export the merged model with: btok export CHECKPOINT FOLDER; or the adapters "
                "with --adapter-only and, as --base-model, the id of a repository whose main branch it is."
            )
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
