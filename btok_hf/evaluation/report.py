"""From scores per dataset to a report: averages, tables, a picture, and the file that the MMEB leaderboard takes.

Averages are plain means over datasets, the overall one over all 78 of them. There is no average over a part of a
group: what is missing is named instead.
"""

import datetime
import io
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from btok_hf.evaluation.tasks import TASKS

MODALITIES = {"image": "Image", "video": "Video", "visdoc": "VisDoc"}
# Renamed on the leaderboard since their pages were corrected (November 2025).
CORRECTED = ("ViDoSeek-page", "MMLongBench-page")
# Published averages: Image, Video, VisDoc, Overall. Data v2.0.0 has the pages before that correction, which moves
# VLM2Vec-V2 from 58.0 to 59.2 overall.
PUBLISHED = {
    "ColPali-1.3": ("v2.0.0", 34.9, 28.2, 71.0, 44.4),
    "VLM2Vec-2B": ("v2.0.0", 59.7, 28.6, 41.6, 47.0),
    "GME-2B": ("v2.0.0", 51.9, 33.6, 72.7, 54.1),
    "GME-7B": ("v2.0.0", 56.0, 38.4, 75.2, 57.8),
    "VLM2Vec-V2 (2B)": ("v2.0.0", 64.9, 34.6, 65.4, 58.0),
    "Qwen3-VL-Embedding-2B": ("corrected", 75.0, 61.9, 79.2, 73.2),
    "Qwen3-VL-Embedding-8B": ("corrected", 80.1, 67.1, 82.4, 77.8),
}


class Summary(NamedTuple):
    """Averages of the main metrics, between 0 and 1; `None` where a dataset of the group is missing.

    Args:
        meta_tasks (`dict[str, float | None]`): By meta-task, e.g. `I-CLS`.
        modalities (`dict[str, float | None]`): By `image`, `video` and `visdoc`.
        overall (`float`, *optional*): Over the 78 datasets.
        missing (`list[str]`): Datasets without a score.
    """

    meta_tasks: dict
    modalities: dict
    overall: float | None
    missing: list


def summarise(scores):
    """Average the main metric of each dataset: hit@1 for images and videos, linear nDCG@5 for pages.

    Args:
        scores (`dict[str, dict[str, float]]`): What `metrics.score` returns, by dataset.

    Returns:
        `Summary`

    Raises:
        ValueError: A dataset that is none of MMEB-V2's.
    """
    if unknown := sorted(set(scores) - set(TASKS)):
        raise ValueError(f"{', '.join(unknown)}: no datasets of MMEB-V2. Names are those of btok_hf.evaluation.TASKS.")
    main = {name: scores[name][task.metric] if name in scores else None for name, task in TASKS.items()}

    def average(names):
        values = [main[name] for name in names]
        return None if None in values else sum(values) / len(values)

    def averages(field):
        groups = dict.fromkeys(getattr(task, field) for task in TASKS.values())
        return {group: average([n for n, task in TASKS.items() if getattr(task, field) == group]) for group in groups}

    return Summary(
        meta_tasks=averages("meta_task"),
        modalities=averages("modality"),
        overall=average(TASKS),
        missing=[name for name, value in main.items() if value is None],
    )


def other_counts(scores):
    """Which datasets have another number of queries than the published scores are of: those scores do not compare.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.

    Returns:
        `dict[str, str]`: By dataset, e.g. `3 queries instead of 670`.
    """
    return {
        name: f"{scores[name]['num_data']:,} queries instead of {task.queries:,}"
        for name, task in TASKS.items()
        if name in scores and scores[name]["num_data"] != task.queries
    }


def markdown(scores, *, name, errors=None, limit=None):
    """The tables of a report; aligned, so that they can be read on a screen too.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.
        name (`str`): Of the model.
        errors (`dict[str, str]`, *optional*): Why a dataset has no score, by dataset, which the text names too.
        limit (`int`, *optional*): If only so many queries of each dataset were scored.

    Returns:
        `str`
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
    parts = [f"# MMEB-V2: {name}"]
    if limit is not None:
        parts.append(f"Only the first {limit} queries of each dataset: not comparable with anything published.")
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


def _groups():
    return dict.fromkeys(group for task in TASKS.values() for group in (task.meta_task, task.modality))


def _percent(value):
    return "—" if value is None else f"{100 * value:.1f}"


def _table(header, rows):
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def leaderboard(scores, metadata):
    """The content of the file that the MMEB leaderboard takes.

    The leaderboard averages what a file holds, so only modalities are put in that have all their datasets.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.
        metadata (`dict`): `model_name`, and what is known of `model_backbone`, `model_size` (billions of parameters),
            `embedding_dimension`, `max_length_tokens`, `model_release_date` (YYYY-MM-DD), `url`.

    Returns:
        `dict`

    Raises:
        ValueError: No modality is complete.
    """
    complete = [modality for modality, average in summarise(scores).modalities.items() if average is not None]
    if not complete:
        raise ValueError("No modality has all its datasets: there is nothing to report to the leaderboard yet.")
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


def picture(scores, *, name):
    """The averages beside published ones, as PNG. Needs matplotlib (the `evaluation` extra).

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset.
        name (`str`): Of the model.

    Returns:
        `bytes`

    Raises:
        ValueError: No modality is complete.
    """
    from matplotlib.figure import Figure

    summary = summarise(scores)
    ours = [*summary.modalities.values(), summary.overall]
    titles = [*MODALITIES.values(), "Overall"]
    shown = [(title, column) for column, title in enumerate(titles) if ours[column] is not None]
    if not shown:
        raise ValueError("No modality has all its datasets: there is no average to draw.")
    bars = [(f"{model}*" if data == "v2.0.0" else model, averages) for model, (data, *averages) in PUBLISHED.items()]
    bars.append((name, [None if value is None else 100 * value for value in ours]))
    figure = Figure(figsize=(3 * len(shown) + 1.6, 0.3 * len(bars) + 1), layout="constrained")
    for axes, (title, column) in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown):
        values = [averages[column] for _, averages in bars]
        drawn = axes.barh(range(len(bars)), values, color=["#b8c1cc"] * (len(bars) - 1) + ["#d9622b"])
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
        axes.set(title=title, xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(bars)), [model for model, _ in bars])  # of all: they share the axis
    axes.invert_yaxis()
    figure.suptitle("MMEB-V2: hit@1, for pages linear nDCG@5")
    notes = ["* published, on the pages before their correction (data v2.0.0)"]
    if count := len(other_counts(scores)):
        notes.append(f"{name}: {count} datasets have another number of queries than the published scores are of")
    figure.supxlabel("\n".join(notes), fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def eval_results(scores, *, task_id, dataset_id="TIGER-Lab/MMEB-V2"):
    """The overall average as an entry of `.eval_results/`, which a benchmark's leaderboard on the Hub reads.

    Args:
        scores (`dict[str, dict[str, float]]`): By dataset; all 78.
        task_id (`str`): Id of the benchmark's task, from the `eval.yaml` of its dataset.
        dataset_id (`str`): The benchmark's dataset on the Hub.

    Returns:
        `str`: YAML.

    Raises:
        ValueError: A dataset is missing.
    """
    summary = summarise(scores)
    if summary.overall is None:
        raise ValueError(f"There is no overall score to report without {', '.join(summary.missing)}.")
    counts = "".join(f"; {name} has {count}" for name, count in other_counts(scores).items())
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=round(100 * summary.overall, 2),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=f"MMEB-V2, mean over 78 datasets (hit@1; linear nDCG@5 for visdoc), corrected pages, btok-hf{counts}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
