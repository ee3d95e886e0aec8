"""Reports of MMEB-V2: the published averages, tables, pictures and entries."""

import json
import re
from pathlib import Path

import pytest
import yaml

from btok_hf.evaluation import report
from btok_hf.evaluation.metrics import METRICS
from btok_hf.evaluation.tasks import TASKS

PUBLISHED = json.loads(Path(__file__).with_name("support").joinpath("mmeb_published.json").read_text("utf-8"))


def published(model):
    """Published scores of a model, as `evaluate` returns scores."""
    column = PUBLISHED["models"].index(model)
    return {
        name: {**dict.fromkeys((f"{metric}@{k}" for metric in METRICS for k in (1, 5, 10)), 0.0)}
        | {TASKS[name].metric: values[column], **dict.fromkeys(("num_pred", "num_data"), PUBLISHED["queries"][name])}
        for name, values in PUBLISHED["scores"].items()
    }


@pytest.mark.parametrize("model", PUBLISHED["models"])
def test_published_averages_to_the_printed_digit(model):
    summary = report.summarise(published(model))
    ours = [*summary.modalities.values(), summary.overall]
    assert summary.missing == []
    for value, printed in zip(ours, PUBLISHED["printed"][model]):
        assert printed is None or f"{100 * value:.1f}" == str(printed)


def test_numbers_of_queries_are_those_of_the_published_scores():
    assert {name: task.queries for name, task in TASKS.items()} == PUBLISHED["queries"]
    scores = published("Qwen3-VL-Embedding-8B")
    whole, entry = report.markdown(scores, name="a"), report.eval_results(scores, task_id="overall")
    picture = report.picture(scores, name="a")
    assert report.other_counts(scores) == {} and "instead of" not in whole + entry and "comparable" not in whole
    for name, count in {"MSVD": 669, "NExTQA": 8565}.items():
        scores[name]["num_data"] = count
    found = {"MSVD": "669 queries instead of 670", "NExTQA": "8,565 queries instead of 8,564"}
    assert report.other_counts(scores) == report.other_counts({name: scores[name] for name in found}) == found
    text = report.markdown(scores, name="a")
    assert "not comparable with them:\n\n- NExTQA: 8,565 queries instead of 8,564\n- MSVD: 669 queries" in text
    (entry,) = yaml.safe_load(report.eval_results(scores, task_id="overall"))
    assert entry["notes"].endswith("; NExTQA has 8,565 queries instead of 8,564; MSVD has 669 queries instead of 670")
    assert report.picture(scores, name="a") != picture
    scores["QVHighlight"]["num_candidates"] = 10.0
    assert "QVHighlight" not in report.other_counts(scores)
    scores["QVHighlight"]["num_candidates"] = 9.75
    text = report.markdown(scores, name="a")
    assert "- QVHighlight: 9.75 candidates per query instead of 10\n" in text
    # In a limited run all datasets have fewer queries, which the top of the report says.
    assert "instead of" not in report.markdown(scores, name="a", limit=669)


def test_baselines_are_those_of_the_published_scores():
    for name, model in (
        ("VLM2Vec-V2 (2B)", "VLM2Vec-V2.0-Qwen2VL-2B v2.0.0"),
        ("Qwen3-VL-Embedding-8B", "Qwen3-VL-Embedding-8B"),
    ):
        assert list(report.PUBLISHED[name][1:]) == PUBLISHED["printed"][model]
    for _, image, video, visdoc, overall in report.PUBLISHED.values():  # rounded
        assert overall == pytest.approx((36 * image + 18 * video + 24 * visdoc) / 78, abs=0.1)


def test_no_average_over_a_part():
    scores = published("colpali-v1.3 v2.0.1")
    del scores["MSVD"]
    summary = report.summarise(scores)
    assert summary.overall is None and summary.missing == ["MSVD"]
    assert [name for name, value in {**summary.meta_tasks, **summary.modalities}.items() if value is None] == [
        "V-RET",
        "video",
    ]
    text = report.markdown(scores, name="colpali", errors={"MSVD": "MSVD: no folder"})
    assert re.search(r"^\| Overall +\| +\| 77 of 78 \| — +\|$", text, re.M)
    assert re.search(r"^\| Image +\| hit@1 +\| 36 of 36 \| 34.9 +\|$", text, re.M)
    assert re.search(r"^\| Video +\| hit@1 +\| 17 of 18 \| — +\|$", text, re.M)
    assert "- MSVD: no folder" in text and "Groups with a missing dataset have no average." in text
    del scores["OVEN"]
    text = report.markdown({}, name="none")
    assert "- V-RET: all" in text and "| 0 of 78 " in text
    assert "- I-RET: OVEN\n- V-RET: MSVD" in report.markdown(scores, name="colpali")
    with pytest.raises(ValueError, match="no overall score to report without OVEN, MSVD"):
        report.eval_results(scores, dataset_id="org/data", task_id="overall")


def test_unknown_datasets_are_refused():
    with pytest.raises(ValueError, match="MomentSeeker_1k8: not in MMEB-V2"):
        report.summarise({"MomentSeeker_1k8": {"hit@1": 1.0}})


def test_leaderboard_file():
    scores = published("Qwen3-VL-Embedding-8B")
    content = report.leaderboard(scores, {"model_name": "btok-2b", "model_size": 2.21})
    assert list(content) == ["metadata", "metrics"] and list(content["metrics"]) == ["image", "video", "visdoc"]
    assert content["metadata"].pop("report_generated_date")
    assert content["metadata"] == {
        "model_name": "btok-2b",
        "model_backbone": None,
        "model_size": 2.21,
        "embedding_dimension": None,
        "max_length_tokens": None,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
    }
    pages = content["metrics"]["visdoc"]
    assert [name for name in pages if name not in TASKS] == ["ViDoSeek-page-fixed", "MMLongBench-page-fixed"]
    assert pages["ViDoSeek-page-fixed"] == scores["ViDoSeek-page"] and len(pages["ViDoSeek-doc"]) == 26
    # The leaderboard averages the datasets that it finds, so incomplete modalities are left out.
    del scores["MSVD"]
    assert list(report.leaderboard(scores, {"model_name": "btok-2b"})["metrics"]) == ["image", "visdoc"]
    with pytest.raises(ValueError, match="No modality has all its datasets"):
        report.leaderboard({"MSVD": {"hit@1": 1.0}}, {"model_name": "btok-2b"})


def test_tables_hold_every_score_and_can_be_read_on_a_screen():
    scores = published("VLM2Vec-V2.0-Qwen2VL-2B v2.0.0")
    text = report.markdown(scores, name="VLM2Vec-V2")
    for line in ("| I-CLS ", "| VD-OOD ", "| Overall ", *(f"| {name} " for name in TASKS)):
        assert sum(row.startswith(line) for row in text.splitlines()) == 1, line
    assert re.search(r"\| Overall +\| +\| 78 of 78 \| 58.0 ", text)
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({len(line) for line in table.strip().splitlines()}) == 1
    assert "corrected pages" in text and "Failed" not in text and "Not evaluated" not in text
    assert "Only the first 5 queries" in report.markdown(scores, name="VLM2Vec-V2", limit=5)


def test_picture_of_what_is_complete():
    scores = published("Qwen3-VL-Embedding-8B")
    whole = report.picture(scores, name="btok-2b")
    images = report.picture({n: s for n, s in scores.items() if TASKS[n].modality == "image"}, name="btok-2b")
    assert whole.startswith(b"\x89PNG") and len(images) < len(whole)
    with pytest.raises(ValueError, match="no average to draw"):
        report.picture({"MSVD": scores["MSVD"]}, name="btok-2b")


def test_what_the_picture_shows(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    scores = published("Qwen3-VL-Embedding-8B")
    for name, task in TASKS.items():  # an average of zero is one, too
        scores[name][task.metric] *= task.modality != "video"
    del scores["OVEN"]
    report.picture(scores, name="btok-2b")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["Video", "VisDoc"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    stars = [f"{model}*" if data == "v2.0.0" else model for model, (data, *_) in report.PUBLISHED.items()]
    assert labels == [*stars, "btok-2b"] and labels[0] == "ColPali-1.3*" and labels[6] == "Qwen3-VL-Embedding-8B"
    for axes, column, ours in zip(figure.axes, (2, 3), (0, 82.36)):
        widths = [bar.get_width() for bar in axes.patches]
        assert widths == pytest.approx([*(row[column] for row in report.PUBLISHED.values()), ours], abs=0.005)
        assert axes.yaxis_inverted()  # from top to bottom


def test_entry_of_eval_results():
    text = report.eval_results(published("Qwen3-VL-Embedding-8B"), dataset_id="org/data", task_id="overall")
    (entry,) = yaml.safe_load(text)
    assert entry["dataset"] == {"id": "org/data", "task_id": "overall"} and entry["value"] == 77.82
