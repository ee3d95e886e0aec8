"""The command `btok`: help, exit statuses, errors in one line, and what each command does."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from support import forks
from support.mmeb_tree import looks
from support.publishing import as_pushed, head, served
from support.repositories import contents
from support.units import random_vectors, rows_of, write_units

from btok_hf import BTokSentenceTransformer, cli
from btok_hf.commands import repositories
from btok_hf.corpus.job import Options
from btok_hf.corpus.tables import Columns
from btok_hf.evaluation import mmeb, models
from btok_hf.model_info import identify
from btok_hf.serving.gate import Limits

COMMANDS = (
    "add-tokens",
    "convert",
    "train",
    "export",
    "verify",
    "push",
    "serve",
    "embed",
    "index",
    "search",
    "app",
    "mmeb",
)


@pytest.fixture
def btok(capsys):
    """A function that runs `btok` with these arguments and returns its exit status, output and errors."""

    def run(*arguments):
        try:
            status = cli.main(arguments)
        except SystemExit as ended:
            status = ended.code
            if isinstance(status, str):  # as Python ends a process
                print(status, file=sys.stderr)
                status = 1
        return status, *capsys.readouterr()

    return run


def fail(**options):
    raise ValueError("what is wrong")


def test_without_arguments_it_shows_its_usage(btok):
    status, output, errors = btok()
    assert (status, output) == (2, "") and errors.startswith("usage: btok ") and "COMMAND" in errors


def test_help_names_the_commands(btok):
    status, output, _ = btok("--help")
    assert status == 0 and all(re.search(rf"^    {name}\s+[a-z]", output, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(btok, name):
    status, output, _ = btok(name, "--help")
    assert status == 0 and output.startswith(f"usage: btok {name}")
    example = r"--config \S+\.yaml" if name == "train" else "example: "
    assert re.search(example, output) and output.count(f"btok {name} ") >= 2  # usage and example


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_unknown_flags_are_refused(btok, name):
    required = {
        "add-tokens": "a b",
        "convert": "a b",
        "export": "a b",
        "verify": "a",
        "push": "a b",
        "serve": "a",
        "embed": "a b --model c",
        "index": "a --db b",
        "search": "a --db b",
        "app": "--db a",
        "mmeb": "--model a --data b --output c",
    }
    status, output, errors = btok(name, *required[name].split(), "--nothing")
    assert (status, output) == (2, "") and "unrecognized arguments: --nothing" in errors


def test_an_error_is_one_line(btok, monkeypatch):
    monkeypatch.setattr(repositories, "run_verify", fail)
    assert btok("verify", "a") == (1, "", "error: what is wrong\n")


@pytest.mark.parametrize(
    "arguments", [("--debug", "verify", "a"), ("verify", "a", "--debug"), ("verify", "--debug", "a")]
)
def test_debug_shows_the_traceback(btok, monkeypatch, arguments):
    monkeypatch.setattr(repositories, "run_verify", fail)
    with pytest.raises(ValueError, match="what is wrong"):
        btok(*arguments)


def test_an_interrupt_ends_with_status_130(btok, monkeypatch):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(repositories, "run_verify", interrupt)
    assert btok("verify", "a") == (130, "", "interrupted\n")


def test_waiting_threads_sleep_unless_the_user_says_otherwise(btok, monkeypatch):
    seen = []
    monkeypatch.setattr(repositories, "run_verify", lambda **options: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    btok("verify", "a")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    btok("verify", "a")
    assert seen == ["ACTIVE", "PASSIVE"]


def test_options_of_serve(btok, monkeypatch):
    for flag, value in (("--allow-urls", "*"), ("--allow-files", "nothing")):  # before the model is loaded
        status, _, errors = btok("serve", "nowhere", flag, value)
        assert status == 1 and f"{flag} takes" in errors
    served = []
    monkeypatch.setattr("btok_hf.serving.server.serve", lambda *given, **load: served.append((given, load)))
    assert btok("serve", "a")[0] == 0
    loads = {"revision": None, "device": None, "model_kwargs": {"dtype": "auto"}, "processor_kwargs": {}}
    assert served.pop() == (("a", "127.0.0.1", 8000, None, Limits(), (), None), {**loads, "max_seq_length": None})
    flags = "--host h --port 1 --name n --revision v --device cpu --dtype float32 --max-pixels 9 --max-seq-length 8"
    flags += (
        " --max-rows 1 --queue-rows 2 --batch-rows 3 --max-text 4 --max-body 5 --queue-body 6 --max-image-pixels 7"
        " --queue-pixels 8 --timeout 8"
    )
    flags += " --allow-urls example.org,b:80 --allow-files files"
    assert btok("serve", "a", *flags.split())[0] == 0
    loads = {"revision": "v", "device": "cpu", "model_kwargs": {"dtype": "float32"}, "max_seq_length": 8}
    loads |= {"processor_kwargs": {"max_pixels": 9}}
    hosts = ["example.org", "b:80"]
    assert served.pop() == (("a", "h", 1, "n", Limits(1, 2, 3, 4, 5, 6, 7, 8, 8.0), hosts, Path("files")), loads)
    status, _, errors = btok("serve", "a", "--timeout", "0")
    assert status == 1 and "timeout must be above 0" in errors


def test_options_of_app(btok, monkeypatch):
    shown = []
    monkeypatch.setattr("btok_hf.corpus.app.serve", lambda *given, **load: shown.append((given, load)))
    assert btok("app", "--db", "a")[0] == 0
    assert shown.pop() == (("a", "127.0.0.1", 7860), {"model": None, "device": None, "public_host": None})
    flags = "--model m --device cpu --host h --port 1 --public-host p"
    assert btok("app", "--db", "a", *flags.split())[0] == 0
    assert shown.pop() == (("a", "h", 1), {"model": "m", "device": "cpu", "public_host": "p"})
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, errors = btok("app", "--db", "a")
    assert status == 1 and "btok app needs the package gradio: pip install 'btok-hf[app]'" in errors


@pytest.mark.parametrize(
    ("words", "module", "message"),
    [
        ("train --config a.yaml", "trl", r"btok train needs the package trl: pip install 'btok-hf\[train\]'"),
        ("mine a.jsonl b.parquet --model m", "datasets", r"btok mine needs the package datasets: pip install"),
        ("mmeb --model m --data d --output o", "accelerate", r"pip install 'btok-hf\[evaluation\]'"),
        ("mmeb --model m --data d --output o", "matplotlib", r"pip install 'btok-hf\[evaluation\]'"),
    ],
)
def test_packages_that_a_command_needs_are_named(words, module, message):
    """In a process of its own: here they are imported already."""
    code = f"import sys; sys.modules['{module}'] = None; from btok_hf.cli import main; main({words.split()!r})"
    run = forks.run("-c", code)
    assert run.returncode and re.search(message, run.stderr), run.stderr


def test_options_of_embed(btok, monkeypatch):
    runs, outcome = [], {}
    monkeypatch.setattr("btok_hf.corpus.workers.run", lambda *given, **more: runs.append((given, more)) or outcome)
    assert btok("embed", "a", "b", "--model", "c")[0] == 0
    assert runs.pop() == (("a", "b", Options("c")), {"retry_failed": False, "ray": None, "workers": None})
    flags = "--revision v --text t --image i --video w --id n --columns x,y --prompt p --dimensions 9 --dtype float32"
    flags += " --device cpu --max-pixels 8 --max-seq-length 7 --unit-rows 6 --thumbnail-pixels 5 --batch-size 4"
    flags += " --threads 3 --retry-failed --fail-on-error --ray local --workers 2"
    outcome["row"] = "reason"
    assert btok("embed", "a", "b", "--model", "c", *flags.split())[0] == 1
    columns = Columns("t", "i", "w", "n", ("x", "y"))
    options = Options("c", "v", "p", 9, "float32", 8, 7, columns, 6, 5, "cpu", 4, 3)
    assert runs.pop() == (("a", "b", options), {"retry_failed": True, "ray": "local", "workers": 2})
    assert btok("embed", "a", "b", "--model", "c")[0] == 0  # rows that failed end the run only if asked
    assert "unit_rows must be 1 or more" in btok("embed", "a", "b", "--model", "c", "--unit-rows", "0")[2]
    assert "name columns of a table" in btok("embed", "a", "b", "--model", "c", "--id", "x")[2]


def test_flags_may_be_written_with_underscores(btok, monkeypatch):
    given = []
    monkeypatch.setattr(repositories, "run_add_tokens", lambda **options: given.append(options))
    for flags in (
        ["--num_tokens", "2", "--query_prompt=a_b", "--max-pixels", "9"],
        ["--num-tokens", "2", "--query-prompt=a_b", "--max_pixels", "9"],
    ):
        assert btok("add-tokens", "my_base", "my_start", *flags)[0] == 0
    assert given[0] == given[1]
    assert (given[0]["base"], given[0]["num_tokens"], given[0]["query_prompt"]) == ("my_base", 2, "a_b")


def test_it_is_installed_and_a_module_of_its_own(btok, tmp_path):
    """A process ends with the status and without a traceback. Help imports no torch."""
    (script,) = entry_points(group="console_scripts", name="btok")
    assert script.load() is cli.main
    python = [sys.executable, "-X", "importtime", "-m", "btok_hf"]
    run = subprocess.run([*python, "push", tmp_path / "nothing", "org/x"], capture_output=True, text=True)
    errors = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 1 and run.stdout == ""
    assert len(errors) == 1 and re.match(r"error: There is no folder .*nothing", errors[0])
    run = subprocess.run([*python, "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage: btok ")
    imported = {line.split("|")[2].strip() for line in run.stderr.splitlines()}
    assert "btok_hf.cli" in imported and not imported & {"torch", "transformers", "numpy", "huggingface_hub"}


# ---------------------------------------------------------------- what the commands do


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
    assert config["btok_base_revision"] == head(hub, "org/base")  # kept by the export
    hub.run("-m", "btok_hf", "push", model, "org/small", home=home)
    assert served(hub, "org/small") == as_pushed(model, "org/small") and "golden.json" in contents(model)


def test_mmeb(mmeb_root, tmp_path, repo):
    arguments = ["--model", repo, "--data", str(mmeb_root), "--output", str(tmp_path / "out")]
    assert cli.main(["mmeb", *arguments, "--datasets", "OK-VQA, MSVD", "--max-pixels", str(28 * 28 * 4)]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"] == Path(repo).name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "image",
        "video",
        "embeddings",
        "run.json",
        "report.md",
    }
    assert cli.main(["mmeb", *arguments, "--datasets", "CIRR", "--max-pixels", str(28 * 28 * 4)]) == 0
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert all(re.search(rf"^\| {name} +\|", report, re.M) for name in ("OK-VQA", "CIRR", "MSVD"))
    arguments[3] = str(tmp_path)
    with pytest.raises(SystemExit, match=r"no folder .* with the benchmark \(video-tasks\)"):
        cli.main(["mmeb", *arguments, "--datasets", "K700"])
    (tmp_path / "video-tasks").mkdir(), (tmp_path / "image-tasks").mkdir()
    assert cli.main(["mmeb", *arguments, "--datasets", "K700", "--max-pixels", str(28 * 28 * 4)]) == 1
    with pytest.raises(SystemExit, match=r"error: .* holds results of another run: fingerprint"):
        cli.main(["mmeb", *arguments, "--datasets", "OK-VQA"])
    with pytest.raises(SystemExit, match="error: Unknown 'audio'"):
        cli.main(["mmeb", *arguments, "--modality", "audio"])


def test_options_of_mmeb(tmp_path, repo, bases, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "image-tasks").mkdir(parents=True)
    loaded, evaluated = [], []
    for name in ("BTokSentenceTransformer", "SentenceTransformer"):

        def load(*arguments, name=name, **options):
            loaded.append((name, *arguments, options))
            return looks

        monkeypatch.setattr(models, name, load)
    monkeypatch.setattr(models, "_image_size", lambda model: {"longest_edge": 3136})
    monkeypatch.setattr(mmeb, "evaluate", lambda *given, **options: evaluated.append((given, options)) or ({}, {}))
    base, fixed = bases["qwen2_vl"], ["--data", "in", "--output", "out"]
    assert cli.main(["mmeb", "--model", repo, *fixed]) == 0
    given = (
        "--revision v1 --dtype bfloat16 --max-pixels 3136 --modality image,visdoc --datasets MSVD,OK-VQA --limit 7 "
    )
    given += "--batch-tokens 99 --prompt Find. --cache kept --eval-task overall --trust-remote-code"
    assert cli.main(["mmeb", "--model", base, *fixed, *given.split()]) == 0
    loads = {"revision": None, "device": str(mmeb.processes().device)}
    loads |= {"model_kwargs": {"dtype": "auto"}, "processor_kwargs": {}, "trust_remote_code": False}
    chosen = {"revision": "v1", "model_kwargs": {"dtype": "bfloat16"}, "processor_kwargs": {"max_pixels": 3136}}
    chosen["trust_remote_code"] = True
    assert loaded == [("BTokSentenceTransformer", repo, loads), ("SentenceTransformer", base, loads | chosen)]
    options = dict.fromkeys(("datasets", "modalities", "limit", "prompt", "cache_dir", "eval_task"))
    options |= {"batch_tokens": 16384, "name": Path(repo).name}
    chosen = {"datasets": ["MSVD", "OK-VQA"], "modalities": ["image", "visdoc"], "limit": 7, "batch_tokens": 99}
    chosen |= {"prompt": "Find.", "cache_dir": "kept", "eval_task": "overall", "name": Path(base).name}
    assert evaluated == [((looks, "in", "out"), options), ((looks, "in", "out"), options | chosen)]
    fixed = ["--data", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    monkeypatch.chdir(repo)
    assert cli.main(["mmeb", "--model", ".", *fixed]) == 0 and evaluated[-1][1]["name"] == Path(repo).name


# ---------------------------------------------------------------- a corpus


@pytest.fixture(scope="module")
def corpus(repo, tmp_path_factory):
    """Units and a database of three texts. Tests must not change them."""
    folder, texts = tmp_path_factory.mktemp("corpus"), ["a dog", "a cat", "<b>a\x1b[31m tree"]
    vectors = BTokSentenceTransformer(repo, device="cpu").encode_document([{"text": text} for text in texts])
    settings = {"model": repo, "revision": identify(repo)[0], "dimensions": vectors.shape[1]}
    out = write_units(folder / "out", rows_of([*vectors, None], text=[*texts, None]), **settings)
    assert cli.main(["index", out, "--db", str(folder / "db")]) == 0
    return folder


def test_index_says_what_it_did_and_how_well_it_finds(btok, corpus, tmp_path):
    out, db = str(corpus / "out"), str(tmp_path / "db")
    status, output, _ = btok("index", out, "--db", db)
    assert status == 0 and f"{db}: 3 rows (3 added, 0 replaced, 0 deleted, 1 left out because" in output
    assert "search is exact" in output and "recall" not in output
    vectors = random_vectors(500)
    other = write_units(tmp_path / "other", rows_of(vectors))
    status, output, _ = btok("index", other, "--db", str(tmp_path / "binary"), "--precision", "binary")
    recall = float(re.search(r"recall@10 (0\.\d+) against exact search in float32 \(100 rows", output)[1])
    assert status == 0 and 0.1 < recall < 0.9
    assert btok("index", other, "--db", db)[0] == 1  # another model
    for library in ("faiss", "usearch"):
        file = tmp_path / library
        status, output, _ = btok("index", other, f"--{library}", str(file), "--precision", "int8")
        assert output == f"{file}: 500 vectors; their ids are in {file}.ids.parquet\n" and file.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("index a", "one of the arguments --db --faiss --usearch is required"),
        ("index a --db b --precision int8", "LanceDB cannot search int8"),
        ("index a --faiss b --rebuild", "--rebuild needs --db"),
        ("search --db b", "the query is empty"),
        ("search  --db b", "the query is empty"),
        ("search x --db b -k 0", "-k is the number of hits"),
        ("search x --db b -k 1000000000000", "-k is the number of hits and must be 1 to 1,000,000,000, got"),
        ("search x --db b --sheet out.gif", "--sheet out.gif must end in .png"),
        ("search x --db b --sheet out.png -k 301", "--sheet shows at most 300 hits, got -k 301: use --html"),
        ("search --db b --image no.png", "--image no.png is not a file"),
    ],
)
def test_arguments_of_a_corpus_that_cannot_be_right(btok, words, message):
    status, output, errors = btok(*words.split(" "))
    assert (status, output) == (2, "") and message in errors


def test_search_as_lines_json_page_and_sheet(btok, corpus, tmp_path, monkeypatch):
    db, page, sheet = str(corpus / "db"), tmp_path / "out.html", tmp_path / "out.jpg"
    status, output, _ = btok("search", "dog", "--db", db, "-k", "2", "--html", str(page), "--sheet", str(sheet))
    assert status == 0 and len(output.splitlines()) == 2 and output.isascii() and "\x1b" not in output
    assert "<b>" not in page.read_text("utf-8") and sheet.read_bytes()[:3] == b"\xff\xd8\xff"
    status, output, _ = btok("search", "dog", "--db", db, "--json", "--where", "text LIKE 'a %'", "--hybrid")
    hits = json.loads(output)
    assert len(hits) == 2 and hits[0]["text"] == "a dog"
    sheet = str(tmp_path / "x.png")
    status, output, errors = btok("search", "dog", "--db", db, "--where", "id = 'x'", "--sheet", sheet)
    assert (status, output) == (0, "nothing was found\n") and "x.png is not written" in errors
    with monkeypatch.context() as patch:
        patch.setattr("btok_hf.corpus.search._load", None)  # a wrong condition is found before the model is loaded
        status, output, errors = btok("search", "dog", "--db", db, "--where", "nothing = 1")
    assert (status, output) == (1, "") and "error: The filter 'nothing = 1' cannot be used: " in errors
    assert errors.splitlines()[-1].startswith("error: ")
    status, _, errors = btok("search", "dog", "--db", str(tmp_path))
    assert status == 1 and "holds no database of btok index" in errors
