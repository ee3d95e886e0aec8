"""Errors at the command line: one line, and a traceback only with `debug`."""

import pytest

from btok_hf.errors import one_line_errors


@pytest.mark.parametrize("kind", [FileNotFoundError, ImportError, OSError, RuntimeError, ValueError])
def test_expected_errors_become_one_line(kind):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise kind("what is wrong")
    assert ended.value.code == "error: what is wrong"  # which Python prints, with status 1
    with pytest.raises(kind, match="what is wrong"), one_line_errors(debug=True):
        raise kind("what is wrong")


def test_an_error_without_a_text_has_its_kind():
    with pytest.raises(SystemExit, match=r"^error: ValueError$"), one_line_errors():
        raise ValueError


@pytest.mark.parametrize("kind", [AssertionError, KeyError, TypeError, KeyboardInterrupt])
def test_faults_of_the_library_keep_their_traceback(kind):
    with pytest.raises(kind), one_line_errors():
        raise kind("a fault")
