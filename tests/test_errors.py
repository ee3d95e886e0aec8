"""Errors at the command line: one line, and a traceback only with `debug`."""

import pytest

from btok_hf.errors import one_line_errors, take_debug


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


@pytest.mark.parametrize("kind", [AssertionError, IndexError, TypeError])
def test_unexpected_errors_are_one_line_with_their_kind_and_the_way_to_the_traceback(kind):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise kind("a\n  fault")
    assert ended.value.code == f"error: {kind.__name__}: a fault (`btok --debug COMMAND …` shows where)"
    with pytest.raises(kind), one_line_errors(debug=True):
        raise kind("a fault")


def test_the_system_s_errors_name_the_file_and_no_number(tmp_path):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        (tmp_path / "nothing").read_text()
    assert ended.value.code == f"error: No such file or directory: {str(tmp_path / 'nothing')!r}"


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt), one_line_errors():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "words, rest, debug",
    [
        (["train", "--debug", "--config", "x"], ["train", "--config", "x"], True),
        (["train", "--config", "x", "--debug"], ["train", "--config", "x"], True),
        (
            ["train", "--debug", "underflow_overflow"],
            ["train", "--debug", "underflow_overflow"],
            False,
        ),  # the Trainer's
        ([], [], False),
    ],
)
def test_a_bare_debug_is_ours(words, rest, debug):
    assert take_debug(words) == (rest, debug)
