"""Golden vectors against stock loaders, in fresh processes. Repositories on the Hub are verified in test_hub.py."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from support.repositories import add_noise, edit

import btok_hf
from btok_hf.verification import check_distinct


def test_bad_arguments_are_refused(exported, repo, tmp_path):
    with pytest.raises(ValueError, match="is a folder and has no revision"):
        btok_hf.verify(exported, revision="main")
    with pytest.raises(ValueError, match=r"has no golden\.json to compare with"):
        btok_hf.verify(repo)
    with pytest.raises(RuntimeError, match="neither a local folder nor"):
        btok_hf.verify(tmp_path / "nothing")


def test_golden_vectors_that_verify_nothing_are_refused():
    check_distinct("org/model", {"closest": 1e-2, "tolerance": 1e-4})
    for closest in (1e-4, float("nan")):
        with pytest.raises(ValueError, match="of org/model are too similar to verify anything"):
            check_distinct("org/model", {"closest": closest, "tolerance": 1e-4})


def test_verify_in_fresh_processes(exported, tmp_path, capsys):
    """The repository as exported, with noise on its weights, and with another K, prompt and library version."""
    noisy, other = (Path(shutil.copytree(exported, tmp_path / name)) for name in ("noisy", "other"))
    add_noise(noisy, 1e-3)
    edit(other, "config.json", lambda config: config["btok_token_ids"].pop())
    edit(other, "config_sentence_transformers.json", lambda config: config["prompts"].update(query="Find this."))
    edit(other, "golden.json", lambda content: content["versions"].update(torch="2.0"))
    command = [sys.executable, "-m", "btok_hf", "verify", str(exported)]
    with ThreadPoolExecutor(3) as pool:  # in parallel, because most of the time is imports
        same = pool.submit(subprocess.run, command, capture_output=True, text=True)
        noisy, other = [pool.submit(btok_hf.verify, folder) for folder in (noisy, other)]
    assert same.result().returncode == 0 and same.result().stdout.count("  ok\n") == 20, same.result().stderr
    assert float(same.result().stdout.split("verified: largest difference ")[1]) <= 1e-6

    with pytest.raises(RuntimeError, match=r"does not reproduce its golden vectors .*more than 1e-04") as caught:
        noisy.result()
    for loader in ("SentenceTransformer", "AutoModel"):
        for name in ("short text", "prompt query", "image and text", "video"):
            assert f"{loader}, '{name}': " in str(caught.value)
    assert f"Exported with torch {version('torch')}, " in str(caught.value) and "Restore the exported files" in str(
        caught.value
    )

    # The stock modules keep their own list of the tokens, and the prompts.
    with pytest.raises(RuntimeError, match=r"AutoModel fails with ValueError: Row 0 has 3 .* must have 3") as caught:
        other.result()
    assert "SentenceTransformer, 'prompt query'" in str(caught.value) and "'short text'" not in str(caught.value)
    assert "Exported with torch 2.0, " in str(caught.value) and "package versions of the export" in str(caught.value)
    table = capsys.readouterr().out
    assert table.count("DIFFERS") == 20 + 1 and table.count("  ok\n") == 9
