"""The package: installation, imports and layout."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

import btok_hf


def test_wheel_holds_every_package_and_imports_without_the_checkout(tmp_path):
    source = tmp_path / "source"  # building writes into the tree it builds
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
    ):
        assert name in names
    assert not any(name.startswith(("tests", "examples", "data")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # -P and an explicit path in front: the checkout's own folders and its editable install are out of reach.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import btok_hf, btok_hf.hub_card\n"
        "from btok_hf import BTokForEmbedding, BTokSentenceTransformer, add_bottleneck_tokens\n"
        "from btok_hf.training import CondensationTrainer\n"
        "import btok_hf.training.train\n"
        "from btok_hf.training.train import read_mixture; assert len(read_mixture('mixture_paper.yaml')) == 25\n"
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
