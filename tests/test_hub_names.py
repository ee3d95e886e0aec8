"""Ids of repositories and tokens."""

import pytest

from btok_hf.hub_names import HUB_TOKEN, is_hub_id


@pytest.mark.parametrize("source", ["org/btok-2b", "o/n", "Org_1/na.me"])
def test_ids_of_repositories(source):
    assert is_hub_id(source)


@pytest.mark.parametrize("source", ["btok-2b", "a/b/c", "./folder", "/abs/folder", "org/na me", "pairs.csv", ""])
def test_other_names(source):
    assert not is_hub_id(source)


def test_a_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/model")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert not is_hub_id("runs/model")


def test_tokens_are_found_in_texts():
    token = "hf_" + "a1B2" * 9
    assert HUB_TOKEN.sub("***", f"--token {token}.") == "--token ***."
    assert not HUB_TOKEN.search("hf_home hf_hub_download hf_transfer")
