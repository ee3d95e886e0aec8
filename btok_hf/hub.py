"""The way to the Hub and back: `push` uploads an exported repository, `verify` checks what others will load.

- A push is one commit (`HfApi.create_commit`; `upload_folder` may make several), so nobody loads half a repository.
- A push that fails leaves the folder as it was. What was uploaded stays on the Hub, and the same command goes on.
- Tokens are for headers only: every message and chained exception that leaves here is searched for them.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open

from btok_hf import golden

# Next to an export in a training folder, and of no use to others or not meant for them.
NOT_PUBLISHED = (
    "checkpoint-*",
    "start/*",  # what train.py made of a base model
    "runs/*",
    "*.bin",  # training_args.bin; weights are safetensors
    "*.pt",  # optimizer and scheduler
    "*.pth",  # random states
    "trainer_state.json",
    "*__pycache__/*",
    ".git/*",
    ".cache/*",
)
# Of an earlier push, where this one has none: loaders would take them for the model.
REPLACED = ("model*.safetensors", "model.safetensors.index.json", "adapter_*", golden.FILE_NAME)
MESSAGE = "Upload Bottleneck-Token model with btok-hf"
HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")


def push(
    path,
    repo_id,
    *,
    private=None,
    revision=None,
    create_pr=False,
    commit_message=MESSAGE,
    token=None,
):
    """Upload an exported repository to the Hub in one commit. Checkpoints and optimizer states beside it stay here.

    Args:
        path (`str` or `Path`): Folder written by `export_model`, `export_adapters` or `add_bottleneck_tokens`.
        repo_id (`str`): Where to, e.g. `org/btok-2b`. Created if there is none.
        private (`bool`, *optional*): Who may read a new repository. Default: what the organisation sets. An existing
            one must agree.
        revision (`str`, *optional*): Branch to commit to; made from the main branch if there is none.
        create_pr (`bool`): Open a pull request instead of committing.
        commit_message (`str`): First line of the commit's message.
        token (`str`, *optional*): Default: `HF_TOKEN`, or what `hf auth login` stored.

    Returns:
        `str`: URL of the commit, or of the pull request.

    Raises:
        ValueError: A folder that is no whole exported repository or that holds a token, or a bad `repo_id`.
        RuntimeError: The upload failed. The folder is whole, and the message holds the command to go on with.
    """
    path = Path(path)
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request goes to the main branch: leave out revision or create_pr.")
    files = _files_to_publish(path, _secrets(token))
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and api.model_info(repo_id).private != private:
            kinds = ("public", "private")
            raise ValueError(f"{repo_id} exists and is {kinds[not private]}, not {kinds[private]}. Change it there.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = set(filter_repo_objects(api.list_repo_files(repo_id, revision=revision), allow_patterns=REPLACED))
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path / name) for name in files),
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
    # Raised out here: as the context of an exception raised above, the original with its token would come along.
    raise RuntimeError(
        f"The upload to {repo_id} failed ({type(cause).__name__}: {cause}). The repository in {path} is whole and "
        "unchanged; what was uploaded so far is kept. If access was refused, log in with `hf auth login` or set "
        f"HF_TOKEN. Retry with: {shlex.join(command)}"
    ) from cause


def _files_to_publish(path, secrets):
    """Relative paths of the repository's files, after checking that it is a whole one."""
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
        required += [f"{name.split('.')[0]}.py" for name in auto_map.values()]
    required += ["modules.json", "config_sentence_transformers.json", "chat_template.jinja"]
    missing = [name for name in required if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} is no exported repository: {', '.join(missing)} missing. Write one with btok_hf.export_model, or "
            "from a training checkpoint with: btok export CHECKPOINT FOLDER"
        )
    if is_adapter:
        base = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
        if Path(base).exists() or base.count("/") != 1:
            raise ValueError(
                f"The adapters in {path} name a local folder as their base ({base}), which nobody else can load. "
                "Export them with: btok export CHECKPOINT FOLDER --adapter-only --base-model HUB_ID"
            )
    everything = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    files = list(filter_repo_objects(everything, ignore_patterns=NOT_PUBLISHED))
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, "np"):  # compares the file's size with its header
                    pass
            except SafetensorError as error:
                raise ValueError(f"{path / name} is damaged ({error}). Export the model again.") from error
        elif _scrub(content := (path / name).read_bytes().decode("utf-8", "replace"), secrets) != content:
            raise ValueError(
                f"{path / name} holds a Hub token, which the upload would publish. Remove it from the file, and "
                "revoke it at https://huggingface.co/settings/tokens if anybody else could read it."
            )
    return files


def verify(path_or_repo, *, revision=None, token=None, device="cpu"):
    """Check in a fresh process that stock loaders give the golden vectors that a repository was exported with.

    `SentenceTransformer` without remote code and `AutoModel` with it embed every golden input in fp32, one by one and
    in a batch. A table of the differences is printed.

    Args:
        path_or_repo (`str` or `Path`): Folder or Hub id of a repository written by `export_model`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Default: `HF_TOKEN`, or what `hf auth login` stored.
        device (`str`): Where to embed; the golden vectors come from the CPU.

    Returns:
        `float`: The largest difference of an embedding's component.

    Raises:
        ValueError: No golden vectors, such that prove nothing, or a revision of a folder.
        RuntimeError: The repository cannot be read, or gives other vectors.
    """
    source, path = str(path_or_repo), Path(path_or_repo, golden.FILE_NAME)
    if Path(source).exists():
        if revision is not None:
            raise ValueError(f"{source} is a folder and has no revision {revision!r}. Leave it out, or name a Hub id.")
    else:
        path = _download_golden(source, revision, token)
    if path is None or not path.is_file():
        raise ValueError(
            f"{source} has no {golden.FILE_NAME} to compare with. btok_hf.export_model writes it; repositories of "
            "adapters, untrained ones and training checkpoints have none. Export the model, and verify that."
        )
    content = golden.read_golden(path)
    tolerance, closest = content["tolerance"], content["closest"]
    if not closest > golden.DISTINCT * tolerance:
        raise ValueError(
            f"The golden vectors of {source} prove nothing: two different inputs are {closest:.1e} apart, at a "
            f"tolerance of {tolerance:.0e}. The exported model was untrained or collapsed. Export a trained one."
        )
    run = subprocess.run(
        [sys.executable, "-P", golden.__file__],
        input=json.dumps({"source": source, "golden": str(path), "revision": revision, "device": device}),
        env={**os.environ, "HF_TOKEN": token} if token else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if run.returncode:
        raise RuntimeError(_scrub(f"Verifying {source} broke off:\n{run.stderr[-4000:]}", _secrets(token)))
    answer = json.loads(run.stdout.splitlines()[-1])
    largest, problems = 0.0, []
    print(f"{'loader':21}{'input':18}{'alone':>9}{'batched':>9}")
    for loader, differences in answer["results"].items():
        if isinstance(differences, str):
            problems.append(f"{loader} fails with {differences}")
            print(_scrub(f"{loader:21}{differences}", _secrets(token)))
            continue
        for name, pair in differences.items():
            fits = all(difference <= tolerance for difference in pair)  # NaN does not
            largest = max(largest, *pair)
            print(f"{loader:21}{name:18}{pair[0]:9.1e}{pair[1]:9.1e}  {'ok' if fits else 'DIFFERS'}")
            if not fits:
                problems.append(f"{loader}, {name!r}: {max(pair):.1e}")
    if not problems:
        return largest
    then, now = content["versions"], answer["versions"]
    advice = (
        "Restore the files that it was exported with, or export it again."
        if then == now
        else "Try the libraries of then before you blame the repository."
    )
    versions = (", ".join(f"{name} {value}" for name, value in x.items()) for x in (then, now))
    raise RuntimeError(
        _scrub(
            f"{source} does not give its golden vectors (a component differs by more than {tolerance:.0e}): "
            f"{'; '.join(problems)}. Exported with {next(versions)}; verified with {next(versions)}. {advice}",
            _secrets(token),
        )
    )


def _download_golden(repo_id, revision, token):
    """Path of the repository's golden vectors in the cache; `None` if it has none."""
    try:
        return Path(hf_hub_download(repo_id, golden.FILE_NAME, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:
        cause = _without_secrets(error, token)
    raise RuntimeError(
        f"{repo_id} is neither a folder here nor a repository that can be read from the Hub ({type(cause).__name__}: "
        f"{cause}). Check the name, the revision and, for a private one, your login (`hf auth login`, HF_TOKEN)."
    ) from cause


def _secrets(token):
    """The tokens in reach, so that they can be kept out of texts."""
    known = (token, get_token(), os.environ.get("HF_TOKEN"))
    return {value.strip() for value in known if isinstance(value, str) and value.strip()}


def _scrub(text, secrets):
    """`text` without these tokens, or anything that looks like one."""
    for secret in secrets:
        text = text.replace(secret, "<token>")
    return HUB_TOKEN.sub("<token>", text)


def _without_secrets(error, token):
    """`error`, to chain; where its traceback holds a token, a stand-in that says the same without it."""
    secrets, text = _secrets(token), "".join(traceback.format_exception(error))
    if _scrub(text, secrets) == text:
        return error
    return RuntimeError(_scrub(f"{type(error).__name__}: {error}", secrets))
