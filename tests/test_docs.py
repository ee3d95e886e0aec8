"""Documentation: Python blocks run, commands and files exist, links lead somewhere, README's numbers are in docs/.

The log of experiments and the changelog tell of the past and are not checked.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from btok_hf import cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "experiments.md", ROOT / "docs" / "changelog.md"})
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in (README, ROOT / "CONTRIBUTING.md", *DOCS)
}
# What the blocks name that a test has no Hub and no hours for.
REPLACED = {
    "max_steps=1000": "max_steps=1, use_cpu=True",
    'push("btok-mine", "org/btok-mine", private=True)': "",  # tests/test_hub.py pushes, to a local server
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.S | re.M)


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, repo, bases, tmp_path, monkeypatch):
    """In order, with one namespace and one folder for a page."""
    monkeypatch.chdir(tmp_path)
    Path("benchmarks").symlink_to(ROOT / "benchmarks")  # what blocks read from the checkout
    for name in ("photo.png", "page1.png", "page2.png"):
        _image().save(name)
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(_image().resize((64, 64)))))
        container.mux(stream.encode())
    Path("pairs.jsonl").write_text("".join(f'{{"query": "q {i}", "positive": "p {i}"}}\n' for i in range(8)))
    names = {"__name__": "docs"}
    replaced = REPLACED | {"org/btok-2b": repo, "Qwen/Qwen2-VL-2B-Instruct": bases["qwen2_vl"]}
    for number, block in enumerate(blocks(page, "python"), 1):
        for written, ours in replaced.items():
            block = block.replace(written, ours)
        exec(compile(block, f"{page}, block {number}", "exec"), names)
        if "# tensor(" in block:
            printed = [float(value) for value in re.findall(r"-?\d\.\d+", block.partition("# tensor(")[2])]
            given = names["model"].similarity(names["queries"], names["documents"])
            assert torch.allclose(given.flatten(), torch.tensor(printed), atol=2e-3)
    if "trainer.export(" in PAGES[page] and "trainer" in names:
        assert Path("btok-mine", "modules.json").is_file() and Path("btok-mine", "model.safetensors").is_file()


def _image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))


# ---------------------------------------------------------------- commands


def commands(page):
    """The commands of a page's blocks, complete, and of its text, where arguments may be missing."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\.venv/bin/)?(btok|python|accelerate|make)\s", line):
                yield True, shlex.split(line.replace(".venv/bin/", ""), comments=True)
    for line in re.findall(r"`((?:btok|python|accelerate|make|pytest) [^`]+)`", PAGES[page]):
        if "COMMAND" not in line:
            yield False, shlex.split(line.replace("…", ""))


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands(page)]])
def test_commands_exist(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for complete, words in commands(page):
        try:
            _check_command(words, complete, monkeypatch, capsys)
        except (AssertionError, SystemExit) as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error} {capsys.readouterr().err}") from error


def _check_command(words, complete, monkeypatch, capsys):
    program, *words = words
    if program == "accelerate":
        assert words.pop(0) == "launch"
        if words[0] == "--config_file":
            assert Path(words[1]).is_file()
            words = words[2:]
        program = "python"
    if program == "python" and words[:2] == ["-m", "btok_hf"]:
        program, words = "btok", words[2:]
    if program == "python" and words[:2] == ["-m", "pytest"]:
        program, words = "pytest", words[2:]
    if program == "make":
        assert re.search(rf"^{words[0]}:", Path("Makefile").read_text("utf-8"), flags=re.M), "no such target"
    elif program == "pytest":
        assert all(Path(word).exists() for word in words if word.startswith("tests/")), "no such test"
    elif program == "btok":
        if not words:
            return
        if words[0] == "train":
            _check_training_flags(words[1:])
        elif complete:
            name = f"run_{words[0].replace('-', '_')}"
            (module,) = {
                sys.modules[add.__module__] for add in cli.COMMANDS if hasattr(sys.modules[add.__module__], name)
            }
            monkeypatch.setattr(module, name, lambda **options: None)  # parse only
            assert cli.main(words) == 0
        else:
            with pytest.raises(SystemExit) as stopped:
                cli.main([words[0], "--help"])
            assert stopped.value.code == 0, "no such command"
            _check_flags(words[1:], capsys.readouterr().out)
    elif words[0] == "-m":
        if words[1] not in ("pip", "build"):
            script = Path(*words[1].split("."))
            found = [path for path in (script.with_suffix(".py"), script / "__main__.py") if path.is_file()]
            assert found, "no such module"
            # Flags of several benchmarks are defined in a file beside them.
            _check_flags(words[2:], "".join(path.read_text("utf-8") for path in found[0].parent.glob("*.py")))
    elif words[0] == "training/train.py":
        _check_training_flags(words[1:])
    else:
        _check_flags(words[1:], Path(words[0]).read_text("utf-8"))
        for word in words[1:]:
            assert not word.startswith(("examples/", "benchmarks/")) or Path(word).exists(), f"no such file: {word}"


def _check_flags(words, text):
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in text, f"no such flag: {word}"


def _check_training_flags(words):
    from btok_hf.training import train

    arguments = (train.ScriptArguments, train.CondensationConfig, train.ModelArguments, train.CardArguments)
    known = {"config", "help"} | {field.name for part in arguments for field in dataclasses.fields(part)}
    for flag, value in zip(words, [*words[1:], ""]):
        if flag.startswith("--"):
            assert flag[2:].replace("-", "_") in known, f"no such flag: {flag}"
            assert flag != "--config" or Path(value).is_file(), f"no such recipe: {value}"


def test_commands_page_has_every_flag(capsys):
    """In the section of its command. Those of `btok train` are in its help and the API reference."""
    general, *sections = PAGES["docs/commands.md"].split("\n## btok ")
    sections = {section.split("\n", 1)[0]: section for section in sections}
    shown = _help([], capsys)
    assert sections.keys() == set(re.findall(r"^    ([a-z-]+)(?:\s|$)", shown, flags=re.M))
    assert _flags(shown) <= _flags(general)
    for command in sections.keys() - {"train"}:
        assert _flags(_help([command], capsys)) - _flags(general) == _flags(sections[command]), command


def _help(words, capsys):
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    return capsys.readouterr().out


def _flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


# ---------------------------------------------------------------- files, links, numbers


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target = link.partition("#")[0]
        assert link.startswith("https://") or not target or (folder / target).exists(), f"{page} links to {link}"
    roots = "benchmarks|btok_hf|data|docs|examples|hub_card|modeling|tests|training"
    for name in re.findall(rf"`((?:{roots})/[\w./*-]*)`", text):
        # Folders of the user, and `tests/test_X.py is the test of X.py`.
        if name not in ("data/sources", "tests/test_X.py"):
            assert any(ROOT.glob(name.rstrip("/"))), f"{page} names {name}, which does not exist"


def test_readme_is_short_and_its_numbers_are_in_the_documentation():
    readme = README.read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    number = re.compile(r"(?<![\w.])\d+(?:\.\d+)*(?![\w])")
    known = set(number.findall((ROOT / "pyproject.toml").read_text("utf-8") + "".join(map(PAGES.get, _site_pages()))))
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.S | re.M)
    assert not set(number.findall(prose)) - known


def _site_pages():
    return [page for page in PAGES if page.startswith("docs/")]


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    """Strict: every page is in the navigation, every link and anchor and every documented name exists."""
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(_site_pages())
    for page in pages:
        html = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?:[^\" >]+)", html)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*(https?:[^\" >]+)", html)
        assert not loaded, f"{page.name} loads {loaded}"
        text = re.sub(r"<(script|style|pre|code).*?</\1>", "", html, flags=re.S)
        assert "*optional*" not in text and "::: btok_hf" not in text, f"{page.name} shows raw markup"
