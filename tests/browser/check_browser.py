"""The page of `btok app` in Chromium. Run by `make test-browser`; pytest does not collect it by its name.

The pictures of the page are in `runs/browser`, to look at.
"""

import json
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest
from support import ROOT
from support.app import page
from support.corpus import pdf

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
FILES = ROOT / "examples" / "files"
HOSTILE = "<script>alert(1)</script> ${alert(2)} `${alert(3)}` {{#if x}} a tiger face"
QUOTED = "clip #1 100%41.mp4"
NAME = '"><img src=x onerror=alert(4)>`${alert(5)}'


def write_unplayable(path):
    """A clip in a format that browsers do not play."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.height, stream.width, stream.pix_fmt = 56, 56, "yuv420p"
        for shade in range(0, 240, 40):
            frame = av.VideoFrame.from_ndarray(np.full((56, 56, 3), shade, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What `drive.mjs` saw on a page of 308 items, among them hostile ones."""
    folder, shots = tmp_path_factory.mktemp("browser"), ROOT / "runs" / "browser"
    shots.mkdir(parents=True, exist_ok=True)
    (folder / "uploads").mkdir()

    def python(*words):
        subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True)

    python("examples.space.prepare", folder / "space", "--model", MODEL)
    files = folder / "space" / "files"
    (files / "hostile.txt").write_text(HOSTILE)
    (files / f"{NAME}.txt").write_text("tiger face")
    shutil.copy(FILES / "tiger-face.png", files / f"{NAME}.png")
    shutil.copy(FILES / "turtle.png", files)
    shutil.copy(FILES / "butterfly.mp4", files / QUOTED)
    shutil.copy(FILES / "crab.png", files / "cr\rlf.png")
    write_unplayable(files / "old.avi")
    (files / "broken.pdf").write_bytes(pdf("a page"))
    python("btok_hf", "embed", files, folder / "embedded", "--model", MODEL, "--device", "cpu")
    python("btok_hf", "index", folder / "embedded", "--db", folder / "db")
    (files / "broken.pdf").write_bytes(b"no longer a PDF")
    command = ("-m", "btok_hf", "app", "--db", folder / "db", "--device", "cpu", "--port", "PORT")
    with page(command, folder / "uploads") as client:
        words = ["node", "drive.mjs", client.src.rstrip("/"), FILES / "turtle.png", FILES / "octopus.mp4", shots]
        run = subprocess.run(words, cwd=ROOT / "tests" / "browser", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    times = {name: value["ms"] for name, value in seen.items() if isinstance(value, dict) and "ms" in value}
    print(f"ready after {seen['ready']} ms; milliseconds of actions: {times}")
    return seen


def test_nothing_comes_from_elsewhere_and_nothing_fails(seen):
    assert seen["outside"] == [] and seen["errors"] == []


def test_every_control_and_picture_has_a_name(seen):
    assert {name: seen[name] for name in seen if name.startswith("nameless") and seen[name]} == {}


def test_typing_and_enter_search(seen):
    assert seen["typed"]["ids"][0] == f"{NAME}.txt" and len(seen["typed"]["ids"]) == 24
    assert seen["images"]["ids"][0] == f"{NAME}.png"


def test_a_hit_is_shown_large_with_its_neighbours_and_a_guess(seen):
    assert NAME in seen["large"] and seen["largeImage"] == 56
    assert "A guess of the model" in seen["why"]["text"]
    assert seen["more"]["ids"][0] == f"{NAME}.png" and not seen["afterMore"] and seen["back"]


def test_clips_play_and_pages_are_drawn(seen):
    assert seen["clips"]["ids"] and all(name.endswith(".mp4") for name in seen["clips"]["ids"])
    assert seen["plays"]["width"] == 56 and seen["plays"]["now"] > 0 and not seen["plays"].get("error")
    assert all("#page=" in name for name in seen["pages"]["ids"]) and seen["pageImage"] == 1400


def test_files_that_are_hard_to_show(seen):
    assert seen["quoted"] == 56 and seen["carriage"].split() == ["cr", "lf.png"]
    assert "This browser cannot play the clip. Save it" in seen["unplayable"]
    assert "The original cannot be shown: 'broken.pdf' cannot be read" in seen["broken"] and "page" in seen["broken"]


def test_the_last_search_and_card_count(seen):
    card, last = seen["card"], seen["last"]
    assert card["pressed"] == card["second"] != card["first"]
    assert last["ids"] == seen["pizza"]["ids"] != seen["octopus"]["ids"] and not last["panel"]


def test_narrow_windows_show_what_was_asked_for(seen):
    assert {name: seen["narrow"][name] for name in ("summary", "hit", "back")} == dict.fromkeys(
        ("summary", "hit", "back"), True
    )


def test_uploads_find_themselves(seen):
    assert seen["picture"]["ids"][0] == "turtle.png" and seen["picture and text"]["ids"] != seen["picture"]["ids"]
    assert len(seen["clip"]["ids"]) == 24 and not seen["trims"]


def test_refusals_are_said_and_hostile_input_is_text(seen):
    assert "nothing to search for" in seen["empty"]
    assert all("cannot be used" in seen[f"where {name}"] for name in ("drop", "html", "open"))
    assert "<img src=x onerror=alert(1)>" in seen["where html"] and "The filter '((('" in seen["where open"]
    assert len([name for name in seen if name.startswith("typed ")]) == 5
