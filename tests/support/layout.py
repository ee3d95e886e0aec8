"""The library's source files, what they import of each other, and rules that they keep."""

import ast
import graphlib
import re

PACKAGES = ("modeling", "training", "hub_card")  # folders of the checkout that install below btok_hf
SCRIPTS = ("benchmarks", "data", "examples")


def modules(root):
    """Paths of the library's source files, by the name they are imported by."""
    found = {}
    for folder in ("btok_hf", *PACKAGES):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = ("btok_hf", *parts) if folder in PACKAGES else parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(root):
    """The modules that each module imports, also inside functions and for type checkers (not in faces of packages)."""
    files = modules(root)
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in files.items()}
    lazy = {name: _lazy_imports(tree) for name, tree in trees.items()}
    graph = {}
    for name, tree in trees.items():
        package = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in _nodes(tree, for_types=files[name].name != "__init__.py"):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom):
                origin = node.module or ""
                if node.level:
                    base = package.rsplit(".", node.level - 1)[0]
                    origin = f"{base}.{origin}".rstrip(".")
                for alias in node.names if origin in files else ():
                    submodule = f"{origin}.{alias.name}"
                    graph[name].add(submodule if submodule in files else lazy[origin].get(alias.name, origin))
    return graph


def _nodes(tree, for_types):
    for node in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _nodes(node, for_types)


def _lazy_imports(tree):
    """Where a package's names come from that it imports on first use."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY_IMPORTS":
            return ast.literal_eval(node.value)
    return {}


def faults(graph):
    """Imports that go the wrong way: training → btok_hf → modeling is the right one; circles."""
    found = []
    for name, imported in graph.items():
        for other in sorted(imported):
            into_training = _within(other, "btok_hf.training") and not _within(name, "btok_hf.training")
            out_of_modeling = _within(name, "btok_hf.modeling") and not _within(other, "btok_hf.modeling")
            if out_of_modeling or (into_training and name != "btok_hf.commands.training"):
                found.append(f"{name} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " → ".join(reversed(error.args[1])))
    return found


def _within(name, package):
    return name == package or name.startswith(package + ".")


def test_file_of(root):
    """The test file of each source file: test_NAME.py; a package's `__init__` and `__main__` are test_package.py's."""
    special = {
        "btok_hf.hub_card.examples": "test_card_examples.py",
        "btok_hf.serving.vllm_models": "vllm/check_vllm.py",  # needs vLLM: `make test-vllm`
        "btok_hf.serving.vllm_renderer": "vllm/check_vllm.py",
    }
    return {
        path.relative_to(root).as_posix(): "test_cli.py"
        if _within(name, "btok_hf.commands")
        else special.get(name, f"test_{path.stem}.py")
        for name, path in modules(root).items()
        if not path.stem.startswith("__")
    }


def source_files(root):
    """All Python files but the tests: the library's, and scripts."""
    scripts = [path for folder in SCRIPTS for path in sorted((root / folder).rglob("*.py"))]
    return [*modules(root).values(), *scripts]


def edits_of_imports(text):
    """Lines that change where modules are found, or which are loaded."""
    changes = r"sys\.path\b(?!_)|sys\.modules\[[^]]*\] *=(?!=)|sys\.modules\.(pop|update|setdefault)|del sys\.modules"
    return [line.strip() for line in text.splitlines() if re.search(changes, line)]
