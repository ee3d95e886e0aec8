"""MMEB-V2 from files to report, on small trees in the published formats: every dataset, kill and resume, caches."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
import yaml
from conftest import image, video
from datasets import Dataset
from mmeb_tree import frames, looks, page_rows, picture, write_dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from sentence_transformers import SentenceTransformer
from test_metrics import LETTERS
from tokenizers.normalizers import Lowercase

from btok_hf import BTokSentenceTransformer, cli
from btok_hf.evaluation import mmeb
from btok_hf.evaluation.embeddings import EmbeddingStore, fingerprint
from btok_hf.evaluation.loading import load_task, read_input
from btok_hf.evaluation.metrics import score
from btok_hf.evaluation.mmeb import evaluate
from btok_hf.evaluation.mteb import mteb_meta
from btok_hf.evaluation.tasks import TASKS, Query, Task

TESTS = Path(__file__).parent
# Local texts, a global pool of videos, local videos with a folder of clips, pages; queries with and without images.
SAMPLE = ["OK-VQA", "CIRR", "MSVD", "MomentSeeker", "ViDoRe_arxivqa"]
# With them, every layout.
OTHERS = ["VOC2007", "WebQA", "Breakfast", "SmthSmthV2", "NExTQA", "QVHighlight", "VisRAG_ArxivQA"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmeb")
    for name in TASKS:
        write_dataset(folder, name)
    return folder


@pytest.fixture(scope="module")
def model(repo):
    return BTokSentenceTransformer(repo, device="cpu")


def refuse(inputs):
    raise AssertionError(f"encoded again: {inputs}")


def counted(function):
    """The function, and the batches that it is given."""
    batches = []

    def counting(inputs):
        batches.append(inputs)
        return function(inputs)

    return counting, batches


def by_hand(encode, task):
    """Scores of a task without caches, batches or blocks."""

    def vectors(items):
        found = np.stack([encode([read_input(item, task.num_frames)])[0] for item in items])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    names, queries = list(task.candidates), vectors([query.input for query in task.queries])
    similarity = queries.astype(float) @ vectors(task.candidates.values()).astype(float).T
    rankings = []
    for row, query in zip(similarity.round(6), task.queries):
        own = names if query.candidates is None else query.candidates
        rankings.append(sorted(own, key=lambda name, row=row: -row[names.index(name)]))
    return score(rankings, [query.relevance for query in task.queries]), rankings


# ---------------------------------------------------------------- the whole benchmark


def test_all_78_datasets(root, tmp_path, capsys):
    arguments = {"name": "org/looks", "metadata": {"model_size": 0.1}, "eval_task": "overall"}
    scores, errors = evaluate(looks, root, tmp_path / "out", **arguments)
    assert errors == {} and list(scores) == list(TASKS)
    for name, task in TASKS.items():
        folder = tmp_path / "out" / task.modality
        saved = json.loads((folder / f"{name}_score.json").read_text())
        assert saved == scores[name] and len(saved) == 26
        queries, candidates = load_task(name, root)[4:6]
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
    # Three queries each, and twenty: other data than the published scores are of.
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

    # With all scores there, nothing is read or encoded; with one removed, only read.
    assert evaluate(refuse, "/nowhere", tmp_path / "out", name="org/looks")[0] == scores
    (tmp_path / "out" / "video" / "MSVD_score.json").unlink()
    assert evaluate(refuse, root, tmp_path / "out", name="org/looks")[0] == scores


@pytest.mark.parametrize("kind", ["wrapper", "stock"])
def test_scores_are_those_computed_by_hand(root, tmp_path, model, repo, kind):
    model = model if kind == "wrapper" else SentenceTransformer(repo, device="cpu")
    names = SAMPLE + OTHERS if kind == "wrapper" else SAMPLE
    assert kind == "stock" or {TASKS[name].layout for name in names} == {task.layout for task in TASKS.values()}
    scores, errors = evaluate(model, root, tmp_path, datasets=names)
    assert errors == {} and set(scores) == set(names)
    for name in names:
        expected, rankings = by_hand(model.encode, load_task(name, root))
        assert scores[name] == pytest.approx(expected), name
        lines = (tmp_path / TASKS[name].modality / f"{name}_pred.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == rankings, name


def test_graded_pages(tmp_path):
    name = "ViDoRe_esg_reports_human_labeled_v2"
    page_rows(tmp_path, name, {0: "a"}, {i: f"{i}.png" for i in range(4)}, [(0, 1, 1), (0, 2, 3), (0, 0, 2)])

    def likes(inputs):  # the pages by their width, narrow ones first
        return [[1, item["image"].width if "image" in item else 0] for item in inputs]

    for i, page in enumerate(sorted(tmp_path.glob("visdoc-tasks/images/*/*.png"))):
        picture(page, (60 + i, 80))
    scores, _ = evaluate(likes, tmp_path, tmp_path / "out", datasets=[name], name="likes")
    line = json.loads((tmp_path / "out" / "visdoc" / f"{name}_pred.jsonl").read_text())
    assert line == {"prediction": ["0", "1", "2", "3"], "label": ["2", "0", "1"], "rel_scores": [3.0, 2.0, 1.0]}
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert scores[name]["ndcg_linear@5"] == pytest.approx((2 + 1 / np.log2(3) + 3 / 2) / ideal)


def test_long_rankings_are_cut(root, tmp_path, monkeypatch):
    monkeypatch.setattr(mmeb, "FULL_RANKING", 5)
    monkeypatch.setattr(mmeb, "RANKING_DEPTH", 2)
    evaluate(looks, root, tmp_path, datasets=["OK-VQA", "QVHighlight", "ViDoRe_arxivqa", "Breakfast"], name="looks")
    lengths = {}
    for path in tmp_path.rglob("*_pred.jsonl"):
        lengths[path.name.split("_pred")[0]] = {len(json.loads(x)["prediction"]) for x in path.open(encoding="utf-8")}
    # Of 3, 10, 5 and 10.
    assert lengths == {"OK-VQA": {3}, "QVHighlight": {2}, "ViDoRe_arxivqa": {5}, "Breakfast": {2}}


def test_blocks_and_files_change_nothing(root, tmp_path, monkeypatch):
    expected, _ = evaluate(looks, root, tmp_path / "one", datasets=SAMPLE, name="looks")
    monkeypatch.setattr(mmeb, "BLOCK", 2)
    monkeypatch.setattr(mmeb, "ROWS_PER_FILE", 3)
    counting, batches = counted(looks)
    assert evaluate(counting, root, tmp_path / "two", datasets=SAMPLE, name="looks", batch_tokens=1)[0] == expected
    assert {len(batch) for batch in batches} == {1}
    files = list((tmp_path / "two").glob("embeddings/*/*.embeddings"))
    assert len(files) > 2 * len(SAMPLE) and not list((tmp_path / "two").rglob("*.tmp"))


def test_every_input_is_encoded_once(root, tmp_path):
    tasks = [load_task(name, root) for name in ("ViDoRe_arxivqa", "OK-VQA")]
    inputs = [item for task in tasks for item in [q.input for q in task.queries] + list(task.candidates.values())]
    distinct = {json.dumps(item, sort_keys=True) for item in inputs}
    counting, batches = counted(looks)
    evaluate(counting, root, tmp_path / "a", datasets=[task.name for task in tasks], name="looks")
    assert sum(map(len, batches)) == len(distinct)
    # Many models take no batch of several kinds.
    assert all(len({frozenset(item) for item in batch}) == 1 for batch in batches)
    # Another evaluation of the same model shares the embeddings; other queries of the same pages need only themselves.
    evaluate(refuse, root, tmp_path / "b", datasets=["OK-VQA"], name="looks", cache_dir=tmp_path / "a" / "embeddings")


def test_batches_stay_within_their_tokens(root, tmp_path, repo):
    sizes = []

    class Watched(BTokSentenceTransformer):
        def encode(self, inputs, **kwargs):
            sizes.append((len(inputs), self.preprocess(inputs)["attention_mask"].numel()))
            return super().encode(inputs, **kwargs)

    largest = []
    for budget in (200, 2000):
        sizes.clear()
        watched = Watched(repo, device="cpu")
        evaluate(watched, root, tmp_path / str(budget), datasets=["ViDoRe_arxivqa"], batch_tokens=budget)
        assert all(rows == 1 or tokens <= budget for rows, tokens in sizes)
        largest.append(max(rows for rows, _ in sizes))
    assert largest[0] < largest[1]


def test_tokens_of_an_input(model):
    estimate, prompted = (mmeb.Encoder(model, prompt, 1, None, None)._tokens for prompt in (None, "Find it."))
    assert prompted({"text": "a"}) == estimate({"text": "a"}) + len("Find it.")  # bytes are tokens here
    pictures = [{"image": image(side, side)} for side in (56, 90, 400)]
    for item in [{}, *pictures, *({"video": video(count)} for count in (2, 8))]:
        for text in ("a", "a longer text"):
            exact = model.preprocess([{**item, "text": text}])["attention_mask"].sum()
            assert exact <= estimate({**item, "text": text}) <= exact + 12


def test_all_frames_reach_the_model(tmp_path):
    for name in ("MSVD", "MomentSeeker"):
        write_dataset(tmp_path, name)
    for first in tmp_path.glob("video-tasks/frames/**/*_0000.jpg"):
        frames(first.parent, 12)
    counting, batches = counted(looks)
    evaluate(counting, tmp_path, tmp_path / "out", modalities=["video"], datasets=["MSVD", "MomentSeeker"], name="a")
    # MSVD's clip is first; a query of MomentSeeker is a video too.
    counts = [len(item["video"]["array"]) for batch in batches for item in batch if "video" in item]
    assert counts == [8] * 3 + [12] * 10


def test_limit(root, tmp_path, capsys):
    scores, _ = evaluate(looks, root, tmp_path, modalities=["visdoc"], limit=2, name="looks")
    assert len(scores) == 24 and {values["num_data"] for values in scores.values()} == {2}
    text = capsys.readouterr().out
    assert "Only the first 2 queries" in text and "instead of" not in text
    assert not list(tmp_path.glob("*.png")) and [path.name for path in tmp_path.glob("*.json")] == ["run.json"]
    with pytest.raises(ValueError, match=r"another run: limit 2 \(now None\)"):
        evaluate(looks, root, tmp_path, modalities=["visdoc"], name="looks")
    with pytest.raises(ValueError, match="limit must be 1 or more, got 0"):
        evaluate(looks, root, tmp_path, limit=0, name="looks")


# ---------------------------------------------------------------- interruptions and processes

RUN = """
import json, os, signal, sys, torch
sys.path.insert(0, {tests!r})
from btok_hf import cli
from btok_hf.evaluation import mmeb
from mmeb_tree import looks
if {kill}:
    from btok_hf.evaluation import embeddings
    embeddings.ROWS_PER_FILE = 2
    replace, count = os.replace, 0
    def half(draft, path):
        global count
        count += str(path).endswith(".embeddings")
        if count == {kill}:  # the write that never ends
            os.truncate(draft, os.path.getsize(draft) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(draft, path)
    os.replace = half
seen = []
def counted(inputs):
    seen.extend(inputs)
    return looks(inputs)
mmeb.load_model = lambda *arguments, **options: counted
status = cli.main(["mmeb", "--model", "looks", "--data", {root!r}, "--output", {out!r}, "--datasets", {datasets!r}])
with open({out!r} + f".{{os.environ.get('RANK', 0)}}.json", "w") as file:
    json.dump([len(seen), status, torch.distributed.is_initialized()], file)
"""


def run(root, out, datasets=SAMPLE, kill=0, launcher=()):
    code = RUN.format(tests=str(TESTS), root=str(root), out=str(out), datasets=",".join(datasets), kill=kill)
    script = Path(out).with_suffix(".py")
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jsonl", ".md") and path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    """Results of one process that was not killed, and the number of inputs that it encoded."""
    folder = tmp_path_factory.mktemp("whole")
    counting, batches = counted(looks)
    evaluate(counting, root, folder, datasets=SAMPLE, name="looks")
    return contents(folder), sum(map(len, batches))


def test_kill_and_resume(root, tmp_path, uninterrupted):
    results, total = uninterrupted
    killed = run(root, tmp_path / "out", kill=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = list((tmp_path / "out").glob("embeddings/*/*.embeddings"))
    assert len(kept) == 6 and len(list((tmp_path / "out").glob("embeddings/*/*.tmp"))) == 1
    counting, batches = counted(looks)
    evaluate(counting, root, tmp_path / "out", datasets=SAMPLE, name="looks")
    assert 0 < sum(map(len, batches)) < total
    assert sum(map(len, batches)) >= total - 2 * len(kept)
    assert contents(tmp_path / "out") == results


def test_two_processes_share_the_work(tmp_path, uninterrupted):
    """And go on after an error in one of them."""
    results, total = uninterrupted
    for name in ("VOC2007", *SAMPLE):
        write_dataset(tmp_path, name)
    broken = tmp_path / "image-tasks" / "MMEB" / "VOC2007" / "query_1.jpg"  # the second process's
    broken.write_bytes(broken.read_bytes()[:100])
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    both = run(tmp_path, tmp_path / "out", ["VOC2007", *SAMPLE], launcher=launcher)
    assert both.returncode == 0, both.stderr
    ended = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(2)]
    counts, statuses, left = zip(*ended)
    # Equally many of each dataset. Nothing is left behind, or else torch aborts every tenth process at its exit.
    assert abs(counts[0] - counts[1]) <= 1 + len(SAMPLE) and total <= sum(counts) <= total + 6
    assert statuses == (True, True) and left == (False, False)
    found = contents(tmp_path / "out")
    assert {**found, Path("report.md"): None} == {**results, Path("report.md"): None}
    reason = r"- VOC2007, query 1 \('1'\): Image file .*query_1.jpg' cannot be decoded"
    assert re.search(reason, found[Path("report.md")].decode())


# ---------------------------------------------------------------- caches


def test_fingerprints_tell_models_apart(repo, repos, model, monkeypatch, tmp_path):
    known = {fingerprint(model)}
    evaluate_again = BTokSentenceTransformer(repo, device="cpu")
    evaluate_again.encode(["a text", "a longer text"])
    assert fingerprint(evaluate_again) in known
    copy = shutil.copytree(repo, tmp_path / "copy")
    assert fingerprint(BTokSentenceTransformer(str(copy), device="cpu")) in known

    def add(changed, prompt=None):
        found = fingerprint(changed, prompt)
        assert found not in known
        known.add(found)

    add(model, "Find it.")
    stock = SentenceTransformer(repo, device="cpu")
    add(stock)
    stock[2].pooling_mode = "cls"
    add(stock)
    add(BTokSentenceTransformer(repos["qwen2_5_vl"], device="cpu"))
    add(BTokSentenceTransformer(repo, device="cpu", processor_kwargs={"max_pixels": 28 * 28 * 8}))
    add(BTokSentenceTransformer(repo, device="cpu", max_seq_length=512))
    add(BTokSentenceTransformer(repo, device="cpu", truncate_dim=32))
    add(BTokSentenceTransformer(repo, device="cpu", model_kwargs={"dtype": torch.bfloat16}))
    changed = BTokSentenceTransformer(repo, device="cpu")
    changed[0].processor.chat_template += " "
    add(changed)
    changed = BTokSentenceTransformer(repo, device="cpu")
    weights = sorted(changed.state_dict().items())
    for _, tensor in weights[::-8]:
        tensor.view(-1)[-1] *= -1  # one bit, of the last byte
        add(changed)
    parameter = next(changed.parameters())
    parameter.data = parameter.data.flatten()  # the same bytes
    add(changed)
    for kind in ("image_processor", "video_processor"):
        getattr(changed[0].processor, kind).size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9}
        add(changed)
    changed[0].tokenizer.backend_tokenizer.normalizer = Lowercase()
    add(changed)
    changed.config.text_config.rms_norm_eps *= 2
    add(changed)
    monkeypatch.setattr(mmeb, "versions", lambda: {"torch": "0"})
    add(changed)


def test_no_model_gets_the_embeddings_of_another(root, tmp_path, model, repo):
    cache, scores = tmp_path / "cache", {}
    changed = BTokSentenceTransformer(repo, device="cpu")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, one in (("first", model), ("second", changed)):
        result = evaluate(one, root, tmp_path / name, datasets=["ViDoRe_arxivqa"], cache_dir=cache)
        scores[name] = result[0]["ViDoRe_arxivqa"]
        assert scores[name] == pytest.approx(by_hand(one.encode, load_task("ViDoRe_arxivqa", root))[0])
    assert scores["first"] != scores["second"] and len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="holds results of another run: fingerprint"):
        evaluate(changed, root, tmp_path / "first", datasets=["ViDoRe_arxivqa"], cache_dir=cache)
    with pytest.raises(ValueError, match=r"another run: .*prompt None"):
        evaluate(model, root, tmp_path / "first", datasets=["ViDoRe_arxivqa"], prompt="Find it.")


def test_a_function_is_known_by_its_name(root, tmp_path):
    arguments = {"datasets": ["OK-VQA"], "cache_dir": tmp_path / "cache"}
    for name in ("one", "two"):
        counting, batches = counted(looks)
        evaluate(counting, root, tmp_path / name, name=name, **arguments)
        assert sum(map(len, batches)) == 6
    evaluate(refuse, root, tmp_path / "three", name="two", **arguments)


def test_default_prompt_of_the_model(root, tmp_path, repo):
    model = BTokSentenceTransformer(repo, device="cpu", default_prompt_name="query")
    scores, _ = evaluate(model, root, tmp_path, datasets=["OK-VQA"])
    expected = by_hand(lambda items: model.encode(items, prompt="Find it."), load_task("OK-VQA", root))
    assert scores["OK-VQA"] == pytest.approx(expected[0])
    assert json.loads((tmp_path / "run.json").read_text())["prompt"] == "Find it."


def test_another_prompt(root, tmp_path, repo):
    prompts = set()

    class Watched(BTokSentenceTransformer):
        def encode(self, inputs, **kwargs):
            prompts.add(kwargs["prompt"])
            return super().encode(inputs, **kwargs)

    model = Watched(repo, device="cpu")
    for prompt in (None, "Find it."):
        evaluate(model, root, tmp_path / str(prompt), datasets=["OK-VQA"], prompt=prompt, cache_dir=tmp_path / "cache")
        assert prompts == {prompt}
        prompts.clear()


def test_what_an_input_is_known_by(tmp_path):
    write_dataset(tmp_path, "MSVD")
    task, frame = load_task("MSVD", tmp_path), next(tmp_path.glob("video-tasks/frames/*/MSVD/v_1/*1.jpg"))

    def keys(task):
        return {label: key for key, label, _ in mmeb.task_inputs(task)}

    def differing(changed):
        found = keys(changed)
        return [label for label in first if found[label] != first[label]]

    first, times = keys(task), (frame.stat().st_atime_ns, frame.stat().st_mtime_ns)
    assert len(first) == 6 == len(set(first.values())) and differing(load_task("MSVD", tmp_path)) == []
    videos = [f"candidate 'v_{number}'" for number in range(3)]
    assert differing(task._replace(num_frames=4)) == videos
    told = [task.queries[0]._replace(input={"text": "another"}), *task.queries[1:]]
    assert differing(task._replace(queries=told)) == ["query 0 ('0')"]
    content = frame.read_bytes()
    frame.write_bytes(content + b" ")  # another size
    os.utime(frame, ns=times)
    assert differing(task) == videos[1:2]
    frame.write_bytes(content)
    os.utime(frame, ns=(times[0], times[1] + 1))  # another time
    assert differing(task) == videos[1:2]
    os.utime(frame, ns=times)
    assert differing(task) == []
    copy = shutil.copytree(frame.parent, tmp_path / "copy")  # another place
    elsewhere = task.candidates | {"v_1": {**task.candidates["v_1"], "video": str(copy)}}
    assert differing(task._replace(candidates=elsewhere)) == videos[1:2]


def test_a_replaced_image_is_encoded_anew(tmp_path):
    write_dataset(tmp_path, "ViDoRe_arxivqa")
    arguments = {"datasets": ["ViDoRe_arxivqa"], "name": "looks", "cache_dir": tmp_path / "cache"}
    evaluate(looks, tmp_path, tmp_path / "a", **arguments)
    picture(tmp_path / "visdoc-tasks/images/ViDoRe_arxivqa/1.png", (61, 80))
    counting, batches = counted(looks)
    evaluate(counting, tmp_path, tmp_path / "b", **arguments)
    assert [item["image"].size for batch in batches for item in batch] == [(61, 80)]


def test_a_replaced_frame_is_encoded_anew(tmp_path):
    write_dataset(tmp_path, "MSVD")
    arguments = {"datasets": ["MSVD"], "name": "looks", "cache_dir": tmp_path / "cache"}
    evaluate(looks, tmp_path, tmp_path / "a", **arguments)
    (frame,) = tmp_path.glob("video-tasks/frames/video_ret/MSVD/v_1/frame_0001.jpg")
    folder = os.stat(frame.parent).st_mtime_ns
    image(40, 40, seed=9).save(frame)
    assert os.stat(frame.parent).st_mtime_ns == folder  # which does not tell
    counting, batches = counted(looks)
    evaluate(counting, tmp_path, tmp_path / "b", **arguments)
    assert [item.keys() for batch in batches for item in batch] == [{"video", "text"}]


def test_two_runs_may_write_one_file(tmp_path, monkeypatch):
    path = tmp_path / "a.embeddings"
    with mmeb.replacing(path) as first:
        first.write(b"first")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)
            with mmeb.replacing(path) as second:
                second.write(b"2nd")
        assert path.read_bytes() == b"2nd"
    assert path.read_bytes() == b"first"


def test_damaged_embeddings_are_named(tmp_path):
    store = EmbeddingStore(tmp_path / "key")
    keys = [letter.encode() * 16 for letter in LETTERS]
    vectors = np.random.default_rng(0).normal(size=(len(keys), 5)).astype(np.float32)
    store.add(keys[:4], vectors[:4])
    store.add(keys[4:], vectors[4:])
    store.refresh()
    mixed = [7, 0, 15, 3, 0]
    assert (store.vectors([keys[place] for place in mixed]) == vectors[mixed]).all()
    assert keys[0] in store and b"?" * 16 not in store and EmbeddingStore(tmp_path / "key").dimension == 5
    for path in (tmp_path / "key").iterdir():
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"file of embeddings .*\.embeddings is damaged .* Delete it"):
        store.vectors(keys)


# ---------------------------------------------------------------- what is refused


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


def test_a_full_disk_is_named(root, tmp_path, monkeypatch):
    def full(draft, path, replace=os.replace):
        if str(path).endswith("_pred.jsonl"):
            raise OSError("the disk is full")
        replace(draft, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        scores, errors = evaluate(looks, root, tmp_path, datasets=["OK-VQA", "CIRR"], name="looks")
    assert (scores, errors) == ({}, {name: f"{name}: the disk is full" for name in ("OK-VQA", "CIRR")})
    assert not list(tmp_path.rglob("*_score.json"))  # which would say that it is done
    scores, errors = evaluate(refuse, root, tmp_path, datasets=["OK-VQA", "CIRR"], name="looks")
    assert errors == {} and len(list(tmp_path.rglob("*_pred.jsonl"))) == len(scores) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v * np.nan, r"OK-VQA, .*The embedding of .*holds NaN or infinite values"),
        (lambda v: v * 0, r"OK-VQA, .*holds nothing but zeros"),
        (lambda v: v[:-1], r"OK-VQA, .*returned an array of shape"),
        (lambda v: v[0], r"OK-VQA, .*returned an array of shape \(300,\)"),
        (lambda v: np.pad(v, ((0, 0), (0, len(v)))), r"OK-VQA, .*of one dimension"),
        (lambda v: 1 / 0, r"OK-VQA: ZeroDivisionError: division by zero"),
    ],
)
def test_embeddings_that_cannot_be_scored(root, tmp_path, damage, message, capsys):
    arguments = {"datasets": ["OK-VQA"], "name": "looks", "batch_tokens": 40}
    scores, errors = evaluate(lambda inputs: damage(looks(inputs)), root, tmp_path, **arguments)
    assert scores == {} and re.match(message, errors["OK-VQA"])
    # Nothing of it is kept.
    assert evaluate(looks, root, tmp_path, **arguments)[1] == {}


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


def test_refused_arguments(root, tmp_path):
    with pytest.raises(
        ValueError, match=r"Unknown 'MSVDD', 'audio'\. Modalities are image, video, visdoc; datasets are"
    ):
        evaluate(looks, root, tmp_path, datasets=["MSVDD"], modalities=["audio"], name="looks")
    for nothing in ({"datasets": ["MSVD"], "modalities": ["image"]}, {"datasets": []}, {"modalities": []}):
        with pytest.raises(ValueError, match=r"No dataset is both in .* and of the modalities .*\. Leave out"):
            evaluate(looks, root, tmp_path, name="looks", **nothing)
    with pytest.raises(ValueError, match="batch_tokens must be 1 or more, got 0"):
        evaluate(looks, root, tmp_path, name="looks", batch_tokens=0)
    with pytest.raises(ValueError, match=r"A function needs a name, .*: pass name"):
        evaluate(looks, root, tmp_path)
    assert not list(tmp_path.iterdir())


def test_command_line(root, tmp_path, repo, capsys):
    arguments = ["--model", repo, "--data", str(root), "--output", str(tmp_path / "out")]
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


def test_options_of_the_command_line(tmp_path, repo, bases, monkeypatch):
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


# ---------------------------------------------------------------- mteb


@pytest.fixture(scope="module")
def in_mteb(repos):
    """The model as mteb loads it, and how many of its batches held what."""
    wrapper = mteb_meta(repos["qwen3_vl"]).load_model(device="cpu")
    module, forward = wrapper.model[0], []
    module.register_forward_pre_hook(lambda _, inputs: forward.append(inputs[0]))
    return wrapper, forward


def test_metadata_for_mteb(repos, bases, monkeypatch):
    meta = mteb_meta(repos["qwen3_vl"])
    assert meta.modalities == ["text", "image", "video"] and meta.name == repos["qwen3_vl"]
    assert meta.embed_dim == 64 and meta.use_instructions and meta.similarity_fn_name == "cosine"
    with pytest.raises(ValueError, match="has no Bottleneck Tokens"):
        mteb_meta(bases["qwen3_vl"])
    asked = {}
    monkeypatch.setattr("btok_hf.evaluation.mteb._Model", lambda name, **options: asked.update(options, name=name))
    monkeypatch.setattr(
        "btok_hf.evaluation.mteb.SentenceTransformerEncoderWrapper", lambda *_, **__: SimpleNamespace()
    )
    meta = mteb_meta(repos["qwen3_vl"], revision="v1")
    assert meta.revision == "v1" and meta.load_model(device="cpu").mteb_model_meta.revision == "v1"
    assert asked == {"name": repos["qwen3_vl"], "revision": "v1", "device": "cpu"}


def test_mteb_evaluates_a_local_task_with_its_images(in_mteb):
    wrapper, forward = in_mteb
    texts, images = [f"text {row}" for row in range(6)], [image(60, 60 + 20 * row, row) for row in range(6)]
    similarity = wrapper.model.encode_query(texts) @ wrapper.model.encode_document([{"image": x} for x in images]).T
    best = similarity.argmax(1)

    class Pages(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Pages",
            type="Any2AnyRetrieval",
            description="Pages that the model finds best itself.",
            dataset={"path": "local", "revision": "1"},
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_1",
            modalities=["text", "image"],
            category="t2i",
        )

        def load_data(self, **kwargs):
            queries = Dataset.from_dict({"id": [f"q{row}" for row in range(6)], "text": texts})
            corpus = Dataset.from_dict({"id": [f"d{row}" for row in range(6)], "image": images})
            gold = {f"q{row}": {f"d{best[row]}": 1} for row in range(6)}
            split = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=gold, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    forward.clear()
    result = mteb.evaluate(wrapper, [Pages()], cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    assert scores["main_score"] == 1.0
    assert sum(len(batch["image_grid_thw"]) for batch in forward if "image_grid_thw" in batch) == len(images)


class Clips(torch.utils.data.Dataset):
    """Videos in mteb, with what it uses of torchcodec's decoder in place of the decoder, which needs FFmpeg."""

    features = ("video", "text")

    def __init__(self, frames):
        self.frames = torch.tensor(frames).permute(0, 3, 1, 2)
        self.metadata = SimpleNamespace(num_frames=len(frames))

    def get_frames_at(self, places):
        return SimpleNamespace(data=self.frames[places])

    def __len__(self):
        return 2

    def __getitem__(self, row):
        return {"video": self, "text": f"text {row}"}


def test_mteb_encodes_videos(in_mteb):
    """Eight frames of each, all of which the model sees, and the same vectors as without mteb."""
    wrapper, forward = in_mteb
    taken = [0, 2, 4, 6, 9, 11, 13, 15]
    forward.clear()
    stored = video(16)["array"]
    found = wrapper.encode(
        torch.utils.data.DataLoader(Clips(stored), batch_size=2),
        task_metadata=mteb.get_task("STS12").metadata,
        hf_split="test",
        hf_subset="default",
    )
    assert [batch["video_grid_thw"][:, 0].tolist() for batch in forward] == [[4, 4]]  # two frames each
    clip = {**video(8), "array": stored[taken]}
    expected = wrapper.model.encode([{"video": clip, "text": f"text {row}"} for row in range(2)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_mock_run_of_mteb(in_mteb):
    """Every mock task of texts, images and videos passes; those of videos only where FFmpeg's libraries are."""
    wrapper, forward = in_mteb
    forward.clear()
    results = mteb.mock_run(wrapper)
    tasks = {task.metadata.name: set(task.metadata.modalities) for task in ALL_MOCK_TASK_TEST_GRID}
    failed = {
        name: getattr(results[name], "exception", "not run")
        for name, modalities in tasks.items()
        if "audio" not in modalities and not hasattr(results[name], "scores")
    }
    assert sum("pixel_values" in batch for batch in forward) >= 15
    without_ffmpeg = {name for name, reason in failed.items() if "Could not load libtorchcodec" in reason}
    if without_ffmpeg:
        assert without_ffmpeg == {name for name, kinds in tasks.items() if "video" in kinds and "audio" not in kinds}
    else:
        grids = [batch["video_grid_thw"] for batch in forward if "video_grid_thw" in batch]
        assert len(grids) >= 7 and {int(steps) for grid in grids for steps in grid[:, 0]} == {4}
    assert set(failed) == without_ffmpeg, failed
