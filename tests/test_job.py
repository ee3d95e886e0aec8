"""What a run is to do: changes of the input are noticed, other settings refused, the model identified."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.corpus import embed, read, same, write_files
from support.repositories import edit

from btok_hf.corpus import rows
from btok_hf.corpus.embed import Embedder
from btok_hf.corpus.job import Options, make_plan
from btok_hf.corpus.tables import Columns
from btok_hf.corpus.units import Corpus
from btok_hf.corpus.workers import run
from btok_hf.model_info import identify


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "in", texts=12, pictures=2)


def plan(folder, out, repo, **options):
    return make_plan(str(folder), str(out), Options(str(repo), device="cpu", unit_rows=3, **options))


def test_only_what_is_new_or_changed_is_embedded(folder, tmp_path, repo):
    out = tmp_path / "out"
    embed(folder, out, repo, unit_rows=3)
    first = read(out)
    assert plan(folder, out, repo).missing == []
    (folder / "texts" / "3.txt").write_text("other")
    (folder / "texts" / "11.txt").unlink()
    (folder / "new.txt").write_text("new")
    changed = plan(folder, out, repo)
    assert 0 < changed.removed < len(changed.units) and 0 < len(changed.missing) < len(changed.units)
    assert "other" not in {row["text"] for row in read(out).values()}
    assert not {"texts/3.txt", "texts/11.txt"} & read(out).keys()  # neither the old nor the new content yet
    embed(folder, out, repo, unit_rows=3)
    rows = read(out)
    assert rows.keys() == first.keys() - {"texts/11.txt"} | {"new.txt"} and rows["texts/3.txt"]["text"] == "other"
    embed(folder, tmp_path / "fresh", repo, unit_rows=3)
    assert same(rows, read(tmp_path / "fresh"))
    assert len(os.listdir(out / "units")) == len(changed.units)


def test_finished_input_is_not_read_again(folder, tmp_path, repo, monkeypatch):
    embed(folder, tmp_path / "out", repo, unit_rows=3)
    monkeypatch.setattr("btok_hf.corpus.rows.File.open", None)
    monkeypatch.setattr("btok_hf.corpus.workers.Embedder", None)  # nor is the model loaded
    embed(folder, tmp_path / "out", repo, unit_rows=3)


def test_another_process_leaves_cleaning_to_the_first(folder, tmp_path, repo):
    embed(folder, tmp_path / "out", repo, unit_rows=3)
    before = set(os.listdir(tmp_path / "out" / "units"))
    (folder / "texts" / "3.txt").write_text("other")
    options = Options(repo, device="cpu", unit_rows=3)
    assert make_plan(str(folder), str(tmp_path / "out"), options, clean=False).removed == 1
    assert set(os.listdir(tmp_path / "out" / "units")) == before
    make_plan(str(folder), str(tmp_path / "out"), options)
    assert len(before - set(os.listdir(tmp_path / "out" / "units"))) == 1


def test_failed_rows_are_tried_again_on_request(folder, tmp_path, repo, monkeypatch, caplog):
    (folder / "texts" / "3.txt").write_text(" ")
    assert embed(folder, tmp_path / "out", repo, unit_rows=3).keys() == {"texts/3.txt"}
    assert embed(folder, tmp_path / "out", repo, unit_rows=3).keys() == {"texts/3.txt"}  # of the last run
    options = Options(repo, unit_rows=3)
    assert make_plan(str(folder), str(tmp_path / "out"), options).missing == []
    again = make_plan(str(folder), str(tmp_path / "out"), options, retry_failed=True)
    assert len(again.missing) == 1 and "texts/3.txt" in again.missing[0].files
    assert Corpus(str(tmp_path / "out")).has(again.missing[0].name)  # until it is replaced
    before = {row["id"] for row in read(tmp_path / "out").values()}
    with pytest.raises(RuntimeError, match="nosuch"):
        run(str(folder), str(tmp_path / "out"), options.replace(device="nosuch"), retry_failed=True)
    assert {row["id"] for row in read(tmp_path / "out").values()} == before

    def fail(content):
        raise OSError("network is down")

    monkeypatch.setattr(rows, "_text", fail)
    assert embed(folder, tmp_path / "out", repo, unit_rows=3, retry_failed=True).keys() == {"texts/3.txt"}
    found = read(tmp_path / "out")
    assert [name for name, row in found.items() if row["embedding"] is None] == ["texts/3.txt"]
    assert "rows fail now and did not before" in caplog.text and "network is down" in caplog.text
    monkeypatch.setattr(rows, "_text", lambda content: "repaired")
    assert embed(folder, tmp_path / "out", repo, unit_rows=3, retry_failed=True) == {}
    assert read(tmp_path / "out")["texts/3.txt"]["text"] == "repaired"
    assert make_plan(str(folder), str(tmp_path / "out"), options, retry_failed=True).missing == []


def test_a_model_that_changes_during_a_run_is_refused(folder, tmp_path, copied):
    """By a worker that starts later, or on another machine."""
    plan = make_plan(str(folder), str(tmp_path / "out"), Options(str(copied), unit_rows=3, device="cpu"))
    weights = load_file(copied / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the model here is \w+, and this run embeds with"):
        Embedder(plan.job)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Find it."},
        {"max_pixels": 28 * 28},
        {"max_seq_length": 50},
        {"dtype": "bfloat16"},
        {"thumbnail_pixels": 9},
    ],
)
def test_other_settings_are_refused(folder, tmp_path, repo, change):
    plan(folder, tmp_path / "out", repo)
    (name,) = change
    with pytest.raises(ValueError, match=f"other settings: {name} .*name another folder for OUT"):
        plan(folder, tmp_path / "out", repo, **change)


def test_another_input_or_model_is_refused(folder, tmp_path, repo, repos):
    plan(folder, tmp_path / "out", repo)
    write_files(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings: input .*in' there, .*other' now"):
        plan(tmp_path / "other", tmp_path / "out", repo)
    with pytest.raises(ValueError, match=r"other settings: revision .*qwen2_vl' there, .*qwen3_vl' now"):
        plan(folder, tmp_path / "out", repos["qwen3_vl"])
    shutil.copytree(repo, tmp_path / "moved")
    assert plan(folder, tmp_path / "out", tmp_path / "moved").units == plan(folder, tmp_path / "out", repo).units


def test_what_is_written_into_the_folder_of_a_model_changes_nothing(folder, tmp_path, copied):
    plan(folder, tmp_path / "out", copied)
    (copied / "metrics.json").write_text("{}")
    (copied / "checkpoint-1").mkdir()
    (copied / "checkpoint-1" / "config.json").write_text("{}")
    plan(folder, tmp_path / "out", copied)
    edit(copied, "config_sentence_transformers.json", lambda config: config["prompts"].update(document="Other"))
    with pytest.raises(ValueError, match="other settings: revision"):
        plan(folder, tmp_path / "out", copied)


def test_models_that_are_refused(tmp_path, folder, bases, copied):
    with pytest.raises(ValueError, match="add_bottleneck_tokens"):
        plan(folder, tmp_path / "out", bases["qwen2_vl"])
    (copied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json.*btok export"):
        plan(folder, tmp_path / "out", copied)
    with pytest.raises(OSError, match="nothing/here is neither a local folder nor a readable Hub repository"):
        plan(folder, tmp_path / "out", "nothing/here")
    assert not (tmp_path / "out").exists()


def test_fewer_dimensions_need_a_model_that_was_trained_for_them(folder, tmp_path, copied):
    with pytest.raises(ValueError, match=r"that .* was trained for, 64, got 32\."):
        plan(folder, tmp_path / "out", copied, dimensions=32)
    edit(copied, "config.json", lambda config: config.update(matryoshka_dimensions=[32, 64]))
    embed(folder, tmp_path / "out", copied, dimensions=32)
    vectors = [row["embedding"] for row in read(tmp_path / "out").values()]
    assert all(len(vector) == 32 and abs(sum(x * x for x in vector) - 1) < 1e-5 for vector in vectors)


def test_settings_of_a_corpus(folder, tmp_path, repo, monkeypatch):
    monkeypatch.chdir(folder.parent)
    make_plan("in", "out", Options(repo, prompt="ä"))
    settings = json.loads((tmp_path / "out" / "corpus.json").read_text("utf-8"))
    assert settings["input"] == settings["root"] == str(folder)
    assert (settings["model"], settings["revision"]) == (repo, identify(repo)[0])
    assert (settings["kind"], settings["prompt"], settings["dimensions"]) == ("folder", "ä", 64)


def test_options_are_checked():
    for name in ("unit_rows", "batch_size", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            Options("model", **{name: 0})
    for name in ("max_pixels", "max_seq_length"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got -5"):
            Options("model", **{name: -5})
    for dtype in ("flaot16", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be auto or a name of torch.*'{dtype}'"):
            Options("model", dtype=dtype)
    with pytest.raises(ValueError, match="--id and --columns name columns of a table"):
        Options("model", columns=Columns(id="key"))
    with pytest.raises(ValueError, match="--id and --columns name columns of a table"):
        Options("model", columns=Columns(metadata=("year",)))
