"""Turn scores of datasets into a report: averages, tables, a picture, and files for leaderboards.

Averages are plain means over datasets; the overall one is over all 78. A group with a missing dataset has no average:
the report names the missing ones. The scores themselves come from `metrics.py`.
"""

import datetime
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from matplotlib.figure import Figure

from btok_hf.evaluation.tasks import TASKS

MODALITIES = {"image": "Image", "video": "Video", "visdoc": "VisDoc"}
# The pages of these were corrected in November 2025, and the leaderboard renamed them.
CORRECTED = ("ViDoSeek-page", "MMLongBench-page")
# Published averages: Image, Video, VisDoc, Overall. Data v2.0.0 has the pages before that correction, which changes
# VLM2Vec-V2 from 58.0 to 59.2 overall.
PUBLISHED: dict[str, tuple[str, float, float, float, float]] = {
    "ColPali-1.3": ("v2.0.0", 34.9, 28.2, 71.0, 44.4),
    "VLM2Vec-2B": ("v2.0.0", 59.7, 28.6, 41.6, 47.0),
    "GME-2B": ("v2.0.0", 51.9, 33.6, 72.7, 54.1),
    "GME-7B": ("v2.0.0", 56.0, 38.4, 75.2, 57.8),
    "VLM2Vec-V2 (2B)": ("v2.0.0", 64.9, 34.6, 65.4, 58.0),
    "Qwen3-VL-Embedding-2B": ("corrected", 75.0, 61.9, 79.2, 73.2),
    "Qwen3-VL-Embedding-8B": ("corrected", 80.1, 67.1, 82.4, 77.8),
}

Scores = Mapping[str, Mapping[str, float]]  # what `metrics.score` returns, by dataset


class Summary(NamedTuple):
    """Averages of the main metrics, between 0 and 1; `None` if a dataset of the group is missing.

    Args:
        meta_tasks (`dict[str, float | None]`): By meta-task, e.g. `I-CLS`.
        modalities (`dict[str, float | None]`): By `image`, `video` and `visdoc`.
        overall (`float`, *optional*): Over the 78 datasets.
        missing (`list[str]`): Datasets without a score.
    """

    meta_tasks: dict[str, float | None]
    modalities: dict[str, float | None]
    overall: float | None
    missing: list[str]


def summarise(scores: Scores) -> Summary:
    """Average the main metric of each dataset: hit@1 for images and videos, linear nDCG@5 for pages.

    Args:
        scores (`dict[str, dict[str, float]]`): What `metrics.score` returns, by dataset.

    Returns:
        `Summary`: The averages.

    Raises:
        ValueError: A dataset that is not in MMEB-V2.
    """
    if unknown := sorted(set(scores) - set(TASKS)):
        raise ValueError(
            f"{', '.join(unknown)}: not in MMEB-V2. Names of datasets are the keys of btok_hf.evaluation.TASKS."
        )
    main = {name: scores[name][task.metric] if name in scores else None for name, task in TASKS.items()}

    def average(names: Iterable[str]) -> float | None:
        values = [main[name] for name in names]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    def averages(field: str) -> dict[str, float | None]:
        groups = dict.fromkeys(getattr(task, field) for task in TASKS.values())
        return {group: average([n for n, task in TASKS.items() if getattr(task, field) == group]) for group in groups}

    return Summary(
        meta_tasks=averages("meta_task"),
        modalities=averages("modality"),
        overall=average(TASKS),
        missing=[name for name, value in main.items() if value is None],
    )


def other_counts(scores: Scores) -> dict[str, str]:
    """Datasets whose number of queries or candidates differs from that of the published scores.

    Their scores are not comparable.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.

    Returns:
        `dict[str, str]`: By dataset, e.g. `3 queries instead of 670`.
    """
    found = {}
    for name, task in TASKS.items():
        of = scores.get(name, {})
        pairs = {"queries": ("num_data", task.queries), "candidates per query": ("num_candidates", task.candidates)}
        texts = [
            f"{of[key]:,g} {what} instead of {published:,}"
            for what, (key, published) in pairs.items()
            if published is not None and key in of and of[key] != published
        ]
        if texts:
            found[name] = ", ".join(texts)
    return found


def markdown(
    scores: Scores,
    *,
    name: str,
    errors: Mapping[str, str] | None = None,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The report as Markdown. Tables are aligned, so that they are readable as plain text.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.
        name (`str`): Name of the model.
        errors (`dict[str, str]`, *optional*): By dataset, why it has no score. Each text begins with the dataset.
        limit (`int`, *optional*): Number of queries per dataset, if they were limited.
        settings (`dict[str, Any]`, *optional*): How the model was run. Those that are `None` are left out.

    Returns:
        `str`: The text.
    """
    summary, errors = summarise(scores), errors or {}
    total = {name: [n for n, task in TASKS.items() if name in (task.meta_task, task.modality)] for name in _groups()}
    rows = []
    for group, average in {**summary.meta_tasks, **summary.modalities}.items():
        done = sum(n in scores for n in total[group])
        metric = TASKS[total[group][0]].metric
        rows.append([MODALITIES.get(group, group), metric, f"{done} of {len(total[group])}", _percent(average)])
    rows.append(["Overall", "", f"{len(scores)} of {len(TASKS)}", _percent(summary.overall)])
    details = [
        [n, task.meta_task, task.metric, f"{scores[n]['num_data']:,}", _percent(scores[n][task.metric])]
        for n, task in TASKS.items()
        if n in scores
    ]
    known = {key: value for key, value in (settings or {}).items() if value is not None}
    parts = [f"# MMEB-V2: {name}"]
    if limit is not None:
        parts.append(f"Only the first {limit} queries of each dataset: not comparable with anything published.")
    if given := [f"{key} {value!r}" if key == "prompt" else f"{key} {value}" for key, value in known.items()]:
        parts.append(f"Run with {', '.join(given)}.")
    parts.append(_table(["group", "metric", "datasets", "score"], rows))
    if scores:
        parts.append(_table(["dataset", "meta-task", "metric", "queries", "score"], details))
    failed = [n for n in summary.missing if n in errors]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(f"- {errors[n]}" for n in failed))
    if absent := [n for n in summary.missing if n not in errors]:
        groups = {group: [n for n in total[group] if n in absent] for group in summary.meta_tasks}
        texts = [
            f"- {group}: {'all' if len(names) == len(total[group]) else ', '.join(names)}"
            for group, names in groups.items()
            if names
        ]
        parts.append("Not evaluated:\n\n" + "\n".join(texts))
    if summary.missing:
        parts.append("Groups with a missing dataset have no average.")
    if limit is None and (counts := other_counts(scores)):
        lines = "\n".join(f"- {n}: {count}" for n, count in counts.items())
        parts.append(f"Not the data of the published scores, so not comparable with them:\n\n{lines}")
    if any(n in scores for n in CORRECTED):
        parts.append(f"Data: {' and '.join(CORRECTED)} with corrected pages (`-fixed` on the leaderboard).")
    return "\n\n".join(parts) + "\n"


def _groups() -> dict[str, None]:
    """Meta-tasks and modalities, in the order of the table."""
    return dict.fromkeys(group for task in TASKS.values() for group in (task.meta_task, task.modality))


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def leaderboard(scores: Scores, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file for the MMEB leaderboard.

    The leaderboard averages all datasets of the file. So a modality is included only if all its datasets have scores.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.
        metadata (`dict[str, Any]`): `model_name` and, where known, `model_backbone`, `model_size` (billions of
            parameters), `embedding_dimension`, `max_length_tokens`, `model_release_date` (YYYY-MM-DD) and `url`.

    Returns:
        `dict[str, Any]`: To be written as JSON.

    Raises:
        ValueError: No modality is complete.
    """
    complete = [modality for modality, average in summarise(scores).modalities.items() if average is not None]
    if not complete:
        raise ValueError(
            "No modality has all its datasets, as the leaderboard requires. Evaluate the missing ones first."
        )
    fields = ("model_name", "model_backbone", "model_size", "embedding_dimension", "max_length_tokens")
    return {
        "metadata": {
            **{field: metadata.get(field) for field in (*fields, "model_release_date")},
            "data_source": "Self-Reported",
            "url": metadata.get("url"),
            "report_generated_date": datetime.datetime.now().isoformat(),
        },
        "metrics": {
            modality: {
                f"{name}-fixed" if name in CORRECTED else name: scores[name]
                for name, task in TASKS.items()
                if task.modality == modality
            }
            for modality in complete
        },
    }


def picture(scores: Scores, *, name: str) -> bytes:
    """A bar chart of the averages beside published ones.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.
        name (`str`): Name of the model.

    Returns:
        `bytes`: A PNG file.

    Raises:
        ValueError: No modality is complete.
    """
    summary = summarise(scores)
    ours = [*summary.modalities.values(), summary.overall]
    titles = [*MODALITIES.values(), "Overall"]
    shown = [(title, column) for column, title in enumerate(titles) if ours[column] is not None]
    if not shown:
        raise ValueError(
            "No modality has all its datasets: there is no average to draw. Evaluate the missing ones first."
        )
    bars: list[tuple[str, Sequence[float | None]]] = [
        (f"{model}*" if data == "v2.0.0" else model, averages) for model, (data, *averages) in PUBLISHED.items()
    ]
    bars.append((name, [None if value is None else 100 * value for value in ours]))
    figure = Figure(figsize=(3 * len(shown) + 1.6, 0.3 * len(bars) + 1), layout="constrained")
    for axes, (title, column) in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown):
        values = [averages[column] for _, averages in bars]
        drawn = axes.barh(range(len(bars)), values, color=["#b8c1cc"] * (len(bars) - 1) + ["#d9622b"])
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
        axes.set(title=title, xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(bars)), [model for model, _ in bars])  # the charts share this axis
    axes.invert_yaxis()
    figure.suptitle("MMEB-V2: hit@1, for pages linear nDCG@5")
    notes = ["* published, on the pages before their correction (data v2.0.0)"]
    if count := len(other_counts(scores)):
        notes.append(
            f"{name}: {count} datasets have other numbers of queries or candidates than the published scores are of"
        )
    figure.supxlabel("\n".join(notes), fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def eval_results(scores: Scores, *, task_id: str, dataset_id: str = "TIGER-Lab/MMEB-V2") -> str:
    """The overall average as an entry of `.eval_results/`, which leaderboards on the Hub read.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset; all 78.
        task_id (`str`): Id of the benchmark's task, from the `eval.yaml` of its dataset.
        dataset_id (`str`): Hub id of the benchmark's dataset.

    Returns:
        `str`: YAML.

    Raises:
        ValueError: A dataset is missing.
    """
    summary = summarise(scores)
    if summary.overall is None:
        raise ValueError(
            f"There is no overall score to report without {', '.join(summary.missing)}. Evaluate these first."
        )
    counts = "".join(f"; {name} has {count}" for name, count in other_counts(scores).items())
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=round(100 * summary.overall, 2),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=f"MMEB-V2, mean over 78 datasets (hit@1; linear nDCG@5 for visdoc), corrected pages, btok-hf{counts}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
