"""Mixtures: datasets, weights and sides to generate."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from support.source_tree import mmeb

from btok_hf.training.mixture import condense_of, load_mixture, read_mixture
from btok_hf.training.sources import SOURCES

pytestmark = pytest.mark.usefixtures("own_cache")


RECIPE = Path(__file__).resolve().parents[1] / "training" / "recipes" / "mixture_paper.yaml"


def test_a_mixture_of_own_files_and_sources(tmp_path, monkeypatch):
    mmeb(tmp_path, "CIRR", [("a", "", "b", "")])
    (tmp_path / "pairs.jsonl").write_text('{"query": "x", "positive": "y"}\n')
    mine = str(tmp_path / "pairs.jsonl")
    loaded, weights, condense, _ = load_mixture(
        {
            "mine": {"file": mine, "weight": 3, "condense": "query"},
            "CIRR": {"weight": 0.5},
            "again": {"file": "CIRR", "weight": 1, "condense": "positive"},
        },
        tmp_path,
    )
    assert {name: len(dataset) for name, dataset in loaded.items()} == {"mine": 1, "CIRR": 1, "again": 1}
    assert weights == {"mine": 3, "CIRR": 0.5, "again": 1}
    assert condense == {"mine": "query", "CIRR": "none", "again": "positive"}
    for entries in (mine, {"pairs": mine}, {"pairs": {"file": mine}}):
        loaded, weights, condense, _ = load_mixture(entries)
        assert list(loaded) == ["pairs"] and weights is None and condense == {}
    monkeypatch.chdir(tmp_path)  # a folder that needs no name has one
    assert [read_mixture(name) for name in (".", "../a/", "org/b")] == [
        {tmp_path.name: "."},
        {"a": "../a/"},
        {"b": "org/b"},
    ]
    assert load_mixture({"CIRR": None}, tmp_path)[0]["CIRR"][0]["query"] == {"text": "a"}
    for entries, message in (
        ({"a": {"file": mine, "weight": 1}, "CIRR": {}}, "but CIRR have none. Give all"),
        ({"a": {"file": "org/pairs", "revision": 12}}, "'a': revision must be a text, got 12. Put it in quotation"),
        ({"a": {"file": mine, "wieght": 1}}, r"'a' has unknown keys \['wieght'\]"),
        ({"a": {"file": mine, "condense": "postive"}}, "'a': condense must be one of positive, query"),
        ({"ImageNet": {"weight": 1}}, r"'ImageNet' is not a pair file, .* or known source. Known .* ImageNet_1K"),
    ):
        with pytest.raises(ValueError, match=message):
            load_mixture(entries, tmp_path)


def test_names_that_stand_twice_are_refused(tmp_path):
    """The first of the two would be left out of the training without a word."""
    path = tmp_path / "mixture.yaml"
    for text, twice in (
        ("a: x.jsonl\nb: y.jsonl\na: z.jsonl\n", "'a'"),
        ("a:\n  file: x.jsonl\n  weight: 1\n  weight: 2\n", "'weight'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"has {twice} twice in one mapping"):
            read_mixture(str(path))
    with pytest.raises(ValueError, match="has 'a' twice in one mapping"):
        read_mixture('{"a": "x.jsonl", "a": "z.jsonl"}')
    path.write_text("x: &same {weight: 1, condense: query}\ny:\n  <<: *same\n  weight: 2\n")
    assert read_mixture(str(path))["y"] == {"weight": 2, "condense": "query"}
    path.write_text("base: &b {weight: 1}\na:\n  inner: &s {<<: *b, weight: 2}\nc: {<<: *s}\n")
    assert read_mixture(str(path))["c"] == {"weight": 2}
    path.write_text("{{name}}: x.jsonl\n")  # a template that was not filled in
    with pytest.raises(ValueError, match="is not YAML"):
        read_mixture(str(path))


def test_a_wrong_file_is_named_before_the_first_is_loaded(tmp_path, monkeypatch):
    Dataset.from_list([{"query": "a", "positive": "b"}]).to_json(tmp_path / "mine.jsonl")
    (tmp_path / "empty.csv").touch()
    monkeypatch.setattr("btok_hf.training.mixture.load_pairs", lambda *given, **more: pytest.fail("loaded"))
    for wrong, message in (
        ("missing.csv", r"'.*missing\.csv' does not exist"),
        ("empty.csv", "is empty"),
        ("mine.jsonl", "has no split: only datasets have"),
    ):
        entries = {"a": str(tmp_path / "mine.jsonl"), "b": {"file": str(tmp_path / wrong)}}
        if wrong == "mine.jsonl":
            entries["b"]["split"] = "train"
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            load_mixture(entries)


def test_the_recipe_is_the_papers_mixture():
    recipe = yaml.safe_load(RECIPE.read_text())
    weights = {name: entry["weight"] for name, entry in recipe.items()}
    assert set(weights) == set(SOURCES) and len(weights) == 25
    assert all(set(entry) == {"weight"} for entry in recipe.values())
    assert Counter(weights.values()) == {0.5: 10, 1: 10, 5: 3, 10: 1, 12: 1}
    assert Counter(source.condense for source in SOURCES.values()) == {
        "positive": 16,
        "query": 6,
        "none": 2,
        "both": 1,
    }


def test_a_condense_that_was_chosen_is_not_overridden_by_sources():
    own = {"a": "query"}
    assert condense_of(["a", "b"], "positive", own) == {"a": "query", "b": "positive"}
    assert condense_of(["a", "b"], "none", own) == {"a": "none", "b": "none"}
    assert condense_of(["a", "b"], {"a": "both", "b": "none"}, own) == {"a": "both", "b": "none"}
    with pytest.raises(ValueError, match="condense names c, but the datasets are a, b"):
        condense_of(["a", "b"], {"c": "both"}, own)


def test_entries_choose_a_part_of_a_dataset(tmp_path):
    for name, word in (("en", "a"), ("de", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = {"anchor": [word] * 4, "positive": ["x"] * 4}
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / name / "test.parquet")
    card = "configs:\n- {config_name: en, data_dir: en}\n- {config_name: de, data_dir: de}\n"
    (tmp_path / "data" / "README.md").write_text(f"---\n{card}---\n")
    part = {"name": "de", "split": "test[:3]", "columns": {"query": "anchor", "positive": "positive"}}
    entry = {"file": str(tmp_path / "data"), "weight": 1, **part}
    loaded, weights, _, sources = load_mixture({"mine": entry})
    assert loaded["mine"].to_dict() == {"query": ["b"] * 3, "positive": ["x"] * 3}
    assert weights == {"mine": 1} and sources == {"mine": entry["file"]}
    with pytest.raises(ValueError, match="'CIRR' is the source 'CIRR', which has no split: its format is known"):
        load_mixture({"CIRR": {"split": "train"}}, tmp_path)
