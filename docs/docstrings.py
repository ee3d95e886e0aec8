"""What mkdocs needs to read this project's docstrings; named in mkdocs.yml.

Docstrings are written as in transformers: ``name (`type`, *optional*): text``. Griffe's Google parser wants
`name (type, optional): text`.
"""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^( *[*\w, ]+) \((`.*?|\*optional\*)\):", flags=re.M)
REFERENCE = re.compile(r"\[(`[\w.]+`)\](?![\[(])")  # [`name`]
RAISED = re.compile(r"^( +\w+Error)((?:, \w+Error)+):", flags=re.M)
RETURN = re.compile(r"(?<=\nReturns:\n)( +)(`[^`]+`(?: of shapes? `[^`]+`)?):?", flags=re.M)
SUBPACKAGES = ("modeling", "training", "hub_card")


class TransformersDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = ARGUMENT.sub(lambda m: f"{m[1]} ({re.sub('[`*]', '', m[2])}):", obj.docstring.value)
            text = RAISED.sub(lambda m: f"{m[1]}{m[2].replace(',', ' |')}:", text)
            text = RETURN.sub(lambda m: f"{m[1]}{m[2].replace('`', '')}:", REFERENCE.sub(r"\1", text))
            obj.docstring.value = text

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Top-level folders that are subpackages once installed (`package-dir` in pyproject.toml)."""
        if pkg.name == "btok_hf":
            for name in SUBPACKAGES:
                pkg.set_member(name, loader.load(name))
