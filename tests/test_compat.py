"""Private methods of other packages that are overridden."""

import pytest
from sentence_transformers import SentenceTransformer
from support import forks

from btok_hf.compat import require_methods


def test_a_method_that_was_renamed_is_named():
    require_methods(SentenceTransformer, "_inference", "encode")
    with pytest.raises(ImportError, match=r"sentence-transformers [\d.]+ has no method SentenceTransformer\._renamed"):
        require_methods(SentenceTransformer, "encode", "_renamed")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sentence_transformers.base.modules.Transformer", "_load_config"),
        ("sentence_transformers.base.modules.Transformer", "_load_model"),
        ("sentence_transformers.SentenceTransformer", "_inference"),
    ],
)
def test_an_override_that_would_never_be_called_is_an_error_at_import(module, name):
    package, _, cls = module.rpartition(".")
    code = (
        f"from {package} import {cls}\n"
        f"for base in {cls}.__mro__:\n"
        f"    if {name!r} in vars(base):\n"
        f"        delattr(base, {name!r})\n"
        "import btok_hf.sentence_transformer\n"
    )
    run = forks.run("-c", code)
    assert run.returncode and f"has no method {cls}.{name}, which btok-hf overrides" in run.stderr
