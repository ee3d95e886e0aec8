"""Publishing, with the real client against a Hub on this machine: push, load, verify, and what happens when it breaks.

Client processes have their own environment, because huggingface_hub reads it when it is imported.
"""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hub_server import OWNER_TOKEN, STRANGER_TOKEN, HubServer, blob_oid
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import btok_hf
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_adapters, export_model, golden
from btok_hf.files import check_writable

TRAIN = Path(__file__).resolve().parents[1] / "training" / "train.py"
TEXTS = ["a red car", "Находка"]
# Loads a repository with every loader and prints {what: vectors of TEXTS}. Arguments: Hub id, further revisions.
LOAD = f"""
import json, sys, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
repo, *revisions = sys.argv[1:]
vectors = {{}}
for revision in (None, *revisions):
    stock = SentenceTransformer(repo, revision=revision, device="cpu")
    assert type(stock[0].model).__module__.startswith("transformers.")
    vectors["stock", revision] = stock.encode({TEXTS!r})
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, revision=revision)
    inputs = processor.apply_chat_template(
        [[{{"role": "user", "content": text}}] for text in {TEXTS!r}],
        tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={{"padding": True}},
    )
    with torch.no_grad():
        vectors["auto", revision] = model(**inputs).pooler_output
print("\\n" + json.dumps([[loader, revision, array.tolist()] for (loader, revision), array in vectors.items()]))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def endless_resets(exported, tmp_path_factory):
    """A push whose uploads are reset each time: the client gives up after 23 seconds, while the other tests run."""
    with HubServer() as server, ThreadPoolExecutor(1) as pool:
        server.faults["reset_upload"] = 10**6
        home, before = tmp_path_factory.mktemp("home"), contents(exported)
        command = ("-m", "btok_hf", "push", exported, "org/broken")
        future = pool.submit(server.run, *command, home=home, check=False)
        yield server, home, before, future


@pytest.fixture(scope="module")
def exported(repo, tmp_path_factory):
    """An exported repository. Nothing may change it."""
    folder = export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path_factory.mktemp("exported") / "model")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of it, to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


@pytest.fixture(scope="module")
def with_adapters(exported):
    """The exported model with adapters and token rows that move its vectors."""
    model = BTokSentenceTransformer(exported, device="cpu")
    config = LoraConfig(
        r=2,
        init_lora_weights=False,
        task_type="FEATURE_EXTRACTION",
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        trainable_token_indices={"embed_tokens": list(model.config.btok_token_ids)},
    )
    before = model.encode(TEXTS)
    model[0].model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    assert np.abs(model.encode(TEXTS) - before).max() > 0.01
    return model


def contents(folder):
    """Every file of a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def served(hub, repo_id, branch="main"):
    """Every file of a repository on the server but .gitattributes."""
    repository = hub.repositories[repo_id]
    files = {path: content for path, (content, _) in repository.commits[repository.branches[branch]].items()}
    del files[".gitattributes"]
    return files


def head(hub, repo_id, branch="main"):
    return hub.repositories[repo_id].branches[branch]


def edit(folder, name, change):
    """Change a JSON file."""
    content = json.loads((folder / name).read_text("utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), "utf-8")


def add_noise(folder, size):
    """Change the weights, or adapters, by this part of each."""
    (path,) = folder.glob("*model.safetensors")
    noisy = {name: tensor * (1 + size * torch.randn_like(tensor)) for name, tensor in load_file(path).items()}
    save_file(noisy, path, metadata={"format": "pt"})


def retry_command(stderr):
    """Arguments of the interpreter in the command that an error names."""
    command, *arguments = shlex.split(stderr.rsplit("Retry with: ", 1)[1].splitlines()[0])
    assert command == "btok"
    arguments = ["-m", "btok_hf", *arguments]
    return arguments


def differences(folder):
    """The check that `verify` makes in a fresh process, in this one."""
    results = golden.check(str(folder), str(folder / "golden.json"), None, "cpu")
    assert set(results) == {"SentenceTransformer", "AutoModel"}
    assert not any(isinstance(value, str) for value in results.values()), results
    return {(loader, name): max(pair) for loader, rows in results.items() for name, pair in rows.items()}


# ---------------------------------------------------------------- the server


def test_the_server_answers_the_client(hub, tmp_path):
    """What the tests below do not ask for. Object ids are git's: `git hash-object` gave this one."""
    assert blob_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    code = (
        "from pathlib import Path; from huggingface_hub import HfApi, snapshot_download\n"
        "api = HfApi(); assert api.whoami()['name'] == 'owner'\n"
        "repo = api.create_repo('org/files').repo_id\n"
        "for name, content in ('a/b.txt', b'hello\\n'), ('large.bin', bytes(2000)):\n"
        "    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo)\n"
        "api.create_tag(repo, tag='v1'); api.delete_file('a/b.txt', repo)\n"
        "refs = api.list_repo_refs(repo)\n"
        "tag, branch = refs.tags[0].target_commit, refs.branches[0].target_commit\n"
        "assert tag != branch == api.list_repo_commits(repo)[0].commit_id\n"
        "assert {x.path for x in api.list_repo_tree(repo, revision='v1')} == {'.gitattributes', 'a', 'large.bin'}\n"
        "folder = Path(snapshot_download(repo, revision='v1'))\n"
        "assert [len((folder / name).read_bytes()) for name in ('a/b.txt', 'large.bin')] == [6, 2000]\n"
    )
    hub.run("-c", code, home=tmp_path)
    assert hub.repositories["org/files"].commits[head(hub, "org/files")].keys() == {".gitattributes", "large.bin"}


# ---------------------------------------------------------------- push and load


def test_a_pushed_repository_loads_everywhere_pinned_and_offline(hub, exported, copied, tmp_path):
    for name in ("checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors", "runs/events", "training_args.bin"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(b"not for others")
    (copied / "1_WordWeights" / "__pycache__").mkdir()
    (copied / "1_WordWeights" / "__pycache__" / "x.pyc").write_bytes(b"")
    (copied / "model-00001-of-00002.safetensors").write_bytes((copied / "model.safetensors").read_bytes())
    command = ("-m", "btok_hf", "push", copied, "org/btok-tiny")
    url = hub.run(*command, home=tmp_path / "home").stdout.split()[-1]
    first = head(hub, "org/btok-tiny")
    assert url == f"{hub.endpoint}/org/btok-tiny/commit/{first}"
    expected = contents(exported)
    assert served(hub, "org/btok-tiny") == expected | {
        "model-00001-of-00002.safetensors": expected["model.safetensors"]
    }
    assert not hub.repositories["org/btok-tiny"].private
    weights = hub.repositories["org/btok-tiny"].listing(first, "", recursive=True)
    by_path = {entry["path"]: entry for entry in weights}
    assert by_path["model.safetensors"]["lfs"]["oid"] == hashlib.sha256(expected["model.safetensors"]).hexdigest()
    assert by_path["config.json"]["oid"] == blob_oid(expected["config.json"])

    # Nothing new: no upload, no commit, the same answer.
    before = len(hub.requests)
    assert hub.run(*command, home=tmp_path / "home").stdout.split()[-1] == url
    assert not any(method == "PUT" or "/commit/" in path for method, path, _ in hub.requests[before:])

    # Other weights on main; what the new folder lacks of the weights is gone, the first commit can still be loaded.
    (copied / "model-00001-of-00002.safetensors").unlink()
    add_noise(copied, 0.1)
    hub.run(*command, home=tmp_path / "home")
    assert "model-00001-of-00002.safetensors" not in served(hub, "org/btok-tiny")
    vectors = {
        None: BTokSentenceTransformer(copied, device="cpu").encode(TEXTS),
        first: BTokSentenceTransformer(exported, device="cpu").encode(TEXTS),
    }
    assert np.abs(vectors[None] - vectors[first]).max() > 1e-3
    load = ("-c", LOAD, "org/btok-tiny", first)
    before = len(hub.requests)
    online = json.loads(hub.run(*load, home=tmp_path / "empty").stdout.splitlines()[-1])
    assert any(path.endswith("modeling_btok.py") for _, path, _ in hub.requests[before:])
    before = len(hub.requests)
    offline = json.loads(hub.run(*load, home=tmp_path / "empty", HF_HUB_OFFLINE="1").stdout.splitlines()[-1])
    assert len(hub.requests) == before
    assert len(online) == 4
    for loader, revision, array in online + offline:
        assert np.abs(np.array(array) - vectors[revision]).max() <= 1e-6, (loader, revision)


def test_branches_pull_requests_and_private_repositories(hub, exported, tmp_path):
    home = tmp_path / "home"
    command = ("-m", "btok_hf", "push", exported, "org/secret")
    hub.run(*command, "--private", "--revision", "feat/x", home=home)
    repository = hub.repositories["org/secret"]
    assert repository.private and served(hub, "org/secret") == {}
    assert served(hub, "org/secret", "feat/x") == contents(exported)
    url = hub.run(*command, "--create_pr", home=home).stdout.split()[-1]
    assert url == f"{hub.endpoint}/org/secret/discussions/1" and served(hub, "org/secret") == {}
    assert served(hub, "org/secret", "refs/pr/1") == contents(exported)

    # With a token as an argument and none in the environment; the fresh process of verify must get it too.
    code = (
        "import btok_hf, sys; token = sys.stdin.readline().strip()\n"
        "print(btok_hf.verify('org/secret', revision='feat/x', token=token))\n"
        "try: btok_hf.push(sys.argv[1], 'org/secret', private=False, token=token)\n"
        "except RuntimeError as error: print(error)\n"
    )
    run = hub.run("-c", code, exported, home=home, token=None, input=OWNER_TOKEN)
    assert "SentenceTransformer  video" in run.stdout and "DIFFERS" not in run.stdout
    assert "org/secret exists and is private, not public" in run.stdout
    for token in (None, STRANGER_TOKEN):
        arguments = ("-m", "btok_hf", "verify", "org/secret", "--revision", "feat/x")
        run = hub.run(*arguments, home=tmp_path / f"empty {token is None}", token=token, check=False)
        assert run.returncode == 1 and "neither a folder here nor a repository that can be read" in run.stderr
        run = hub.run(*command, home=tmp_path / "other", token=token, check=False)
        assert run.returncode == 1 and "hf auth login" in run.stderr


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize("fault", ["refuse_upload", "fail_commit", "lose_commit"])
def test_a_failed_push_says_how_to_go_on(hub, exported, tmp_path, fault):
    repo_id, home = f"org/{fault.replace('_', '-')}", tmp_path / "home"
    before, hub.faults = contents(exported), {fault: 1}
    command = ("-m", "btok_hf", "push", exported, repo_id, "--revision", "a b")
    run = hub.run(*command, home=home, check=False)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"The upload to {repo_id} failed" in run.stderr and "whole and unchanged" in run.stderr
    assert contents(exported) == before
    if fault != "lose_commit":
        assert served(hub, repo_id, "a b") == {}
    uploads = sum(method == "PUT" for method, _, _ in hub.requests)
    assert retry_command(run.stderr) == [str(part) for part in command]
    url = hub.run(*retry_command(run.stderr), home=home).stdout.split()[-1]
    assert served(hub, repo_id, "a b") == before and url.endswith(head(hub, repo_id, "a b"))
    assert len(hub.repositories[repo_id].commits) == 2
    if fault != "refuse_upload":  # what was uploaded is not uploaded again
        assert sum(method == "PUT" for method, _, _ in hub.requests) == uploads


def test_one_reset_is_survived(hub, exported, tmp_path):
    hub.faults = {"reset_upload": 1}
    hub.run("-m", "btok_hf", "push", exported, "org/reset", home=tmp_path)
    assert [status for method, path, status in hub.requests if method == "PUT" and "org/reset" in path] == [None, 200]
    assert served(hub, "org/reset") == contents(exported)


def test_no_token_in_errors(hub, exported, tmp_path):
    """A token with a line end is refused by the HTTP library in a message that quotes it: `hub.run` looks for it."""
    code = (
        "import sys, btok_hf, traceback; token = sys.stdin.readline()\n"
        "for call in (lambda: btok_hf.push(sys.argv[1], 'org/x', token=token),\n"
        "             lambda: btok_hf.verify('org/x', token=token)):\n"
        "    try: call()\n"
        "    except Exception:\n"
        "        traceback.print_exc()\n"
    )
    run = hub.run("-c", code, exported, home=tmp_path, token=None, input=OWNER_TOKEN + "\n")
    assert run.stderr.count("Illegal header value b'Bearer <token>") >= 2 and run.stderr.count("RuntimeError: ") >= 2


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json missing"),
        (lambda f: (f / "modules.json").unlink(), "modules.json missing"),
        (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors missing.*btok_hf.export"),
        (lambda f: (f / "modeling_btok.py").unlink(), "modeling_btok.py missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]),
            "model.safetensors is damaged",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "model-2.safetensors missing",
        ),
        (lambda f: (f / "README.md").write_text(f"--hub_token {STRANGER_TOKEN}"), "README.md holds a Hub token"),
    ],
)
def test_only_whole_repositories_without_tokens_are_pushed(copied, spoil, message):
    spoil(copied)
    with pytest.raises(ValueError, match=message) as caught:
        btok_hf.push(copied, "org/x")
    assert STRANGER_TOKEN not in str(caught.value)


def test_bad_arguments_are_refused_before_anything_is_sent(exported, tmp_path):
    with pytest.raises(ValueError, match="org/a/b"):
        btok_hf.push(exported, "org/a/b")
    with pytest.raises(ValueError, match="leave out revision or create_pr"):
        btok_hf.push(exported, "org/a", revision="x", create_pr=True)
    with pytest.raises(ValueError, match="is no exported repository"):
        btok_hf.push(tmp_path / "nothing", "org/a")
    with pytest.raises(ValueError, match="is a folder and has no revision"):
        btok_hf.verify(exported, revision="main")
    with pytest.raises(RuntimeError, match="neither a folder here nor"):
        btok_hf.verify(tmp_path / "nothing")


# ---------------------------------------------------------------- golden vectors


def test_verify_in_fresh_processes(exported, tmp_path, capsys):
    """The repository as exported; with noise on its weights; with another K, another prompt and other libraries."""
    noisy, other = (Path(shutil.copytree(exported, tmp_path / name)) for name in ("noisy", "other"))
    add_noise(noisy, 1e-3)
    edit(other, "config.json", lambda config: config["btok_token_ids"].pop())
    edit(other, "config_sentence_transformers.json", lambda config: config["prompts"].update(query="Find this."))
    edit(other, "golden.json", lambda content: content["versions"].update(torch="2.0"))
    command = [sys.executable, "-m", "btok_hf", "verify", str(exported)]
    with ThreadPoolExecutor(3) as pool:  # at the same time: most of it is imports
        same = pool.submit(subprocess.run, command, capture_output=True, text=True)
        noisy, other = [pool.submit(btok_hf.verify, folder) for folder in (noisy, other)]
    assert same.result().returncode == 0 and same.result().stdout.count("  ok\n") == 14, same.result().stderr
    assert float(same.result().stdout.split("verified: largest difference ")[1]) <= 1e-6

    with pytest.raises(RuntimeError, match=r"does not give its golden vectors .*differs by more than 1e-04") as caught:
        noisy.result()
    for loader in ("SentenceTransformer", "AutoModel"):
        for name in ("short text", "prompt query", "image and text", "video"):
            assert f"{loader}, '{name}': " in str(caught.value)
    assert f"Exported with torch {version('torch')}, " in str(caught.value) and "Restore the files" in str(
        caught.value
    )

    # Stock modules have a list of the tokens of their own, and the prompts.
    with pytest.raises(RuntimeError, match=r"AutoModel fails with ValueError: Row 0 holds 3 .* must hold 3") as caught:
        other.result()
    assert "SentenceTransformer, 'prompt query'" in str(caught.value) and "'short text'" not in str(caught.value)
    assert "Exported with torch 2.0, " in str(caught.value) and "libraries of then" in str(caught.value)
    table = capsys.readouterr().out
    assert table.count("DIFFERS") == 14 + 1 and table.count("  ok\n") == 6


def test_a_changed_template_gives_other_vectors(copied):
    path = copied / "chat_template.jinja"
    template = path.read_text("utf-8")
    path.write_text(template.replace("join(' ')", "join('  ')"), "utf-8")
    # Only where two parts are joined: media and text, instruction and text.
    assert {name for (_, name), value in differences(copied).items() if value > golden.TOLERANCE} == {
        "image and text",
        "prompt query",
    }
    path.write_text(template.replace("'< |'", "'<|'"), "utf-8")
    assert golden.check(str(copied), str(copied / "golden.json"), None, "cpu")["AutoModel"].startswith("ValueError")
    path.write_text(template.replace("<|btok_3|>", ""), "utf-8")
    results = golden.check(str(copied), str(copied / "golden.json"), None, "cpu")
    assert "Row 0 holds 3 Bottleneck Token(s) but must hold 4" in results["AutoModel"]
    assert min(min(pair) for pair in results["SentenceTransformer"].values()) > golden.TOLERANCE


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_golden_vectors_hold_for_every_backbone(repos, tmp_path, backbone):
    folder = export_model(BTokSentenceTransformer(repos[backbone], device="cpu"), tmp_path / "model")
    assert max(differences(folder).values()) <= 1e-6


def test_golden_vectors_of_special_models(bases, repo, with_adapters, tmp_path):
    """Last-token pooling; bf16 weights, cast after loading too; adapters; defaults that change what `encode` gives."""
    last = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "base", 0)
    options = {"prompts": {"document": "Doc."}, "default_prompt_name": "document", "truncate_dim": 16}
    models = {
        "last": BTokSentenceTransformer(last, device="cpu"),
        "bf16": BTokSentenceTransformer(repo, device="cpu", model_kwargs={"dtype": "bfloat16"}),
        "cast": BTokSentenceTransformer(repo, device="cpu").to(torch.bfloat16),
        "adapters": with_adapters,
        "defaults": BTokSentenceTransformer(repo, device="cpu", **options),
    }
    for name, model in models.items():
        folder = export_model(model, tmp_path / name)
        found = differences(folder)
        assert max(found.values()) <= 1e-6, name
        assert ("AutoModel", "prompt document") in found or name != "defaults"
        assert json.loads((folder / "golden.json").read_text("utf-8"))["closest"] > 0.01
    assert load_file(tmp_path / "cast" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert models["cast"][0].model.dtype == torch.bfloat16  # the export leaves the model as it was


def test_golden_vectors_come_from_memory_and_stay_small(exported, monkeypatch, tmp_path, repo):
    """A repository that was written with other weights than those in memory does not pass."""
    assert (exported / "golden.json").stat().st_size < 15_000  # at 64 dimensions; 100 kB at 1,536
    model = BTokSentenceTransformer(repo, device="cpu")
    save = type(model[0].merged()).save_pretrained

    def save_others(self, folder, **kwargs):
        save(self, folder, **kwargs)
        add_noise(Path(folder), 0.01)

    monkeypatch.setattr(type(model[0].merged()), "save_pretrained", save_others)
    found = differences(export_model(model, tmp_path / "model"))
    assert min(found.values()) > golden.TOLERANCE


def test_an_earlier_export_in_other_files_leaves_no_weights_behind(repo, tmp_path):
    """Loaders would prefer them, and a push would send both."""
    model = BTokSentenceTransformer(repo, device="cpu")
    expected = model.encode(["one"])
    changed = BTokSentenceTransformer(repo, device="cpu")
    with torch.no_grad():
        changed[0].model.language_model.norm.weight.mul_(torch.rand(64) + 0.5)
    for first, then in (("50GB", "100KB"), ("100KB", "50GB")):
        export_model(changed, tmp_path / first, max_shard_size=first)
        export_model(model, tmp_path / first, max_shard_size=then)
        assert (tmp_path / first / "model.safetensors").exists() == (then == "50GB")
        again = BTokSentenceTransformer(str(tmp_path / first), device="cpu").encode(["one"])
        np.testing.assert_allclose(again, expected, atol=2e-6)


def test_golden_vectors_that_prove_nothing_are_refused(exported, copied, repo, tmp_path):
    (copied / "golden.json").unlink()
    with pytest.raises(ValueError, match=r"has no golden.json.*export_model writes it"):
        btok_hf.verify(copied)
    model = BTokSentenceTransformer(repo, device="cpu")
    model.save_pretrained(str(exported.parent / "saved"))
    assert not (exported.parent / "saved" / "golden.json").exists()
    export_model(model, tmp_path / "again")
    model.save_pretrained(str(tmp_path / "again"))  # other weights may be saved over an export
    assert not (tmp_path / "again" / "golden.json").exists()
    with torch.no_grad():
        model[0].model.language_model.norm.weight.zero_()
    collapsed = export_model(model, tmp_path / "collapsed")
    assert max(differences(collapsed).values()) == 0.0
    with pytest.raises(ValueError, match="prove nothing"):
        btok_hf.verify(collapsed)


# ---------------------------------------------------------------- adapters


def test_adapters_with_a_base_on_the_hub(hub, exported, with_adapters, tmp_path):
    expected = with_adapters.encode(TEXTS)
    with_adapters.save_pretrained(str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match=r"refer to their base by Hub id, got .*Push the repository"):
        export_adapters(with_adapters, tmp_path / "wrong")
    for base in (str(exported), "no-namespace", "a/b/c"):
        with pytest.raises(ValueError, match="by Hub id"):
            export_adapters(with_adapters, tmp_path / "wrong", base)
    with pytest.raises(ValueError, match="holds a whole model"):
        export_adapters(with_adapters, exported, "org/start")
    with pytest.raises(ValueError, match="has no adapters"):
        export_adapters(BTokSentenceTransformer(exported, device="cpu"), tmp_path / "wrong", "org/start")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match="name a local folder as their base"):
        btok_hf.push(tmp_path / "checkpoint", "org/lora")

    home, lora = tmp_path / "home", tmp_path / "lora"
    hub.run("-m", "btok_hf", "push", exported, "org/start", home=home)
    arguments = (
        "-m",
        "btok_hf",
        "export",
        tmp_path / "checkpoint",
        lora,
        "--adapter_only",
        "--base_model",
        "org/start",
    )
    hub.run(*arguments, home=home)
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/start"
    assert not (lora / "config.json").exists() and not list(lora.glob("model*")) and not list(lora.glob("golden*"))
    hub.run("-m", "btok_hf", "push", lora, "org/lora", home=home)
    add_noise(lora, 0.3)
    hub.run("-m", "btok_hf", "push", lora, "org/lora", "--revision", "v2", home=home)
    code = (
        "import json, sys\n"
        "from sentence_transformers import SentenceTransformer\n"
        "from btok_hf import BTokSentenceTransformer\n"
        "models = [SentenceTransformer('org/lora', device='cpu'), BTokSentenceTransformer('org/lora', device='cpu'),\n"
        "    BTokSentenceTransformer('org/lora', device='cpu', revision='v2')]\n"
        "print('\\n' + json.dumps([model.encode(json.loads(sys.argv[1])).tolist() for model in models]))\n"
    )
    run = hub.run("-c", code, json.dumps(TEXTS), home=tmp_path / "empty")
    *vectors, other = np.array(json.loads(run.stdout.splitlines()[-1]))
    assert all(np.abs(loaded - expected).max() <= 2e-6 for loaded in vectors)
    assert np.abs(other - expected).max() > 1e-3


# ---------------------------------------------------------------- training


def test_training_pushes_what_everybody_loads(hub, bases, tmp_path):
    """From a base without Bottleneck Tokens to the Hub, with a push that fails in the middle of training."""
    pairs = [{"query": f"find {word}", "positive": f"{word} thing"} for word in ("red", "old", "tall", "wet")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    out = tmp_path / "out"
    command = [
        *(TRAIN, "--model_name_or_path", bases["qwen2_vl"], "--train_files", tmp_path / "pairs.jsonl"),
        *("--eval_file", tmp_path / "pairs.jsonl", "--output_dir", out, "--use_cpu", "--use_peft", "--max_steps", "2"),
        *(
            "--save_steps",
            "1",
            "--logging_steps",
            "1",
            "--per_device_train_batch_size",
            "4",
            "--report_to",
            "none",
            "--disable_tqdm",
            "true",
        ),
        *("--push_to_hub", "--hub_model_id", "org/trained", "--hub_strategy", "every_save"),
    ]
    refused = hub.run(*command, home=tmp_path / "home", token=None, check=False)
    assert refused.returncode and "push_to_hub needs a Hub login" in refused.stderr and not (out / "start").exists()

    hub.faults["fail_commit"] = 1
    run = hub.run(*command, home=tmp_path / "home")
    assert hub.faults.pop("fail_commit") <= 0  # it was met
    assert "The upload to org/trained failed" in run.stderr and "Retry with: btok push" in run.stderr
    url = run.stdout.split("Pushed to ")[-1].split()[0]
    assert url == f"{hub.endpoint}/org/trained/commit/{head(hub, 'org/trained')}"
    pushed = served(hub, "org/trained")
    assert pushed.items() <= contents(out).items()
    assert not any(name.startswith(("checkpoint-", "start/")) or name.endswith((".bin", ".pt")) for name in pushed)
    assert b"--hub_model_id org/trained" in pushed["README.md"] and b"assets/loss.png" in pushed["README.md"]

    expected = BTokSentenceTransformer(out, device="cpu").encode(TEXTS)
    online = json.loads(hub.run("-c", LOAD, "org/trained", home=tmp_path / "empty").stdout.splitlines()[-1])
    assert all(np.abs(np.array(array) - expected).max() <= 1e-6 for *_, array in online)
    hub.run("-m", "btok_hf", "verify", "org/trained", home=tmp_path / "empty")


# ---------------------------------------------------------------- command lines and writing


def test_command_lines_from_a_base_on_the_hub_to_a_repository(hub, bases, tmp_path):
    home, start, model = tmp_path / "home", tmp_path / "start", tmp_path / "model"
    code = (
        "import sys, huggingface_hub as hub; hub.create_repo('org/base')\n"
        "hub.upload_folder(repo_id='org/base', folder_path=sys.argv[1])\n"
    )
    hub.run("-c", code, bases["qwen2_vl"], home=home)
    flags = ("--num_tokens", 2, "--noise_std", 1, "--query_prompt", "Find it.", "--max_pixels", 28 * 28 * 8)
    hub.run("-m", "btok_hf", "add-tokens", "org/base", start, *flags, home=home)
    config = json.loads((start / "config.json").read_text())
    assert config["btok_base_model"] == "org/base" and config["btok_base_revision"] == head(hub, "org/base")
    assert config["btok_num_tokens"] == 2
    hub.run("-m", "btok_hf", "export", start, model, home=home)
    config = json.loads((model / "config.json").read_text())
    assert config["btok_base_revision"] == head(hub, "org/base")  # the export knows it still
    hub.run("-m", "btok_hf", "push", model, "org/small", home=home)
    assert served(hub, "org/small") == contents(model) and "golden.json" in contents(model)


def test_command_lines_explain_themselves(hub, tmp_path):
    commands = ("add-tokens", "export", "verify", "push")
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda name: hub.run("-m", "btok_hf", name, "--help", home=tmp_path), commands)
        for name, run in zip(commands, runs):
            assert f"example: btok {name} " in " ".join(run.stdout.split())


def test_the_base_of_a_local_folder_is_what_its_config_says(repo, tmp_path):
    def named(folder):
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        return config["btok_base_model"], config["btok_base_revision"]

    assert named(repo) == (None, None)
    copy = Path(shutil.copytree(repo, tmp_path / "copy"))
    edit(copy, "config.json", lambda config: config.update(btok_base_model="org/base", btok_base_revision="abc"))
    assert named(add_bottleneck_tokens(copy, tmp_path / "again")) == ("org/base", "abc")


def test_further_files_replace_the_default_card(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    files = {"README.md": "---\nlicense: mit\n---\né", "LICENSE": "text", "assets/a/x.bin": b"\x00\xff"}
    folder = export_model(model, tmp_path / "model", files=files)
    assert (folder / "README.md").read_text("utf-8") == files["README.md"]
    assert (folder / "assets" / "a" / "x.bin").read_bytes() == b"\x00\xff"


def test_folders_that_cannot_be_written_to_are_refused(repo, tmp_path):
    (tmp_path / "file").write_text("")
    model = BTokSentenceTransformer(repo, device="cpu")
    for folder in (tmp_path / "file", tmp_path / "file" / "model", "/proc/model"):
        with pytest.raises(OSError, match=r"The output folder .* cannot be written to.*Name another folder"):
            export_model(model, folder)
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["chat_template.jinja", "README.md"])
def test_a_full_disk_is_named(repo, tmp_path, name):
    """/dev/full takes nothing: what is written through the link fails as on a full disk."""
    model = BTokSentenceTransformer(repo, device="cpu")
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"The disk is full: .* is incomplete.*need [\d,]+ bytes.*Make room"):
        export_model(model, tmp_path)


def test_weights_on_a_full_disk(repo, tmp_path):
    """A real one of 256 kB, mounted in a namespace of its own. safetensors has another error than Python."""
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    export = shlex.join([sys.executable, "-m", "btok_hf", "export", repo, str(tmp_path / "model")])
    run = subprocess.run([*namespace, f"{mount} && {export}"], capture_output=True, text=True)
    assert run.returncode == 1
    assert re.search(r"error: .*The disk is full: .*/model is incomplete. The weights need 681,472 bytes", run.stderr)


def test_a_push_that_is_always_reset_ends_with_the_folder_whole(endless_resets, exported):
    """Last, because it takes the client 23 seconds to give up."""
    server, home, before, future = endless_resets
    run = future.result()
    assert run.returncode == 1 and "The upload to org/broken failed" in run.stderr
    assert contents(exported) == before and served(server, "org/broken") == {}
    assert len([status for method, _, status in server.requests if method == "PUT" and status is None]) == 6
    server.faults = {}
    server.run(*retry_command(run.stderr), home=home)
    assert served(server, "org/broken") == before
