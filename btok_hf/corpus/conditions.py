"""SQL conditions of users: checked, joined with others, and quoted in error messages."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Parts of a condition in which a bracket is only a character: strings, names and comments.
QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)


# Functions that a stranger's condition may use. Others allocate as much as they are asked to, such as `repeat`, and
# end the process when there is not so much. So does `regexp_like`, which keeps a compiled pattern for every row.
FUNCTIONS = (
    "abs array_contains array_has array_has_all array_has_any array_length btrim char_length coalesce contains "
    "date_part date_trunc ends_with greatest isnan least length lower ltrim now nullif octet_length position round "
    "rtrim starts_with strpos to_date to_timestamp upper"
)
# What else may stand before a bracket: words of SQL, and types that have a length. Lance has no CASE and no ANY.
WORDS = "and between cast decimal ilike in like not or timestamp try_cast"
# These copy a column for each part: 160 of `text || text || …` took 50 seconds and 1.4 GB for 2,000 texts.
MAX_JOINS, MAX_COMMAS = 3, 20


def check_functions(where: str, columns: Sequence[str] = ()) -> None:
    """Refuse what makes a short condition costly.

    That are functions not in `FUNCTIONS`, patterns of LIKE that are no texts, many `||`, and long lists in `[]`.

    Comments are refused, except at the end, and strings looked into unless it is plain where they end: the database's
    parser may see less of them than this function does.

    Args:
        where (`str`): The condition.
        columns (`Sequence[str]`): Names that may hold brackets and be quoted.

    Raises:
        ValueError: One of these, or a comment that something may follow.
    """
    if "/*" in where or re.search(r"--[^\r\n]*[\r\n]", where):
        raise ValueError("The condition has a comment, which is allowed only at its end, after --. Leave it out.")
    for name in columns:
        if not re.search(r"[\\$\"`']", name):
            where = where.replace(f"`{name}`", " a_column ").replace(f'"{name}"', " a_column ")
    bare = re.sub(r"'(?:[^']|'')*'", "\0", where)
    if re.search(r"[\\$\"`]", where) or re.search(r"'|\w\0", bare):  # escapes, other quotes, strings such as E'…'
        bare = where
    if (joins := bare.count("||")) > MAX_JOINS:
        raise ValueError(f"The condition joins texts by || {joins} times; at most {MAX_JOINS} are allowed.")
    if re.search(r"\bi?like\b(?!\s*\(*\s*['\0])", bare, re.IGNORECASE) or (
        joins and re.search(r"(?i)\bi?like\b", bare)
    ):
        raise ValueError(
            "The condition has a pattern that is no text: it would be compiled for every row. Write LIKE '…' or "
            "ILIKE '…', without || in the condition, or compare with contains or starts_with."
        )
    if (commas := _commas_in_lists(bare)) > MAX_COMMAS:
        raise ValueError(
            f"The condition has lists in [] with {commas} commas; at most {MAX_COMMAS} are allowed. Use IN (…)."
        )
    used = {name.lower() for name in re.findall(r"(\w+)[\"`\]]?\s*\(", bare)}
    if unknown := sorted(used - {*FUNCTIONS.split(), *WORDS.split()}):
        raise ValueError(
            f"The condition uses {', '.join(unknown)} before a bracket, which is not allowed here. Allowed functions: "
            f"{', '.join(FUNCTIONS.split())}."
        )


def _commas_in_lists(bare: str) -> int:
    depth = commas = 0
    for character in bare:
        depth += (character == "[") - (character == "]")
        commas += character == "," and depth > 0
    return commas


def whole(where: str) -> str:
    """A condition in brackets, so that it is parsed to its end. LanceDB silently ignores what follows a `;`.

    Args:
        where (`str`): The condition. It may end with one `;`, or with a comment.

    Returns:
        `str`

    Raises:
        ValueError: Its brackets do not match. Such a condition could close the brackets around it and mean another.
    """
    depth = 0
    for bracket in re.findall(r"[()]", QUOTED.sub("", where)):
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            break
    if depth:
        raise ValueError("its brackets do not match")
    return f"({where.rstrip().removesuffix(';')}\n)"


def condition(kinds: Sequence[str], where: str | None) -> str | None:
    """The kinds and the user's own condition as one, or `None` if there are neither.

    Raises:
        ValueError: As `whole`.
    """
    parts = [f"kind IN ({', '.join(map(repr, kinds))})"] if kinds else []
    if where and where.strip():
        parts.append(whole(where))
    return " AND ".join(parts) or None


@contextmanager
def named_condition(where: str | None, columns: Sequence[str]) -> Iterator[None]:
    """Errors of an SQL condition name it and the columns. Without a condition they stay as they are.

    Raises:
        ValueError: For each `RuntimeError` and `ValueError` within.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if where is None:
            raise
        raise ValueError(
            f"The filter {where!r} cannot be used: {_reason(str(error))}. It is an SQL condition on the columns "
            f"{', '.join(columns)}, e.g. kind = 'image'."
        ) from error


def _reason(message: str) -> str:
    """What an error of LanceDB says of a condition, without its own statement around it and places in its source."""
    line = " ".join(message.split())
    if parsing := re.search(r"\(sql parser error: (.*)\)$", line):
        return parsing[1]
    line = re.sub(r"^.*Invalid user input: |^(Invalid input, |lance error: )+", "", line)
    return re.sub(r"(, /\S+\.rs:\d+|\. Valid fields ).*$", "", line).rstrip(".")
