"""The command `btok`."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.mmeb_tree import looks
from support.publishing import head, served
from support.repositories import contents

from btok_hf import cli
from btok_hf.evaluation import mmeb


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


def test_mmeb(mmeb_root, tmp_path, repo, capsys):
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
    assert cli.main(["mmeb", *arguments, "--datasets", "K700", "--max-pixels", str(28 * 28 * 4)]) == 1
    with pytest.raises(SystemExit, match=r"error: .* holds results of another run: fingerprint"):
        cli.main(["mmeb", *arguments, "--datasets", "OK-VQA"])
    with pytest.raises(SystemExit, match="error: Unknown 'audio'"):
        cli.main(["mmeb", *arguments, "--modality", "audio"])
    with pytest.raises(SystemExit):
        cli.main(["mmeb", "--help"])
    assert "example: btok mmeb --model" in capsys.readouterr().out


def test_options_of_mmeb(tmp_path, repo, bases, monkeypatch):
    loaded, evaluated = [], []
    for name in ("BTokSentenceTransformer", "SentenceTransformer"):

        def load(*arguments, name=name, **options):
            loaded.append((name, *arguments, options))
            return looks

        monkeypatch.setattr(mmeb, name, load)
    monkeypatch.setattr(mmeb, "evaluate", lambda *given, **options: evaluated.append((given, options)) or ({}, {}))
    base, fixed = bases["qwen2_vl"], ["--data", "in", "--output", "out"]
    assert cli.main(["mmeb", "--model", repo, *fixed]) == 0
    given = (
        "--revision v1 --dtype bfloat16 --max-pixels 3136 --modality image,visdoc --datasets MSVD,OK-VQA --limit 7 "
    )
    given += "--batch-tokens 99 --prompt Find. --cache kept --eval-task overall"
    assert cli.main(["mmeb", "--model", base, *fixed, *given.split()]) == 0
    loads = {"revision": None, "device": str(mmeb.processes().device)}
    loads |= {"model_kwargs": {"dtype": "auto"}, "processor_kwargs": {}}
    chosen = {"revision": "v1", "model_kwargs": {"dtype": "bfloat16"}, "processor_kwargs": {"max_pixels": 3136}}
    assert loaded == [("BTokSentenceTransformer", repo, loads), ("SentenceTransformer", base, loads | chosen)]
    options = dict.fromkeys(("datasets", "modalities", "limit", "prompt", "cache_dir", "eval_task"))
    options |= {"batch_tokens": 16384, "name": Path(repo).name}
    chosen = {"datasets": ["MSVD", "OK-VQA"], "modalities": ["image", "visdoc"], "limit": 7, "batch_tokens": 99}
    chosen |= {"prompt": "Find.", "cache_dir": "kept", "eval_task": "overall", "name": Path(base).name}
    assert evaluated == [((looks, "in", "out"), options), ((looks, "in", "out"), options | chosen)]
