"""The Space of `examples/space` starts from nothing and finds its files."""

import re
import shutil

import pytest
import yaml
from support import ROOT, forks
from support.app import page
from support.repositories import contents

from examples import search

SPACE = ROOT / "examples" / "space"


def test_the_space_is_described_as_the_hub_wants_it():
    about = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---\n")[1])
    assert about["sdk"] == "gradio" and (SPACE / about["app_file"]).is_file() and len(about["short_description"]) <= 60
    import gradio

    assert about["sdk_version"] == gradio.__version__
    assert "btok-hf[app,video]" in (SPACE / "requirements.txt").read_text()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    command = ["-m", "examples.space.prepare", folder / "space", "--each", "8", "--model", search.SMALL]
    (folder / "space" / "model").mkdir(parents=True)
    (folder / "space" / "model" / "model-00001-of-00002.safetensors").touch()  # of an earlier model
    forks.run(*command, cwd=ROOT, check=True)
    (folder / "uploads").mkdir()
    return folder


def test_it_starts_and_finds(space):
    written = contents(space / "space").keys()
    assert "model/model-00001-of-00002.safetensors" not in written
    with page([space / "space" / "app.py"], space / "uploads", HF_HOME=str(space / "cache")) as client:
        html, summary = client.predict("a definition", None, None, ["text"], "", False, 24, api_name="/search")[:2]
        assert "8 of 32 items" in summary and len(re.findall("data-id=", html)) == 8
        for kind, count in (("image", 8), ("video", 8), ("page", 8)):
            assert f"{count} of" in client.predict("x", None, None, [kind], "", False, 24, api_name="/search")[1]
    assert "LICENSES-emoji.md" in written
    # The folder is what `hf upload` takes: it starts elsewhere as well.
    assert contents(space / "space").keys() == written
    shutil.copytree(space / "space", space / "elsewhere")
    with page([space / "elsewhere" / "app.py"], space / "uploads", HF_HOME=str(space / "cache")) as client:
        assert "8 of" in client.predict("x", None, None, ["page"], "", False, 24, api_name="/search")[1]
