"""Build the unified benchmark's data: texts and figures of open textbooks, and clips of animated emoji.

    python -m benchmarks.unified.build --source ../shared/data

The source folder holds `openstax` and `animated_emoji`. The parquet files, the dataset card and the licences go to
`benchmarks/unified/data`. They depend on nothing but the source: a second run gives the same bytes.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import jinja2
import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value

from benchmarks.unified.sources import clips, figures, glossary, modules, questions
from benchmarks.unified.sources.splits import SPLITS, TEST_BOOKS, is_test

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
MOST_BYTES = 17_000_000
# File: the template that it is made from.
TEXTS = {"README.md": "data_card.md.jinja", "LICENSES.md": "licences.md.jinja"}

STRING = Value("string")
FEATURES = {
    "glossary": Features(dict.fromkeys(("id", "book", "module", "term", "definition"), STRING)),
    "modules": Features({"id": STRING, "book": STRING, "title": STRING, "objectives": List(STRING), "text": STRING}),
    "questions": Features(dict.fromkeys(("id", "book", "module", "question", "answer"), STRING)),
    "figures": Features(
        {
            **dict.fromkeys(("id", "book", "module"), STRING),
            "image": Image(),
            **dict.fromkeys(("caption", "alt", "credit"), STRING),
        }
    ),
    "clips": Features(
        {"emoji": STRING, "name": STRING, "keywords": List(STRING), "category": STRING, "frames": List(Image())}
    ),
}


def main() -> None:
    """Read the sources, clean and split them, and write the parquet files, the card and the licences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data"))
    source = parser.parse_args().source

    dropped = {config: Counter() for config in FEATURES if config != "clips"}
    books = source / "openstax"
    rows = {
        "glossary": glossary.build(books, dropped["glossary"]),
        "modules": modules.build(books, dropped["modules"]),
    }
    rows["questions"] = questions.build(books, {row["id"] for row in rows["modules"]}, dropped["questions"])
    rows["figures"] = figures.build(books, dropped["figures"])
    animations, groups = clips.build(source / "animated_emoji")

    parts = {
        (config, split): [row for row in rows[config] if SPLITS[is_test(row)] == split]
        for config in rows
        for split in SPLITS
    }
    parts |= {("clips", split): [row for row in animations if row["split"] == split] for split in SPLITS}
    for (config, split), part in parts.items():
        write(config, split, part)
    commits = re.findall(r"^github\.com/(\S+) @ ([0-9a-f]{40})", (books / "SOURCE.txt").read_text(), re.MULTILINE)
    animated = re.search(r"github\.com/(\S+) @ ([0-9a-f]{40})", (source / "animated_emoji" / "SOURCE.txt").read_text())
    write_texts(parts, dropped, groups, commits, animated.groups())
    total = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    for path in sorted(DATA.rglob("*.*")):
        print(path.relative_to(DATA), path.stat().st_size)
    print("total", total)
    if total > MOST_BYTES:
        raise SystemExit(f"The data have {total} bytes, more than {MOST_BYTES}. Lower a limit of rows in sources/.")


def write(config: str, split: str, rows: list[dict]) -> None:
    """One parquet file with the config's columns."""
    path = DATA / config / (split + ".parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    features = FEATURES[config]
    rows = [{name: row[name] for name in features} for row in rows]
    columns = Dataset.from_list(rows, features=features).data.table.combine_chunks()
    columns = columns.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(columns, path, compression="zstd", compression_level=19, row_group_size=1000)


def table(header: tuple, rows: list) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_texts(parts: dict, dropped: dict, groups: Counter, commits: list, animated: tuple) -> None:
    """The dataset card and the licences, from their templates."""
    counts = [(f"`{config}`", *(len(parts[config, split]) for split in SPLITS)) for config in FEATURES]
    books = sorted({row["book"] for part in parts.values() for row in part if "book" in row})
    by_book = [
        (
            book,
            SPLITS[book in TEST_BOOKS],
            *(sum(row["book"] == book for split in SPLITS for row in parts[config, split]) for config in dropped),
        )
        for book in books
    ]
    rules = [(f"`{config}`", rule, n) for config, counter in dropped.items() for rule, n in counter.items()]
    exercises = [row for split in SPLITS for row in parts["questions", split]]
    pictures = [row for split in SPLITS for row in parts["figures", split]]
    sources = [(f"[{name}](https://github.com/{name})", f"`{commit}`") for name, commit in commits]
    values = {
        "configs": list(FEATURES),
        "splits": SPLITS,
        "counts": table(("config", *SPLITS), counts),
        "by_book": table(("book", "split", *dropped), by_book),
        "rules": table(("config", "rule", "rows dropped"), rules),
        "answers": sum(row["answer"] is not None for row in exercises),
        "questions": len(exercises),
        "credits": sum(row["credit"] is not None for row in pictures),
        "figures": len(pictures),
        "clips": sum(groups.values()),
        "groups": len(groups),
        "grouped": sum(size for size in groups.values() if size > 1),
        "largest": max(groups.values()),
        "commits": table(("source", "commit"), sources),
        "animated_name": animated[0],
        "animated_commit": animated[1],
    }
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "sources"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    for name, template in TEXTS.items():
        (DATA / name).write_text(templates.get_template(template).render(values), encoding="utf-8")


if __name__ == "__main__":
    main()
