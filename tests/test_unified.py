"""The unified benchmark: what its tasks ask, how ranks become tables. The data have a test of their own."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import ROOT
from benchmarks.unified import base, decode, inputs, mining, report, run, tasks, training_rows
from btok_hf.modeling import modeling_btok


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


def test_no_concept_of_an_unseen_name_is_in_any_training_source(found):
    """Clips are split by a hash of their own. The models of the repository saw all training clips."""
    task = found[tasks.UNSEEN]
    drawn = {row["emoji"] for row in inputs.emoji(None)["train"]}
    assert not set(task.groups) & (drawn | set(inputs.books("clips", "train")["emoji"]))
    assert len(task.queries) == 27 and len(task.candidates) == 40 + len(found["name → drawing"].candidates)
    shown = {row["emoji"]: row["names"]["en"] for row in inputs.emoji()["unseen_concepts"]}
    assert task.queries == [shown[concept] for concept in task.groups]
    assert task.groups == [list(shown)[index] for index in task.right]


def test_training_rows_have_no_clip_of_an_unseen_concept(monkeypatch, tmp_path):
    """Of what the sources hold, the clips are made, cheaply, and of the drawings nothing but their groups."""
    blank = {"bytes": b"", "path": None}
    monkeypatch.setattr(training_rows, "png", lambda image: blank)
    monkeypatch.setattr(training_rows, "draw", lambda *rest: None)
    monkeypatch.setattr(training_rows, "strip", lambda frames: None)
    monkeypatch.setattr(training_rows, "sprite_clips", lambda row, rng: [("", None)] * 8)
    monkeypatch.setattr(training_rows, "pages", lambda split: [])
    monkeypatch.setattr(training_rows, "books", lambda *rest: inputs.books(*rest) if rest[0] == "clips" else [])
    rows = training_rows.training_rows()
    unseen = {row["emoji"] for row in inputs.emoji(None)["unseen_concepts"]}
    groups = {name: {row["group"] for row in rows[name]} for name in ("names", "drawings", "clips")}
    assert all(groups.values()) and not set.union(*groups.values()) & unseen
    assert groups["clips"] == set(inputs.books("clips", "train")["emoji"]) - unseen
    # A folder that an older version made is made again.
    (tmp_path / "done").write_text("seed 0\n")
    made = {"names": [{"query": "a", "positive": "b"}]}
    monkeypatch.setattr(training_rows, "training_rows", lambda seed: made)
    training_rows.prepare(tmp_path)
    assert (tmp_path / "names.parquet").exists()
    monkeypatch.setattr(training_rows, "training_rows", lambda seed: pytest.fail("is made twice"))
    training_rows.prepare(tmp_path)


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
    assert np.isinf(report.over_seeds([1.0]))
    # Intervals over queries are those of the mean of independent values.
    values = {name: rng.normal(size=len(task.queries)) for name, task in found.items() if name == "term → definition"}
    width, by_task = report.over_queries(values, found, rng)
    groups = len(set(found["term → definition"].groups))
    assert by_task["term → definition"] == width
    assert 1.5 / len(next(iter(values.values()))) ** 0.5 < width < 3 / groups**0.5


def test_a_group_is_drawn_for_all_tasks_at_once():
    """The mean of two tasks with the same groups varies as one of them does; of others, as independent values do."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    names = [str(number) for number in range(200)]

    def task(groups):
        return tasks.Task("", names, names, list(range(200)), groups)

    shared = {"one": task(names), "two": task(names)}
    width, by_task = report.over_queries({"one": values, "two": values}, shared, rng)
    assert by_task["one"] == by_task["two"] == pytest.approx(width)
    opposite, _ = report.over_queries({"one": values, "two": -values}, shared, rng)
    assert opposite == pytest.approx(0, abs=1e-9)
    apart = {"one": task(names), "two": task([f"other {name}" for name in names])}
    width, by_task = report.over_queries({"one": values, "two": values}, apart, rng)
    assert width == pytest.approx(by_task["one"] / 2**0.5, rel=0.1)
    # Values of one group are drawn together: pairs of equal values are as good as half as many.
    pairs = {"one": task([str(number // 2) for number in range(200)])}
    twice, _ = report.over_queries({"one": np.repeat(values[:100], 2)}, pairs, rng)
    assert twice == pytest.approx(1.96 * values[:100].std() / 10, rel=0.1)


def test_seeds_are_counted_by_the_power_of_the_test_that_the_intervals_are():
    rng = np.random.default_rng(0)
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's

    def shown(spread, seeds):
        """How often the interval lies beyond 0."""
        samples = rng.normal(2, spread, (20_000, seeds))
        return np.mean(samples.mean(1) > quantile[seeds] * samples.std(1, ddof=1) / seeds**0.5)

    for spread, seeds in ((1.0, 5), (0.5, 3), (0.17, 2), (0.18, 3)):
        assert report.seeds_for(2, spread) == seeds
        assert shown(spread, seeds) > 0.79
        assert seeds == 2 or shown(spread, seeds - 1) < 0.81
    # scipy has no value for some of these, where the power is 1.
    assert [report.seeds_for(2, spread) for spread in (0.0, 1e-9, 1e-3, 0.01, 0.1)] == [2] * 5


def test_ranks_of_other_queries_are_refused(found, tmp_path, monkeypatch):
    """Results of an older version had 40 ranks of the task that has 27 queries now."""
    with pytest.raises(ValueError, match=r"unseen concept → drawing has 27 queries, and a result has 40 ranks: "):
        tasks.score(found[tasks.UNSEEN], [1] * 40)
    stored = sorted((run.UNIFIED).rglob("*.json"))
    assert len(stored) > 40
    for path in stored:
        result = json.loads(path.read_text())
        ranks = result.get("ranks", result)  # of the start of mining.py, ranks alone
        for part in ranks.values() if str(next(iter(ranks))).isdigit() else [ranks]:
            assert all(len(tasks.score(found[name], values)) for name, values in part.items()), path
    (tmp_path / "start.json").write_text(json.dumps({name: [1] * 40 for name in found}))
    monkeypatch.setattr(mining, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="is of another version of the task"):
        mining.report()


def test_chance_and_baselines(found):
    assert tasks.chance(found[tasks.MOTION]) == 50
    assert tasks.chance(tasks.Task("", ["a"], ["b", "c"], [0], ["a"])) == pytest.approx(75)
    task = tasks.Task("", ["apple pie", "old ship"], ["the ship sails", "a pie of apple"], [1, 0], [0, 1])
    assert report.baseline(task) is None
    task.baseline = (task.queries, task.candidates)
    assert report.baseline(task).tolist() == [1, 1]
    artists = found["drawing → other artist's"]
    assert tasks.score(artists, report.baseline(artists)).mean() > 3 * tasks.chance(artists)


def test_the_model_of_the_examples_is_what_was_exported():
    from btok_hf import verify

    assert verify(run.MODELS / "btok-small") < 1e-4
    for name in modeling_btok.FILES:
        remote = (run.MODELS / "btok-small" / name).read_text("utf-8")
        assert remote == (ROOT / "modeling" / name).read_text("utf-8"), f"copy modeling/{name} there"
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
