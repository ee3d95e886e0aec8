"""Push and load with the real client against a Hub on this machine, and what happens when it breaks.

Client processes have their own environment, because huggingface_hub reads it when it is imported.
"""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.hub_server import OWNER_TOKEN, STRANGER_TOKEN, HubServer, blob_oid
from support.publishing import LOAD, as_pushed, head, retry_command, served
from support.repositories import TEXTS, add_noise, contents, edit

import btok_hf
from btok_hf import BTokSentenceTransformer
from btok_hf.files import write_files
from btok_hf.hub_card.card import apache_license


@pytest.fixture(scope="module", autouse=True)
def endless_resets(hub, exported, tmp_path_factory):
    """A push whose uploads are always reset. The client gives up after 23 seconds, while the other tests run."""
    with HubServer() as server, ThreadPoolExecutor(1) as pool:
        server.faults["reset_upload"] = 10**6
        home, before = tmp_path_factory.mktemp("home"), contents(exported)
        command = ("-m", "btok_hf", "push", exported, "org/broken")
        future = pool.submit(server.run, *command, home=home, check=False)
        yield server, home, before, future


def test_the_server_answers_the_client(hub, tmp_path):
    """Requests that the tests below do not make. The expected object id is from `git hash-object`."""
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


def test_a_pushed_repository_loads_everywhere_pinned_and_offline(hub, exported, copied, tmp_path):
    private = ("checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors", "runs/events", "training_args.bin")
    for name in (*private, ".env", "run/checkpoint-5/config.json", ".weights-x/model.safetensors"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(b"not for others")
    (copied / "1_WordWeights" / "__pycache__").mkdir()
    (copied / "1_WordWeights" / "__pycache__" / "x.pyc").write_bytes(b"")
    (copied / "model-00001-of-00002.safetensors").write_bytes((copied / "model.safetensors").read_bytes())
    command = ("-m", "btok_hf", "push", copied, "org/btok-tiny")
    url = hub.run(*command, home=tmp_path / "home").stdout.split()[-1]
    first = head(hub, "org/btok-tiny")
    assert url == f"{hub.endpoint}/org/btok-tiny/commit/{first}"
    expected = as_pushed(exported, "org/btok-tiny")
    assert served(hub, "org/btok-tiny") == expected | {
        "model-00001-of-00002.safetensors": expected["model.safetensors"]
    }
    assert not hub.repositories["org/btok-tiny"].private
    weights = hub.repositories["org/btok-tiny"].listing(first, "", recursive=True)
    by_path = {entry["path"]: entry for entry in weights}
    assert by_path["model.safetensors"]["lfs"]["oid"] == hashlib.sha256(expected["model.safetensors"]).hexdigest()
    assert by_path["config.json"]["oid"] == blob_oid(expected["config.json"])

    # Pushing the same files again uploads and commits nothing, and prints the same address.
    before = len(hub.requests)
    assert hub.run(*command, home=tmp_path / "home").stdout.split()[-1] == url
    assert not any(method == "PUT" or "/commit/" in path for method, path, _ in hub.requests[before:])

    # A push of other weights removes the weight files that its folder lacks, and none of a folder that it does not
    # know. The first commit still loads.
    upload = (
        "HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='models/old.safetensors', repo_id='org/btok-tiny')"
    )
    hub.run("-c", f"from huggingface_hub import HfApi; {upload}", home=tmp_path / "home")
    (copied / "model-00001-of-00002.safetensors").unlink()
    add_noise(copied, 0.1)
    hub.run(*command, home=tmp_path / "home")
    assert "model-00001-of-00002.safetensors" not in served(hub, "org/btok-tiny")
    assert "models/old.safetensors" in served(hub, "org/btok-tiny")
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


def test_adapters_keep_the_revision_of_their_base(hub, exported, copied, tmp_path):
    """The main branch may hold other weights by the time they are loaded."""
    home = tmp_path / "home"
    hub.run("-m", "btok_hf", "push", exported, "org/start", "--revision", "v1", home=home)
    add_noise(copied, 0.1)
    hub.run("-m", "btok_hf", "push", copied, "org/start", home=home)
    code = (
        "import json, sys; from peft import LoraConfig\n"
        "from btok_hf import BTokSentenceTransformer, export_adapters\n"
        "from btok_hf.adapters import add_adapters\n"
        "model = BTokSentenceTransformer('org/start', revision='v1', device='cpu')\n"
        "add_adapters(model[0].model, model[0].lm_head, LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False))\n"
        "model.save_pretrained(sys.argv[1])\n"
        "again = BTokSentenceTransformer(sys.argv[1], device='cpu')\n"
        "again.save_pretrained(sys.argv[1] + '-again')\n"
        "third = BTokSentenceTransformer(sys.argv[1] + '-again', device='cpu')\n"
        "first, *others = (m.encode(['a b']) for m in (model, again, third))\n"
        "assert all(abs(first - other).max() < 1e-6 for other in others)\n"
        "try: export_adapters(again, sys.argv[1] + '-lora')\n"
        "except ValueError as error: assert \"trained on revision 'v1' of org/start\" in str(error), error\n"
        "else: raise SystemExit('stock loaders would take the main branch')\n"
        "export_adapters(again, sys.argv[1] + '-lora', 'org/start-v1')\n"
    )
    hub.run("-c", code, tmp_path / "adapters", home=home)
    names = ("base_model_name_or_path", "revision")
    for folder, expected in (("adapters-again", ("org/start", "v1")), ("adapters-lora", ("org/start-v1", None))):
        saved = json.loads((tmp_path / folder / "adapter_config.json").read_text("utf-8"))
        assert tuple(saved[name] for name in names) == expected


def test_branches_pull_requests_and_private_repositories(hub, exported, tmp_path):
    home = tmp_path / "home"
    command = ("-m", "btok_hf", "push", exported, "org/secret")
    hub.run(*command, "--private", "--revision", "feat/x", home=home)
    repository = hub.repositories["org/secret"]
    assert repository.private and served(hub, "org/secret") == {}
    assert served(hub, "org/secret", "feat/x") == as_pushed(exported, "org/secret")
    url = hub.run(*command, "--create_pr", home=home).stdout.split()[-1]
    assert url == f"{hub.endpoint}/org/secret/discussions/1" and served(hub, "org/secret") == {}
    assert served(hub, "org/secret", "refs/pr/1") == as_pushed(exported, "org/secret")

    # The token is an argument and not in the environment. The fresh process of `verify` must get it too.
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
        assert run.returncode == 1 and "neither a local folder nor a readable Hub repository" in run.stderr
        run = hub.run(*command, home=tmp_path / "other", token=token, check=False)
        assert run.returncode == 1 and "hf auth login" in run.stderr


@pytest.mark.parametrize("fault", ["refuse_upload", "fail_commit", "lose_commit"])
def test_a_failed_push_says_how_to_go_on(hub, exported, tmp_path, fault):
    repo_id, home = f"org/{fault.replace('_', '-')}", tmp_path / "home"
    before, hub.faults = contents(exported), {fault: 1}
    command = ("-m", "btok_hf", "push", exported, repo_id, "--revision", "a b")
    run = hub.run(*command, home=home, check=False)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"The upload to {repo_id} failed" in run.stderr and "complete and unchanged" in run.stderr
    assert contents(exported) == before
    if fault != "lose_commit":
        assert served(hub, repo_id, "a b") == {}
    uploads = sum(method == "PUT" for method, _, _ in hub.requests)
    assert retry_command(run.stderr) == [str(part) for part in command]
    url = hub.run(*retry_command(run.stderr), home=home).stdout.split()[-1]
    assert served(hub, repo_id, "a b") == as_pushed(exported, repo_id) and url.endswith(head(hub, repo_id, "a b"))
    assert len(hub.repositories[repo_id].commits) == 2
    if fault != "refuse_upload":  # what was uploaded is not uploaded again
        assert sum(method == "PUT" for method, _, _ in hub.requests) == uploads


def test_one_reset_is_survived(hub, exported, tmp_path):
    hub.faults = {"reset_upload": 1}
    hub.run("-m", "btok_hf", "push", exported, "org/reset", home=tmp_path)
    assert [status for method, path, status in hub.requests if method == "PUT" and "org/reset" in path] == [None, 200]
    assert served(hub, "org/reset") == as_pushed(exported, "org/reset")


def test_no_token_in_errors(hub, exported, tmp_path):
    """The HTTP library quotes a token with a line break in its error. `hub.run` checks that it is not printed."""
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
        (lambda f: (f / "inputs_btok.py").unlink(), "inputs_btok.py missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]),
            "model.safetensors is damaged",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "model-2.safetensors missing",
        ),
        (lambda f: (f / "README.md").write_text(f"--hub_token {STRANGER_TOKEN}"), "README.md contains a Hub token"),
    ],
)
def test_only_whole_repositories_without_tokens_are_pushed(copied, spoil, message):
    spoil(copied)
    with pytest.raises(ValueError, match=message) as caught:
        btok_hf.push(copied, "org/x")
    assert STRANGER_TOKEN not in str(caught.value)


def test_a_model_pushes_itself_whole(hub, exported, with_adapters, tmp_path):
    """By the call of Sentence-Transformers. Its own would upload adapters whose base nobody else has."""
    with_adapters.save(str(tmp_path / "adapters"))
    code = (
        "import sys, tempfile; from btok_hf import BTokSentenceTransformer\n"
        "model = BTokSentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(model.push_to_hub('org/by-model', private=True))\n"
    )
    home = tmp_path / "home"
    run = hub.run("-c", code, tmp_path / "adapters", home=home, TMPDIR=str(tmp_path))
    assert run.stdout.split()[-1] == f"{hub.endpoint}/org/by-model/commit/{head(hub, 'org/by-model')}"
    assert hub.repositories["org/by-model"].private and not list(tmp_path.glob("btok-push-*"))
    files = served(hub, "org/by-model")
    assert {"model.safetensors", "golden.json", "modules.json"} <= files.keys() and "adapter_config.json" not in files
    for name, content in files.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    vectors = BTokSentenceTransformer(tmp_path / "got", device="cpu").encode(TEXTS)
    assert np.abs(vectors - with_adapters.encode(TEXTS)).max() <= 2e-6


def test_bad_arguments_are_refused_before_anything_is_sent(exported, tmp_path):
    model = BTokSentenceTransformer(exported, device="cpu")
    for push in (lambda name: btok_hf.push(exported, name), model.push_to_hub):
        with pytest.raises(ValueError, match="org/a/b"):
            push("org/a/b")
    with pytest.raises(ValueError, match="Leave one out"):
        btok_hf.push(exported, "org/a", revision="x", create_pr=True)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nothing"):
        btok_hf.push(tmp_path / "nothing", "org/a")
    with pytest.raises(ValueError, match="is not an exported repository"):
        btok_hf.push(tmp_path, "org/a")


def test_a_push_that_is_always_reset_ends_with_the_folder_whole(endless_resets, exported):
    """The last test, because the client needs 23 seconds to give up."""
    server, home, before, future = endless_resets
    run = future.result()
    assert run.returncode == 1 and "The upload to org/broken failed" in run.stderr
    assert contents(exported) == before and served(server, "org/broken") == {}
    assert len([status for method, _, status in server.requests if method == "PUT" and status is None]) == 6
    server.faults = {}
    server.run(*retry_command(run.stderr), home=home)
    assert served(server, "org/broken") == as_pushed(exported, "org/broken")


@pytest.mark.parametrize(
    "name", ["sentence_bert_config.json", "tokenizer.json", "processor_config.json", "1_WordWeights/config.json"]
)
def test_a_folder_that_stock_loaders_would_read_otherwise_is_not_pushed(copied, name):
    """Without the first, they average all tokens and say nothing."""
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"is not an exported repository: {name} missing"):
        btok_hf.push(copied, "org/model")


def test_folders_that_are_links_are_not_left_out_silently(copied, tmp_path):
    for name in ("start", "checkpoint-5", ".cache", "pictures"):  # only the last would be uploaded as a folder
        (copied / name).symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"not be uploaded: pictures\. Copy them"):
        btok_hf.push(copied, "org/model")
    (copied / "pictures").unlink()
    (copied / "1_WordWeights").rename(tmp_path / "elsewhere")
    (copied / "1_WordWeights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="links to folders, whose files would not be uploaded: 1_WordWeights"):
        btok_hf.push(copied, "org/model")


def test_adapters_of_a_revision_are_not_pushed(with_adapters, tmp_path):
    """Stock loaders would add them to the main branch."""
    with_adapters.save_pretrained(str(tmp_path))
    edit(tmp_path, "adapter_config.json", lambda config: config.update(base_model_name_or_path="org/x", revision="v1"))
    with pytest.raises(ValueError, match="trained on revision 'v1' of org/x, and stock loaders would take its main"):
        btok_hf.push(tmp_path, "org/lora")


def test_scores_and_licence_go_with_the_weights_that_they_belong_to(hub, exported, copied, tmp_path):
    """They stay if the card alone is another. What others put into the repository stays in any case."""
    brought = {".eval_results/x.yaml": "score: 61", "LICENSE": apache_license(), "assets/loss.png": "1"}
    mine = {"assets/mine.png": "2", "docs/metrics.json": "3"}
    write_files(copied, {**brought, **mine, "metrics.json": "{}"})
    brought["metrics.json"] = "{}"
    hub.run("-m", "btok_hf", "push", copied, "org/scored", home=tmp_path)
    hub.run("-m", "btok_hf", "push", exported, "org/scored", home=tmp_path)
    assert {*brought, *mine} <= served(hub, "org/scored").keys()
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    add_noise(other, 0.1)
    hub.run("-m", "btok_hf", "push", other, "org/scored", home=tmp_path)
    assert {*brought, *mine} & served(hub, "org/scored").keys() == mine.keys()
    write_files(copied, {"LICENSE": "MIT"})
    hub.run("-m", "btok_hf", "push", copied, "org/scored", home=tmp_path)
    hub.run("-m", "btok_hf", "push", other, "org/scored", home=tmp_path)
    assert served(hub, "org/scored")["LICENSE"] == b"MIT"


def test_a_copy_of_a_repository_names_itself(hub, exported, tmp_path):
    """Snippets of a card that is kept load the repository that it is in."""
    code = (
        "import sys; from btok_hf import BTokSentenceTransformer, export_model, push\n"
        "push(sys.argv[1], 'org/first')\n"
        "model = BTokSentenceTransformer('org/first', device='cpu')\n"
        "push(export_model(model, sys.argv[2]), 'org/second'); model.push_to_hub('org/third')\n"
    )
    hub.run("-c", code, exported, tmp_path / "copy", home=tmp_path / "home")
    assert (tmp_path / "copy" / "README.md").read_text() == (exported / "README.md").read_text()
    for name in ("second", "third"):
        card = served(hub, f"org/{name}")["README.md"].decode()
        assert f'SentenceTransformer("org/{name}")' in card and "org/first" not in card


def test_a_subfolder_of_a_repository(hub, exported, with_adapters, tmp_path):
    """Adapters are those of the subfolder. Others cannot name their base in it."""
    expected = with_adapters.encode(TEXTS)
    with_adapters.save_pretrained(str(tmp_path / "lora"))
    code = (
        "import json, sys; from huggingface_hub import HfApi; from peft import LoraConfig\n"
        "from btok_hf import BTokSentenceTransformer\n"
        "base, lora, texts = *sys.argv[1:3], json.loads(sys.argv[3])\n"
        "api = HfApi(); api.create_repo('org/parts')\n"
        "for folder, name in (base, 'whole'), (lora, 'lora'):\n"
        "    api.upload_folder(repo_id='org/parts', folder_path=folder, path_in_repo=name)\n"
        "model = BTokSentenceTransformer('org/parts', subfolder='lora', device='cpu')\n"
        "vectors = model.encode(texts).tolist()\n"
        "model = BTokSentenceTransformer('org/parts', subfolder='whole', device='cpu')\n"
        "print('\\n' + json.dumps(vectors)); model.add_adapter(LoraConfig(r=2))\n"
    )
    run = hub.run("-c", code, exported, tmp_path / "lora", json.dumps(TEXTS), home=tmp_path / "home", check=False)
    assert np.abs(np.array(json.loads(run.stdout.splitlines()[-1])) - expected).max() <= 2e-6
    assert "is from the subfolder whole of a repository, which checkpoints of adapters cannot name" in run.stderr
