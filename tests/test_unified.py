"""The unified benchmark: what its tasks ask, how ranks become tables. The data have a test of their own."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import ROOT
from benchmarks.unified import base, decode, inputs, report, run, tasks


@pytest.fixture(scope="module")
def found():
    return tasks.tasks()


def test_every_query_has_a_right_answer_that_differs_from_the_others(found):
    for task in found.values():
        assert len(task.queries) == len(task.right) == len(task.groups)
        assert min(task.right) >= 0 and max(task.right) < len(task.candidates)
        assert all(isinstance(query, str) for query in task.queries) or task.name.startswith(("drawing", "figure"))
        if isinstance(task.candidates[0], str):
            assert len(set(task.candidates)) == len(task.candidates), task.name
        if isinstance(task.queries[0], str):
            assert len(set(zip(task.queries, task.right))) == len(set(task.queries)), task.name


def test_the_motion_task_differs_by_the_order_of_frames_alone(found):
    task = found[tasks.MOTION]
    arrays = [candidate["video"]["array"] for candidate in task.candidates]
    for index, (right, other) in enumerate(task.choices):
        assert right == task.right[index] == index
        assert np.abs(arrays[right][::-1].astype(int) - arrays[other]).max() <= 1, task.queries[index]
        assert task.queries[index] != task.queries[other]
        assert not np.array_equal(arrays[right], arrays[other])


def test_a_page_shows_its_title_and_text_on_the_grid(found):
    page = found["title → page"].candidates[0]
    assert page.size == (196, 224)
    assert inputs.wrap("a bb ccc " * 20 + "d" * 60, 99)[-1] == "d" * (60 - 2 * inputs.COLUMNS)
    assert max(map(len, inputs.wrap("word " * 100 + "x" * 70, 99))) <= inputs.COLUMNS
    ink = np.asarray(inputs.page("Ab", "cd")) < 128
    rows = [bool(ink[row * 14 : (row + 1) * 14].any()) for row in range(2 * inputs.LINES)]
    assert rows == [True, False, True] + [False] * 13
    assert not ink[:, 2 * 7 :].any()  # two characters wide


def test_nothing_of_a_task_is_trained_on(found):
    """Drawings, clips, modules, definitions and captions of the tasks are in no training row."""
    drawings = {(row["emoji"], row["artist"]) for row in inputs.emoji()["train"]}
    assert not drawings & {(row["emoji"], row["artist"]) for row in inputs.emoji()["unseen_drawings"]}
    concepts = {emoji for emoji, _ in drawings}
    assert not concepts & {row["emoji"] for row in inputs.emoji()["unseen_concepts"]}
    assert {row["emoji"] for row in inputs.emoji()["unseen_drawings"]} <= concepts
    for config in ("modules", "glossary", "figures", "questions"):
        train, test = (inputs.books(config, split) for split in ("train", "test"))
        assert not set(train["book"]) & set(test["book"])
    assert not set(inputs.books("clips", "train")["emoji"]) & set(inputs.books("clips", "test")["emoji"])


def test_ranks_are_pessimistic_in_ties_and_keep_to_the_choices():
    scores = torch.tensor([[0.9, 0.5, 0.5], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]])
    assert run.positions(scores, [0, 0, 0]) == [1, 3, 3]
    assert run.positions(scores, [1, 2, 0]) == [3, 1, 3]
    assert run.positions(scores, [0, 0, 2], [(0, 1), (0, 1), (2, 0)]) == [1, 2, 2]


def test_the_base_is_trained_on_target_tokens_alone(tmp_path):
    from support.tiny import build

    from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens

    repo = add_bottleneck_tokens(build("qwen2_vl", tmp_path / "base"), tmp_path / "repo", num_tokens=0)
    model = BTokSentenceTransformer(repo, device="cpu")
    losses = []
    for temperature in (0.05, 1.0):  # of an InfoNCE that must not count
        loss = base.Generation(model, temperature=temperature, condensation_weight=1.0, condensation_mask=False)
        ids = torch.arange(5, 11).view(2, 1, 3)
        features = [model.preprocess([text, "b"]) for text in ("a", "c")]
        features[0] |= {"target_ids": ids, "target_labels": ids}
        value = loss(features)
        value.backward()
        losses.append(value.item())
        assert value.item() == pytest.approx(loss.condensation.item(), rel=1e-5)
    assert losses[0] == losses[1]


def test_tables_report_means_and_paired_differences(found, tmp_path, monkeypatch):
    """Two arms whose ranks differ in a known way, in two seeds."""
    monkeypatch.setattr(report, "UNIFIED", tmp_path)
    rng = np.random.default_rng(0)
    for arm in ("last-token", "btok"):
        for seed in (0, 1):
            ranks = {}
            for name, task in found.items():
                better = arm == "btok" and name != tasks.MOTION
                ranks[name] = [1 if better else 2] * len(task.queries)
                if seed == 1 and arm == "btok" and name == tasks.MOTION:
                    ranks[name] = [1] * len(task.queries)
            result = {"arm": arm, "seed": seed, "ranks": {"0": ranks, "4": ranks}, "train_minutes": 1.0, "losses": []}
            (tmp_path / "small").mkdir(exist_ok=True)
            (tmp_path / "small" / f"{arm}-s{seed}.json").write_text(json.dumps(result))
    text = report.arm_table("arms", report.load("small"))
    share = 1 / len(found)
    low, gains = 50 * (1 - share), [50 * (1 - share), 50 * (1 - share) + 100 * share]
    assert f"**{low:.2f}**" in text
    assert "| without motion, and by seed | | | | 50.00: 50.00, 50.00 | 100.00: 100.00, 100.00 |" in text
    assert "| motion by seed | | | | 0.0, 0.0 | 0.0, 100.0 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| BToks − last token"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == f"{np.mean(gains):+.2f}"
    assert float(cells[1]) == pytest.approx(12.706 * np.std(gains, ddof=1) / 2**0.5, abs=0.01)  # Student's t, 1 d.o.f.
    assert float(cells[2]) == 0  # every query gains alike
    assert report.seeds_for(2, 1.0) == 3 and np.isinf(report.over_seeds([1.0]))
    # Intervals over queries are those of the mean of independent values.
    values = {name: rng.normal(size=len(task.queries)) for name, task in found.items() if name == "term → definition"}
    width, by_task = report.over_queries(values, rng)
    groups = len(set(found["term → definition"].groups))
    assert by_task["term → definition"] == width
    assert 1.5 / len(next(iter(values.values()))) ** 0.5 < width < 3 / groups**0.5


def test_chance_and_baselines(found):
    assert tasks.chance(found[tasks.MOTION]) == 50
    assert tasks.chance(tasks.Task("", ["a"], ["b", "c"], [0], ["a"])) == pytest.approx(75)
    task = tasks.Task("", ["apple pie", "old ship"], ["the ship sails", "a pie of apple"], [1, 0], [0, 1])
    assert report.baseline(task) is None
    task.baseline = (task.queries, task.candidates)
    assert report.baseline(task).tolist() == [1, 1]
    artists = found["drawing → other artist's"]
    assert tasks.score(artists.name, report.baseline(artists)).mean() > 3 * tasks.chance(artists)


def test_the_model_of_the_examples_is_what_was_exported():
    from btok_hf import verify

    assert verify(run.MODELS / "btok-small") < 1e-4
    remote = (run.MODELS / "btok-small" / "modeling_btok.py").read_text("utf-8")
    assert remote == (ROOT / "modeling" / "modeling_btok.py").read_text("utf-8"), (
        "copy modeling/modeling_btok.py there"
    )
    config = json.loads((run.MODELS / "btok-small" / "config.json").read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(run.MODELS / "btok-small")
    assert config["btok_turn_token_id"] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_decoded_texts_are_measured_by_their_words():
    right = ["cat: animal, pet", "Dog: animal", "car: road"]
    found = decode.measures(["cat: road", "a dog", ""], right)
    # Words: cat of {cat, road}; dog of {a, dog}; none.
    assert found["the right name"] == "33.3 %" and found["words that are right"] == "33.3 %"
    # Of the six other pairs only "cat: road" and the car share a word, one of two.
    assert found["words that are another input's"] == "8.3 %" and found["different texts"] == "3"
