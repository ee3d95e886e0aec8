"""The package: installation, imports and layout."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT, layout

import btok_hf


def test_wheel_holds_every_package_and_imports_without_the_checkout(tmp_path):
    source = tmp_path / "source"  # the build writes into its source tree
    for folder in ("btok_hf", "modeling", "training", "hub_card"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "btok_hf/condensation.py",
        "btok_hf/modeling/modeling_btok.py",
        "btok_hf/training/train.py",
        "btok_hf/training/recipes/emoji.yaml",
        "btok_hf/training/accelerate/ddp.yaml",
        "btok_hf/evaluation/tasks.csv",
        "btok_hf/evaluation/labels.json",
        "btok_hf/hub_card/card.md.jinja",
        "btok_hf/serving/vllm_models.py",
    ):
        assert name in names
    (metadata,) = (name for name in names if name.endswith("entry_points.txt"))
    # vLLM finds the plugin by the metadata of the installed package.
    plugin = "[vllm.general_plugins]\nbtok = btok_hf.serving.vllm_plugin:register\n"
    assert plugin in zipfile.ZipFile(wheel).read(metadata).decode()
    assert not any(name.startswith(("tests", "examples", "data")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # The checkout and its editable install must not be importable.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import btok_hf, btok_hf.hub_card\n"
        "from btok_hf import BTokForEmbedding, BTokSentenceTransformer, add_bottleneck_tokens\n"
        "from btok_hf.training import CondensationTrainer\n"
        "import btok_hf.training.train\n"
        "from btok_hf.training.mixture import read_mixture; assert len(read_mixture('mixture_paper.yaml')) == 25\n"
        "print(btok_hf.__file__, sys.modules[BTokForEmbedding.__module__].__file__)\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(path.startswith(str(tmp_path / "site")) for path in run.stdout.split())


def test_the_package_imports_nothing_heavy_until_asked():
    code = (
        "import sys, btok_hf\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(len(btok_hf.__all__))\n"
        "assert set(btok_hf.__all__) <= set(dir(btok_hf))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) == len(btok_hf.__all__), run.stderr
    for name in btok_hf.__all__:
        assert callable(getattr(btok_hf, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = btok_hf.nothing


def test_editors_see_the_names_where_they_are_imported_from():
    tree = ast.parse(Path(btok_hf.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert block.test.id == "TYPE_CHECKING" and seen == btok_hf._LAZY_IMPORTS
    assert sorted(btok_hf.__all__) == sorted(seen)


# ---------------------------------------------------------------- layout


def write_tree(root, **files):
    """Write a small library for the checks: contents by path, with __ for /."""
    for name, text in {"btok_hf__": "", "modeling__": "", "training__": "", "hub_card__": "", **files}.items():
        path = root / (name.replace("__", "/") + ("__init__.py" if name.endswith("__") else ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_imports_go_one_way_without_circles():
    graph = layout.imports(ROOT)
    assert {"btok_hf.hub", "btok_hf.modeling.modeling_btok"} <= set(graph)
    assert "btok_hf.sentence_transformer" in graph["btok_hf.training.train"]  # from btok_hf, on first use
    assert "btok_hf.hub" in graph["btok_hf.commands.repositories"]  # inside a function
    assert layout.faults(graph) == []


@pytest.mark.parametrize(
    "files, fault",
    [
        ({"btok_hf__a": "import btok_hf.b", "btok_hf__b": "def f():\n    from btok_hf import a"}, "circle: "),
        ({"btok_hf__a": "from btok_hf.training import x"}, "btok_hf.a imports btok_hf.training"),
        (
            {"hub_card__a": "def f():\n    import btok_hf.training.b", "training__b": ""},
            "btok_hf.hub_card.a imports",
        ),
        ({"modeling__a": "from btok_hf import b", "btok_hf__b": ""}, "btok_hf.modeling.a imports btok_hf.b"),
        ({"modeling__": "from .a import x", "modeling__a": "from btok_hf.modeling import x"}, "circle: "),
    ],
)
def test_imports_in_the_wrong_direction_are_found(tmp_path, files, fault):
    (found,) = layout.faults(layout.imports(write_tree(tmp_path, **files)))
    assert found.startswith(fault)


def test_right_imports_are_no_fault(tmp_path):
    files = {
        "btok_hf__": "if TYPE_CHECKING:\n    from btok_hf.a import x\n_LAZY_IMPORTS = {'x': 'btok_hf.a'}",
        "btok_hf__a": "from btok_hf.modeling import y",
        "btok_hf__commands__training": "from btok_hf.training import z",
        "training__": "from .b import z",
        "training__b": "from btok_hf import x",
    }
    graph = layout.imports(write_tree(tmp_path, **files))
    assert graph["btok_hf"] == set() and graph["btok_hf.training.b"] == {"btok_hf.a"}
    assert graph["btok_hf.training"] == {"btok_hf.training.b"} and layout.faults(graph) == []


def test_the_architecture_page_names_every_module_in_a_layer_above_what_it_imports():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("\n## Modules\n")[2].partition("\n## ")[0]
    sections = [re.findall(r"`([\w/]+\.py)`", section) for section in page.split("\n### ")[1:]]
    layer = {path: number for number, section in enumerate(sections) for path in section}
    names = {name: path.relative_to(ROOT).as_posix() for name, path in layout.modules(ROOT).items()}
    assert sorted(path for section in sections for path in section) == sorted(names.values())
    upward = [
        f"{name} imports {other}"
        for name, imported in layout.imports(ROOT).items()
        for other in imported
        if layer[names[other]] < layer[names[name]]
    ]
    assert upward == []


def test_source_files_are_short():
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in layout.source_files(ROOT)}
    assert len(sizes) > 50 and {path.name: lines for path, lines in sizes.items() if lines > 400} == {}


def test_every_source_file_has_its_test_file():
    files = layout.test_file_of(ROOT)
    assert files["training/sampler.py"] == "test_sampler.py"
    assert {path: test for path, test in files.items() if not (ROOT / "tests" / test).is_file()} == {}


def test_no_source_file_changes_where_modules_come_from():
    for line in ("sys.path.insert(0, x)", "sys.path += [x]", "sys.modules['a'] = b", "del sys.modules['a']"):
        assert layout.edits_of_imports(f"import sys\n{line}\n") == [line]
    assert layout.edits_of_imports("sys.modules[cls.__module__].__file__\nimport os.path") == []
    found = {path.name: layout.edits_of_imports(path.read_text("utf-8")) for path in layout.source_files(ROOT)}
    assert {name: lines for name, lines in found.items() if lines} == {}
