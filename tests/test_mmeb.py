"""MMEB-V2 from files to report, on small trees in the published formats; kill and resume, several processes."""

import json
import os
import re
import shutil
import signal
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from support.evaluation import OTHERS, SAMPLE, by_hand, counted, refuse
from support.mmeb_tree import looks, page_rows, picture, write_dataset
from support.processes import run_script, run_two

from btok_hf import BTokSentenceTransformer
from btok_hf.evaluation import embeddings, mmeb
from btok_hf.evaluation.loading import load_task
from btok_hf.evaluation.metrics import score
from btok_hf.evaluation.mmeb import evaluate
from btok_hf.evaluation.tasks import TASKS, Query, Task


def test_all_78_datasets(mmeb_root, tmp_path, capsys):
    arguments = {"name": "org/looks", "metadata": {"model_size": 0.1}, "eval_task": "overall"}
    scores, errors = evaluate(looks, mmeb_root, tmp_path / "out", **arguments)
    assert errors == {} and list(scores) == list(TASKS)
    for name, task in TASKS.items():
        folder = tmp_path / "out" / task.modality
        saved = json.loads((folder / f"{name}_score.json").read_text())
        assert saved == scores[name] and len(saved) == 27
        queries, candidates = load_task(name, mmeb_root)[4:6]
        assert saved["num_data"] == len(queries)
        lines = [json.loads(line) for line in (folder / f"{name}_pred.jsonl").read_text("utf-8").splitlines()]
        assert len(lines) == len(queries)
        assert all(list(line) == ["prediction", "label", "rel_scores"] for line in lines)
        again = score([line["prediction"] for line in lines], [dict(zip(x["label"], x["rel_scores"])) for x in lines])
        assert again == saved
        for line, query in zip(lines, queries):  # whole rankings
            assert sorted(line["prediction"]) == sorted(query.candidates or candidates)
    text = capsys.readouterr().out
    assert re.search(r"\| Overall .* 78 of 78 \| \d", text)
    # Fewer queries than the published scores have.
    assert re.search(r"\[78/78\] MMLongBench-doc: ndcg_linear@5 \d+\.\d \(3 queries instead of 838\)\n", text)
    assert "not comparable with them:\n\n- ImageNet-1K: 3 queries instead of 1,000\n" in text
    assert (tmp_path / "out" / "report.md").read_text("utf-8") in text
    board = json.loads((tmp_path / "out" / "leaderboard" / "looks.json").read_text())
    assert [len(part) for part in board["metrics"].values()] == [36, 18, 24]
    assert board["metrics"]["visdoc"]["ViDoSeek-page-fixed"] == scores["ViDoSeek-page"]
    assert board["metadata"]["embedding_dimension"] == 300 and board["metadata"]["model_size"] == 0.1
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    (entry,) = yaml.safe_load((tmp_path / "out" / ".eval_results" / "mmeb-v2.yaml").read_text())
    mean = sum(scores[name][task.metric] for name, task in TASKS.items()) / 78
    assert entry["dataset"] == {"id": "TIGER-Lab/MMEB-V2", "task_id": "overall"}
    assert entry["value"] == pytest.approx(100 * mean, abs=0.005)

    # If all scores exist, nothing is read or encoded. If one is removed, data is read and nothing is encoded.
    assert evaluate(refuse, "/nowhere", tmp_path / "out", name="org/looks")[0] == scores
    (tmp_path / "out" / "video" / "MSVD_score.json").unlink()
    assert evaluate(refuse, mmeb_root, tmp_path / "out", name="org/looks")[0] == scores
    shutil.rmtree(tmp_path / "out" / "embeddings")  # to save space
    evaluate(refuse, mmeb_root, tmp_path / "out", name="org/looks")
    board = json.loads((tmp_path / "out" / "leaderboard" / "looks.json").read_text())
    assert board["metadata"]["embedding_dimension"] == 300
    assert (tmp_path / "out" / ".eval_results" / "mmeb-v2.yaml").is_file()
    # Files that need all scores of a modality do not outlive them.
    for score_file in ("image/VOC2007", "video/MSVD", "visdoc/ViDoRe_arxivqa"):
        (tmp_path / "out" / f"{score_file}_score.json").unlink()
    _, errors = evaluate(refuse, tmp_path, tmp_path / "out", name="org/looks")
    assert len(errors) == 3 and not [*(tmp_path / "out").glob("*/looks.json")]
    assert not (tmp_path / "out" / "report.png").exists() and not [*(tmp_path / "out" / ".eval_results").iterdir()]


@pytest.mark.parametrize("kind", ["wrapper", "stock"])
def test_scores_are_those_computed_by_hand(mmeb_root, tmp_path, model, repo, kind):
    model = model if kind == "wrapper" else SentenceTransformer(repo, device="cpu")
    names = SAMPLE + OTHERS if kind == "wrapper" else SAMPLE
    assert kind == "stock" or {TASKS[name].layout for name in names} == {task.layout for task in TASKS.values()}
    scores, errors = evaluate(model, mmeb_root, tmp_path, datasets=names)
    assert errors == {} and set(scores) == set(names)
    for name in names:
        expected, rankings = by_hand(model.encode, load_task(name, mmeb_root))
        assert scores[name] == pytest.approx(expected), name
        lines = (tmp_path / TASKS[name].modality / f"{name}_pred.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == rankings, name


def test_graded_pages(tmp_path):
    name = "ViDoRe_esg_reports_human_labeled_v2"
    page_rows(tmp_path, name, {0: "a"}, {i: f"{i}.png" for i in range(4)}, [(0, 1, 1), (0, 2, 3), (0, 0, 2)])

    def likes(inputs):  # vectors that rank narrow pages first
        return [[1, item["image"].width if "image" in item else 0] for item in inputs]

    for i, page in enumerate(sorted(tmp_path.glob("visdoc-tasks/images/*/*.png"))):
        picture(page, (60 + i, 80))
    scores, _ = evaluate(likes, tmp_path, tmp_path / "out", datasets=[name], name="likes")
    line = json.loads((tmp_path / "out" / "visdoc" / f"{name}_pred.jsonl").read_text())
    assert line == {"prediction": ["0", "1", "2", "3"], "label": ["2", "0", "1"], "rel_scores": [3.0, 2.0, 1.0]}
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert scores[name]["ndcg_linear@5"] == pytest.approx((2 + 1 / np.log2(3) + 3 / 2) / ideal)


def test_long_rankings_are_cut(mmeb_root, tmp_path, monkeypatch):
    monkeypatch.setattr(mmeb, "FULL_RANKING", 5)
    monkeypatch.setattr(mmeb, "RANKING_DEPTH", 2)
    evaluate(
        looks, mmeb_root, tmp_path, datasets=["OK-VQA", "QVHighlight", "ViDoRe_arxivqa", "Breakfast"], name="looks"
    )
    lengths = {}
    for path in tmp_path.rglob("*_pred.jsonl"):
        lengths[path.name.split("_pred")[0]] = {len(json.loads(x)["prediction"]) for x in path.open(encoding="utf-8")}
    # The datasets have 3, 10, 5 and 10 candidates.
    assert lengths == {"OK-VQA": {3}, "QVHighlight": {2}, "ViDoRe_arxivqa": {5}, "Breakfast": {2}}


def test_blocks_and_files_change_nothing(mmeb_root, tmp_path, monkeypatch):
    expected, _ = evaluate(looks, mmeb_root, tmp_path / "one", datasets=SAMPLE, name="looks")
    monkeypatch.setattr(mmeb, "BLOCK", 2)
    monkeypatch.setattr(embeddings, "ROWS_PER_FILE", 3)
    counting, batches = counted(looks)
    assert (
        evaluate(counting, mmeb_root, tmp_path / "two", datasets=SAMPLE, name="looks", batch_tokens=1)[0] == expected
    )
    assert {len(batch) for batch in batches} == {1}
    files = list((tmp_path / "two").glob("embeddings/*/*.embeddings"))
    assert len(files) > 2 * len(SAMPLE) and not list((tmp_path / "two").rglob("*.tmp"))


def test_limit(mmeb_root, tmp_path, capsys):
    scores, _ = evaluate(looks, mmeb_root, tmp_path, modalities=["visdoc"], limit=2, name="looks")
    assert len(scores) == 24 and {values["num_data"] for values in scores.values()} == {2}
    text = capsys.readouterr().out
    assert "Only the first 2 queries" in text and "instead of" not in text
    assert not list(tmp_path.glob("*.png")) and [path.name for path in tmp_path.glob("*.json")] == ["run.json"]
    with pytest.raises(ValueError, match=r"another run: limit 2 \(now None\)"):
        evaluate(looks, mmeb_root, tmp_path, modalities=["visdoc"], name="looks")
    with pytest.raises(ValueError, match="limit must be 1 or more, got 0"):
        evaluate(looks, mmeb_root, tmp_path, limit=0, name="looks")


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jsonl", ".md") and path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(mmeb_root, tmp_path_factory):
    """Results of one uninterrupted process, and the number of inputs that it encoded."""
    folder = tmp_path_factory.mktemp("whole")
    counting, batches = counted(looks)
    evaluate(counting, mmeb_root, folder, datasets=SAMPLE, name="looks")
    return contents(folder), sum(map(len, batches))


def test_kill_and_resume(mmeb_root, tmp_path, uninterrupted):
    results, total = uninterrupted
    arguments = (mmeb_root, tmp_path / "out", ",".join(SAMPLE))
    killed = run_script("mmeb_run.py", *arguments, 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = list((tmp_path / "out").glob("embeddings/*/*.embeddings"))
    assert len(kept) == 6 and len(list((tmp_path / "out").glob("embeddings/*/*.tmp"))) == 1
    counting, batches = counted(looks)
    evaluate(counting, mmeb_root, tmp_path / "out", datasets=SAMPLE, name="looks")
    assert 0 < sum(map(len, batches)) < total
    assert sum(map(len, batches)) >= total - 2 * len(kept)
    assert contents(tmp_path / "out") == results


def test_two_processes_share_the_work(tmp_path, uninterrupted):
    """The processes go on after an error in one of them."""
    results, total = uninterrupted
    for name in ("VOC2007", *SAMPLE):
        write_dataset(tmp_path, name)
    broken = tmp_path / "image-tasks" / "MMEB" / "VOC2007" / "query_1.jpg"  # read by the second process
    broken.write_bytes(broken.read_bytes()[:100])
    arguments = (tmp_path, tmp_path / "out", ",".join(["VOC2007", *SAMPLE]), 0)
    run_two("mmeb_run.py", *arguments)
    ended = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(2)]
    counts, statuses, left = zip(*ended)
    # Each dataset is split evenly. No process group is left, or torch aborts some processes at exit.
    assert abs(counts[0] - counts[1]) <= 1 + len(SAMPLE) and total <= sum(counts) <= total + 6
    assert statuses == (True, True) and left == (False, False)
    found = contents(tmp_path / "out")
    assert {**found, Path("report.md"): None} == {**results, Path("report.md"): None}
    reason = r"- VOC2007, query 1 \('1'\): Image file .*query_1.jpg' cannot be decoded"
    assert re.search(reason, found[Path("report.md")].decode())


def test_clips_that_were_not_unpacked_are_reported(tmp_path, capsys):
    """Candidates are the folders that exist: without the wrong ones, every model finds the right one."""
    for name in ("QVHighlight", "Charades-STA"):
        write_dataset(tmp_path, name)
    for folder in tmp_path.glob("video-tasks/frames/*/QVHighlight/*/negative_clip_*"):
        shutil.rmtree(folder)
    scores, errors = evaluate(looks, tmp_path, tmp_path / "out", modalities=["video"], name="looks")
    assert scores["QVHighlight"]["hit@1"] == 1.0 and "QVHighlight" not in errors
    text = capsys.readouterr().out
    counts = "3 queries instead of 1,083, 1 candidates per query instead of 10"
    assert f"QVHighlight: hit@1 100.0 ({counts})\n" in text and f"- QVHighlight: {counts}\n" in text
    assert "- Charades-STA: 3 queries instead of 727\n" in text


def test_default_prompt_of_the_model(mmeb_root, tmp_path, repo):
    model = BTokSentenceTransformer(repo, device="cpu", default_prompt_name="query")
    scores, _ = evaluate(model, mmeb_root, tmp_path, datasets=["OK-VQA"])
    expected = by_hand(lambda items: model.encode(items, prompt="Find it."), load_task("OK-VQA", mmeb_root))
    assert scores["OK-VQA"] == pytest.approx(expected[0])
    assert json.loads((tmp_path / "run.json").read_text())["prompt"] == "Find it."


def test_how_a_model_was_run_is_recorded(mmeb_root, tmp_path, repo, caplog):
    options = {"model_kwargs": {"dtype": torch.bfloat16}, "processor_kwargs": {"max_pixels": 28 * 28 * 8}}
    model = BTokSentenceTransformer(repo, device="cpu", truncate_dim=16, max_seq_length=512, **options)
    assert model.prompts["query"]
    evaluate(model, mmeb_root, tmp_path, datasets=["OK-VQA"])
    run = json.loads((tmp_path / "run.json").read_text())
    settings = {"dtype": "bfloat16", "max_pixels": 6272, "max_seq_length": 512, "truncate_dim": 16}
    assert run == {**run, **settings, "revision": None, "prompt": None, "embedding_dimension": 16}
    assert run["versions"] == {**run["versions"], "btok-hf": version("btok-hf"), "torch": version("torch")}
    line = "Run with dtype bfloat16, max_pixels 6272, max_seq_length 512, truncate_dim 16, embedding_dimension 16, "
    assert f"\n{line}btok-hf " in (tmp_path / "report.md").read_text("utf-8")
    assert "The model's prompts for query are not used" in caplog.text
    # The same folder goes on, and an embedding folder that was deleted loses nothing.
    shutil.rmtree(tmp_path / "embeddings")
    caplog.clear()
    evaluate(model, mmeb_root, tmp_path, datasets=["OK-VQA"])
    assert json.loads((tmp_path / "run.json").read_text()) == run
    evaluate(model, mmeb_root, tmp_path / "prompted", datasets=["OK-VQA"], prompt="Find it.", limit=1)
    assert caplog.text.count("are not used") == 1
    assert "prompt 'Find it.'" in (tmp_path / "prompted" / "report.md").read_text("utf-8")


def test_another_prompt(mmeb_root, tmp_path, repo):
    prompts = set()

    class Watched(BTokSentenceTransformer):
        def encode(self, inputs, **kwargs):
            prompts.add(kwargs["prompt"])
            return super().encode(inputs, **kwargs)

    model = Watched(repo, device="cpu")
    for prompt in (None, "Find it."):
        evaluate(
            model, mmeb_root, tmp_path / str(prompt), datasets=["OK-VQA"], prompt=prompt, cache_dir=tmp_path / "cache"
        )
        assert prompts == {prompt}
        prompts.clear()


def test_candidates_of_queries_are_read_in_parts(mmeb_root, tmp_path, monkeypatch):
    datasets = ["OK-VQA", "CIRR", "MomentSeeker"]
    expected, _ = evaluate(looks, mmeb_root, tmp_path / "one", datasets=datasets, name="looks")
    read, vectors = [], embeddings.EmbeddingStore.vectors
    monkeypatch.setattr(mmeb, "POOL", 3)
    monkeypatch.setattr(embeddings.EmbeddingStore, "vectors", lambda *given: read.append(given[1]) or vectors(*given))
    scores, _ = evaluate(looks, mmeb_root, tmp_path / "two", datasets=datasets, name="looks")
    assert scores == expected and len(read) > 2 * len(datasets)  # queries, and parts of candidates
    for dataset in datasets:
        (one,), (two,) = ((tmp_path / run).glob(f"*/{dataset}_pred.jsonl") for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "candidates, parts",
    [
        ([], [(0, 0)]),
        (["ab", "ab", "ab"], [(0, 3)]),
        (["ab", "cd", "ef"], [(0, 1), (1, 2), (2, 3)]),
        (["ab", "bc", "cd"], [(0, 2), (2, 3)]),
        (["abcdefg", "a", "b"], [(0, 1), (1, 3)]),
        (["a", "abcdefg", "b"], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_parts_of_queries(candidates, parts, monkeypatch):
    monkeypatch.setattr(mmeb, "POOL", 3)
    assert list(mmeb._parts(candidates)) == parts


def test_a_model_that_tells_nothing_apart_scores_as_chance(tmp_path):
    """Datasets list the right answer first, and equal candidates must not be ranked in their order."""
    write_dataset(tmp_path, "OK-VQA", count=60)

    def constant(items):
        return np.ones((len(items), 8), np.float32)

    scores, _ = evaluate(constant, tmp_path, tmp_path / "out", datasets=["OK-VQA"], name="constant")
    task = load_task("OK-VQA", tmp_path)
    chance = np.mean([1 / len(query.candidates) for query in task.queries])
    assert len(task.queries) > 50 and scores["OK-VQA"]["hit@1"] < chance + 0.25


def test_a_function_has_no_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"A function gets no prompt, got 'Find it\.'"):
        evaluate(looks, tmp_path, tmp_path / "out", name="looks", prompt="Find it.")


def test_one_broken_dataset_does_not_stop_the_rest(tmp_path, capsys):
    for name in ("OK-VQA", "CIRR", "MSVD"):
        write_dataset(tmp_path, name)
    broken = sorted((tmp_path / "image-tasks" / "MMEB" / "CIRR").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    scores, errors = evaluate(
        looks, tmp_path, tmp_path / "out", datasets=["CIRR", "OK-VQA", "MSVD", "ViDoRe_arxivqa"], name="looks"
    )
    assert set(scores) == {"OK-VQA", "MSVD"} and set(errors) == {"CIRR", "ViDoRe_arxivqa"}
    assert re.match(r"CIRR, (query \d \('\d'\)|candidate '.*'): Image file .*CIRR.* cannot be decoded", errors["CIRR"])
    assert re.match(r"ViDoRe_arxivqa: there is no folder .*visdoc-tasks", errors["ViDoRe_arxivqa"])
    text = capsys.readouterr().out
    assert f"[1/4] OK-VQA: hit@1 {100 * scores['OK-VQA']['hit@1']:.1f}" in text
    assert f"- {errors['CIRR']}\n- {errors['ViDoRe_arxivqa']}" in text


@pytest.mark.parametrize(
    "name, path, row",
    [
        ("OK-VQA", "image-tasks/MMEB/OK-VQA/query_1.jpg", r"query 1 \('1'\)"),
        ("MSVD", "video-tasks/frames/video_ret/MSVD/v_1", "candidate 'v_1'"),
    ],
)
def test_media_that_vanish_are_named(tmp_path, monkeypatch, name, path, row):
    write_dataset(tmp_path, name)

    def load(*arguments):
        task = load_task(*arguments)
        (tmp_path / path).rename(tmp_path / "elsewhere")
        return task

    monkeypatch.setattr(mmeb, "load_task", load)
    _, errors = evaluate(looks, tmp_path, tmp_path / "out", datasets=[name], name="looks")
    assert re.match(rf"{name}, {row}: .*No such file or directory: '.*{path}'\. Put it back", errors[name])


def test_a_file_that_changes_meanwhile_is_reported(tmp_path):
    write_dataset(tmp_path, "VOC2007")

    def slow(inputs):
        (tmp_path / "image-tasks" / "MMEB" / "VOC2007" / "query_1.jpg").touch()
        return looks(inputs)

    _, errors = evaluate(slow, tmp_path, tmp_path / "out", datasets=["VOC2007"], name="slow")
    assert "VOC2007: Of 3 inputs, 1 have no embedding: their files were changed" in errors["VOC2007"]


def test_a_full_disk_is_named(mmeb_root, tmp_path, monkeypatch):
    def full(draft, path, replace=os.replace):
        if str(path).endswith("_pred.jsonl"):
            raise OSError("the disk is full")
        replace(draft, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        scores, errors = evaluate(looks, mmeb_root, tmp_path, datasets=["OK-VQA", "CIRR"], name="looks")
    assert (scores, errors) == ({}, {name: f"{name}: the disk is full" for name in ("OK-VQA", "CIRR")})
    assert not list(tmp_path.rglob("*_score.json"))  # which would say that it is done
    scores, errors = evaluate(refuse, mmeb_root, tmp_path, datasets=["OK-VQA", "CIRR"], name="looks")
    assert errors == {} and len(list(tmp_path.rglob("*_pred.jsonl"))) == len(scores) == 2


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query("q", {"text": "q"}, None, {}), r"OK-VQA, query 1 \('q'\) has no relevant candidate"),
        (Query("q", {"text": "q"}, None, {"z": 1.0}), "refers to 'z', which is not among its 2"),
        (Query("q", {"text": "q"}, ["a"], {"b": 1.0}), "refers to 'b', which is not among its 1"),
        (Query("q", {"text": "q"}, ["a", "z"], {"a": 1.0}), "refers to 'z'"),
        (Query("q", {"text": "q"}, ["a", "b", "a"], {"a": 1.0}), "lists the candidate 'a' more than once"),
    ],
)
def test_tasks_that_cannot_be_scored(query, message, tmp_path, monkeypatch):
    good = Query("g", {"text": "g"}, None, {"a": 1.0})
    task = Task("OK-VQA", "image", "I-QA", "hit@1", [good, query], {"a": {"text": "a"}, "b": {"text": "b"}})
    with pytest.raises(ValueError, match=message):
        mmeb._check(task)
    mmeb._check(task._replace(queries=[good]))
    with pytest.raises(ValueError, match="OK-VQA has no queries"):
        mmeb._check(task._replace(queries=[]))
    monkeypatch.setattr(mmeb, "load_task", lambda *arguments: task)
    _, errors = evaluate(refuse, "/nowhere", tmp_path, datasets=["OK-VQA"], name="refuse")
    assert re.search(message, errors["OK-VQA"])


def test_refused_arguments(mmeb_root, tmp_path):
    with pytest.raises(
        ValueError, match=r"Unknown 'MSVDD', 'audio'\. Modalities are image, video, visdoc; datasets are"
    ):
        evaluate(looks, mmeb_root, tmp_path, datasets=["MSVDD"], modalities=["audio"], name="looks")
    for nothing in ({"datasets": ["MSVD"], "modalities": ["image"]}, {"datasets": []}, {"modalities": []}):
        with pytest.raises(ValueError, match=r"No dataset is both in .* and of the modalities .*\. Leave out"):
            evaluate(looks, mmeb_root, tmp_path, name="looks", **nothing)
    with pytest.raises(ValueError, match="batch_tokens must be 1 or more, got 0"):
        evaluate(looks, mmeb_root, tmp_path, name="looks", batch_tokens=0)
    with pytest.raises(ValueError, match=r"A function needs a name, .*: pass name"):
        evaluate(looks, mmeb_root, tmp_path)
    assert not list(tmp_path.iterdir())
