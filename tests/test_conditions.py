"""SQL conditions of people: brackets, ends, kinds, and what errors say of them."""

import lancedb
import pytest

from btok_hf.corpus.conditions import FUNCTIONS, check_functions, condition, named_condition, whole


def test_conditions_are_joined_and_end_with_their_brackets():
    assert condition(["text", "page"], " page > 1 ") == "kind IN ('text', 'page') AND ( page > 1\n)"
    assert condition([], " ") is condition([], None) is None and condition(["text"], "") == "kind IN ('text')"
    assert whole("a = 1; ") == "(a = 1\n)" and whole("a = 1 -- (") == "(a = 1 -- (\n)"


@pytest.mark.parametrize(
    "where", ["kind = 'text') OR (kind = 'video'", ")(", "(((", "a IN (1", "a = 1)", "'(' = ')')"]
)
def test_brackets_that_do_not_match_are_refused(where):
    with pytest.raises(ValueError, match="brackets do not match"):
        condition(["text"], where)


@pytest.mark.parametrize("where", ["a = '('", "a = 'it''s ('", '"a(" = 1', "`a)` = 1", "a = 1 /* ( */", "((a) = (1))"])
def test_brackets_in_texts_names_and_comments_are_none(where):
    assert where in whole(where)


@pytest.mark.parametrize(
    "where",
    [
        "array_length(array_repeat(id, 100000000000)) > 0",
        "length(REPEAT (id, 9)) > 0",
        'length("repeat"(id, 9)) > 0',
        "length(`repeat` (id, 9)) > 0",
        "length(lpad\n(id, 9)) > 0",
        "regexp_like(id, id || '(a{100}){2000}')",
        "id = $$'$$ OR length(repeat(id, 9)) > 0 OR id = $$'$$",
        "id = E'a ' || repeat(id, 9) || 'b'",
        r"id = '\' || repeat(id, 9) || '",
        "id = 'a' || repeat(id, 9) || '",
        """id = "'" || repeat(id, 9) || "'" """,
    ],
)
def test_functions_that_allocate_what_they_are_asked_for_are_refused(where):
    with pytest.raises(ValueError, match=r"uses (array_repeat|repeat|lpad|regexp_like) before a bracket.*: abs, "):
        check_functions(where)


@pytest.mark.parametrize("where", ["/* /* */ ' */ a", "repeat/**/(id, 9) = ''", "repeat -- x\n(id, 9) = ''"])
def test_comments_could_hide_functions(where):
    with pytest.raises(ValueError, match="comment, which is allowed only at its end"):
        check_functions(where)


@pytest.mark.parametrize(
    "where",
    [
        "kind = 'text') OR (kind = 'video'",
        "id LIKE '%' -- all",
        "text LIKE '%f(x) and it''s g(x)%' AND id <> 'alert(1)'",
        "lower(text) LIKE '%a%' AND NOT (page IN (1, 2)) OR (page BETWEEN (1) AND (2))",
        "try_cast(id AS int) > 1 AND CAST(page AS decimal(10, 2)) > 2.5 AND isnan(price) AND at < now()",
        "`Price (EUR)` > 2 AND \"Price (EUR)\" IN (3, 4) AND id <> 'repeat(x)'",
        f"id = 'a || b || c || d || e' AND text || 'x' = '[{','.join('abcdefghijklmnopqrstuvwxyz')}]'",
        "text NOT ILIKE ('%A') AND array_has(tags, 'a') AND id IN ('b'" + ", 'b'" * 30 + ") AND tags[1] = 'like'",
        "array_has(tags, 'new') AND date_trunc('day', at) < date '2026-01-01' AND (a).b = 1",
    ],
)
def test_what_people_write_is_allowed(where):
    check_functions(where, ["id", "Price (EUR)"])


@pytest.mark.parametrize("where", ["`repeat`(id, 9) = ''", "id = ``a`' || repeat(id, 9) || '`", "`Pri` (EUR) = 1"])
def test_names_of_columns_hide_no_functions(where):
    with pytest.raises(ValueError, match="before a bracket"):
        check_functions(where, ["a", "repeat", "Pri", "it's ' ("])


@pytest.mark.parametrize(
    "where",
    [
        "text ilike text",
        "text LIKE lower(text)",
        "id ilike\n(text)",
        'id ilike "text"',
        "id ilike ('%' || text)",
        "id like 'a' || text",
    ],
)
def test_patterns_that_are_compiled_for_every_row_are_refused(where):
    """`text ilike text` took four seconds for 2,000 texts."""
    with pytest.raises(ValueError, match="a pattern that is no text: it would be compiled for every row"):
        check_functions(where, ["text", "id"])


def test_what_copies_columns_many_times_is_refused():
    """160 and 190 of them took 50 seconds and a gigabyte for 2,000 texts."""
    check_functions(f"length({' || '.join(['text'] * 4)}) > 0 AND array_has([{', '.join(['text'] * 21)}], 'a')")
    with pytest.raises(ValueError, match=r"joins texts by \|\| 160 times; at most 3"):
        check_functions(f"length({'||'.join(['text'] * 161)}) > 0")
    for where in (f"array_has([{','.join(['text'] * 190)}], 'a')", f"array_has([{'[text],' * 189}[text]][1], 'a')"):
        with pytest.raises(ValueError, match=r"lists in \[\] with 189 commas; at most 20 .* Use IN"):
            check_functions(where)


def test_functions_that_are_allowed_are_known_to_the_database(tmp_path):
    table = lancedb.connect(tmp_path).create_table("items", [{"id": "a"}])
    for name in (*FUNCTIONS.split(), "nonsense"):
        with pytest.raises((ValueError, RuntimeError)) as error:  # of their arguments
            table.count_rows(f"{name}(id, id, id, id, id, id, id) = 1")
        assert ("Invalid function" in str(error.value)) == (name == "nonsense")


@pytest.mark.parametrize(
    "message, reason",
    [
        (
            "Error parsing statement: SELECT 1 FROM t WHERE (a = ( b) ) (sql parser error: Expected: x)",
            "Expected: x",
        ),
        (
            "Invalid input, Error resolving filter expression (page = 'x' ): Invalid user input: could not convert "
            "'x', /root/.cargo/registry/src/lance-13.0.0/src/logical_expr.rs:23:88",
            "could not convert 'x'",
        ),
        ("lance error: Divide by zero error, /root/x/read.rs:1639:33", "Divide by zero error"),
        (
            "Invalid input, Schema error: No field named b. Valid fields are a, _rowid.",
            "Schema error: No field named b",
        ),
        ("its brackets do not match", "its brackets do not match"),
    ],
)
def test_errors_quote_what_was_written_and_no_internals(message, reason):
    with pytest.raises(ValueError) as error, named_condition("a = (\nb)", ["a", "b"]):
        raise RuntimeError(message)
    assert str(error.value) == (
        f"The filter 'a = (\\nb)' cannot be used: {reason}. It is an SQL condition on the columns a, b, e.g. "
        "kind = 'image'."
    )
    with pytest.raises(RuntimeError, match=r"^disk$"), named_condition(None, ["a"]):
        raise RuntimeError("disk")
