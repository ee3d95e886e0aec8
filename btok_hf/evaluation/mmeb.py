"""Evaluate a model on MMEB-V2: encode every input once, rank, score, report.

- An input is known by its text and by the path, size and time of its files. Its embedding is kept on disk under a
  fingerprint of the model, so datasets share what they have in common, and no model gets another one's embeddings.
- Embeddings are written 256 at a time, each file in one step. After a kill, the same command goes on from there; a
  dataset with a score is not read again.
- Started with `accelerate launch`, every process encodes its share. All must see the same `output_dir`.
- Candidates are read back in blocks: memory does not grow with a corpus.

The command line is `btok mmeb`.
"""

import json
import re
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers.utils import cached_file

from btok_hf.evaluation import report
from btok_hf.evaluation.embeddings import EmbeddingStore, Encoder, fingerprint, hash_of, task_inputs
from btok_hf.evaluation.loading import load_task
from btok_hf.evaluation.metrics import rank, score
from btok_hf.evaluation.tasks import TASKS
from btok_hf.files import replacing
from btok_hf.sentence_transformer import BTokSentenceTransformer

# Whole rankings are kept up to so many candidates, beyond that the first 100: metrics look at 10, and whole ones of
# 10⁵ pages for thousands of queries are gigabytes.
WHOLE_RANKING, RANKING_DEPTH = 2000, 100
BLOCK = 2048


def evaluate(
    model,
    root,
    output_dir,
    *,
    datasets=None,
    modalities=None,
    limit=None,
    batch_tokens=16384,
    prompt=None,
    name=None,
    cache_dir=None,
    metadata=None,
    eval_task=None,
):
    """Score a model on datasets of MMEB-V2, and write a report.

    A dataset that is absent or malformed, or that the model fails on, is named in the report; the others go on.
    A script of several processes should end with `accelerate.PartialState().destroy_process_group()`, because torch
    aborts some processes at their exit otherwise.

    Args:
        model (`SentenceTransformer` or `Callable`): Anything with Sentence-Transformers' `encode`, or a function from
            a list of inputs (dicts of `text`, `image`, `video`, decoded) to an array of shape `(inputs, dimension)`.
        root (`str` or `Path`): Where the datasets are, as `load_task` takes it.
        output_dir (`str` or `Path`): For `{modality}/{dataset}_score.json` and `_pred.jsonl` (a line per query: the
            names of its candidates, best first, the relevant names and their grades; of a query with more than 2,000
            candidates only the first 100), `report.md`, `report.png`, `leaderboard/{name}.json` and
            `.eval_results/mmeb-v2.yaml`. Belongs to one model and `limit`; the report covers earlier runs in it too.
        datasets, modalities (`list[str]`, *optional*): Which of the 78 datasets. Default: all.
        limit (`int`, *optional*): Only the first queries of each dataset, to try things out.
        batch_tokens (`int`): About how many tokens a forward pass may take, padding included.
        prompt (`str`, *optional*): Instruction for every input, besides those that MMEB-V2 puts into the texts.
            Default: what the model itself uses by default.
        name (`str`, *optional*): Of the model, in the report. Default: its repository's. A callable needs one: its
            embeddings are kept under this name, so change it whenever the function changes.
        cache_dir (`str` or `Path`, *optional*): Where embeddings are kept, for any number of models. Default:
            `embeddings` in `output_dir`.
        metadata (`dict`, *optional*): For the leaderboard, beside what is known: see `report.leaderboard`.
        eval_task (`str`, *optional*): Id of the benchmark's task on the Hub, from the `eval.yaml` of its dataset: once
            all 78 are scored, writes the `.eval_results` to put into the model's repository.

    Returns:
        `tuple[dict[str, dict[str, float]], dict[str, str]]`: Scores and errors by dataset.

    Raises:
        ValueError: Unknown datasets, a callable without a name, or an `output_dir` of another model.
    """
    names = _chosen(datasets, modalities)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}. Leave it out to score every query.")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}.")
    is_function = not hasattr(model, "encode")
    if is_function and not name:
        raise ValueError("A function cannot be told from another one: pass name, and change it with the function.")
    name = name or _name(model)
    state = processes()
    output_dir, root = Path(output_dir), Path(root)
    if not is_function and prompt is None:
        prompt = model.prompts.get(model.default_prompt_name)
    key = hash_of("function", name, prompt) if is_function else fingerprint(model, prompt)
    if state.is_main_process:
        _claim(output_dir / "run.json", {"model": name, "fingerprint": key, "prompt": prompt, "limit": limit})
    state.wait_for_everyone()
    store = EmbeddingStore(Path(cache_dir or output_dir / "embeddings") / key)
    encoder = Encoder(model, prompt, batch_tokens, store, state)

    scores, errors = {}, {}
    for number, dataset in enumerate(names, 1):
        folder = output_dir / TASKS[dataset].modality
        done = folder / f"{dataset}_score.json"
        if done.is_file():
            scores[dataset] = json.loads(done.read_text("utf-8"))
            continue
        task, problem = None, None
        try:
            task = load_task(dataset, root, limit)
            _check(task)
            encoder.encode(task)
        except Exception as error:  # the other processes wait for this one
            problem = _explain(dataset, error)
        problems = [text for text in gather_object([problem]) if text]  # after which everything is on disk
        store.refresh()
        if not problems and state.is_main_process:
            try:
                _score(task, store, folder)
            except Exception as error:
                problems = [_explain(dataset, error)]
        problems = [text for part in gather_object([problems]) for text in part]
        if problems:
            errors[dataset] = problems[0]
        else:
            scores[dataset] = json.loads(done.read_text("utf-8"))
        if state.is_main_process:
            metric = TASKS[dataset].metric
            result = errors.get(dataset) or f"{dataset}: {metric} {100 * scores[dataset][metric]:.1f}"
            if limit is None and dataset in (counts := report.other_counts(scores)):
                result += f" ({counts[dataset]})"
            tqdm.write(f"[{number}/{len(names)}] {result}")
    if state.is_main_process:
        known = {"model_name": name.rsplit("/", 1)[-1], "embedding_dimension": store.dimension}
        known |= {} if is_function else _metadata(model)
        _report(output_dir, errors, known | (metadata or {}), limit, eval_task)
    return scores, errors


def processes():
    """The processes that share the work. They wait for each other as long as it takes."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def _chosen(datasets, modalities):
    unknown = sorted({*(datasets or ())} - set(TASKS)) + sorted({*(modalities or ())} - set(report.MODALITIES))
    if unknown:
        raise ValueError(
            f"Unknown {', '.join(map(repr, unknown))}. Modalities are {', '.join(report.MODALITIES)}; datasets are "
            f"{', '.join(TASKS)}."
        )
    chosen = [
        name
        for name, task in TASKS.items()
        if (datasets is None or name in datasets) and (modalities is None or task.modality in modalities)
    ]
    if not chosen:
        raise ValueError(f"Of datasets {datasets} and modalities {modalities} none is left. Leave out one, or both.")
    return chosen


def _claim(path, run):
    """Write down whose results a folder holds; refuse another's."""
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        differing = [f"{key} {before.get(key)!r} (now {run[key]!r})" for key in run if before.get(key) != run[key]]
        if differing:
            raise ValueError(
                f"{path.parent} holds results of another run: {', '.join(differing)}. The fingerprint stands for "
                "weights, settings and library versions. Name another output folder."
            )
    with replacing(path) as file:
        file.write(json.dumps(run, indent=2).encode())


def _explain(dataset, error):
    text = str(error)
    if not isinstance(error, (ValueError, OSError)):  # not of the data: show where
        traceback.print_exception(error)
        advice = ". Lower batch_tokens." if isinstance(error, torch.OutOfMemoryError) else ""
        text = f"{type(error).__name__}: {error}{advice}"
    return text if text.startswith(dataset) else f"{dataset}: {text}"


def _check(task):
    """Refuse what could only be scored wrongly."""
    if not task.queries:
        raise ValueError(f"{task.name} has no queries.")
    for row, query in enumerate(task.queries):
        where = f"{task.name}, query {row} ({query.id!r})"
        if not query.relevance:
            raise ValueError(f"{where} has no relevant candidate: no ranking of it could be scored.")
        names, own = query.candidates, task.candidates
        if names is not None:
            own = set(names)
            if len(own) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{where} lists the candidate {twice!r} more than once.")
        absent = [name for name in query.relevance if name not in own]
        if absent := absent or [name for name in names or () if name not in task.candidates]:
            raise ValueError(f"{where} refers to {absent[0]!r}, which is not among its {len(own)} candidates.")


# ---------------------------------------------------------------- results


def _score(task, store, folder):
    """Rank the candidates of each query, and write rankings and scores."""
    keys = [key for key, *_ in task_inputs(task)]
    queries, keys = store.vectors(keys[: len(task.queries)]), keys[len(task.queries) :]
    names = list(task.candidates)
    if all(query.candidates is None for query in task.queries):
        blocks = (store.vectors(keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK))
        rankings = [[names[position] for position in row] for row in rank(queries, blocks, _depth(names))]
    else:
        vectors, places = store.vectors(keys), {name: place for place, name in enumerate(names)}
        rankings = []
        for vector, query in zip(queries, task.queries):
            own = names if query.candidates is None else query.candidates
            best = rank(vector[None], [vectors[[places[name] for name in own]]], _depth(own))[0]
            rankings.append([own[position] for position in best])
    scores = score(rankings, [query.relevance for query in task.queries])
    with replacing(folder / f"{task.name}_pred.jsonl") as file:
        for ranking, query in zip(rankings, task.queries):
            graded = sorted(query.relevance.items(), key=lambda pair: -pair[1])
            line = {"prediction": ranking, "label": [n for n, _ in graded], "rel_scores": [g for _, g in graded]}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    # Last: a dataset with a score is done.
    with replacing(folder / f"{task.name}_score.json") as file:
        file.write(json.dumps(scores, indent=4).encode())


def _depth(candidates):
    return len(candidates) if len(candidates) <= WHOLE_RANKING else RANKING_DEPTH


def _name(model):
    return re.sub(r".*/(?=.)", "", str(model.config.name_or_path).rstrip("/")) if model.config is not None else "model"


def _metadata(model):
    """What the leaderboard asks for and a model knows."""
    return {
        "model_backbone": getattr(model.config, "btok_base_model", None) or getattr(model.config, "model_type", None),
        "model_size": round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2),
        "max_length_tokens": model.max_seq_length,
    }


def _report(output_dir, errors, metadata, limit, eval_task):
    """Report on everything that was scored, in this run and before."""
    name = metadata["model_name"]
    files = {dataset: output_dir / task.modality / f"{dataset}_score.json" for dataset, task in TASKS.items()}
    scores = {dataset: json.loads(file.read_text("utf-8")) for dataset, file in files.items() if file.is_file()}
    text = report.markdown(scores, name=name, errors=errors, limit=limit)
    with replacing(output_dir / "report.md") as file:
        file.write(text.encode())
    print(f"\n{text}")
    if limit is not None:
        return  # nothing of this compares with published scores
    summary = report.summarise(scores)
    if any(average is not None for average in summary.modalities.values()):
        with replacing(output_dir / "leaderboard" / f"{name}.json") as file:
            file.write(json.dumps(report.leaderboard(scores, metadata), indent=4).encode())
        with replacing(output_dir / "report.png") as file:
            file.write(report.picture(scores, name=name))
    if eval_task and summary.overall is not None:
        with replacing(output_dir / ".eval_results" / "mmeb-v2.yaml") as file:
            file.write(report.eval_results(scores, task_id=eval_task).encode())


def load_model(repo, *, revision=None, dtype="auto", max_pixels=None, device=None):
    """Load a model to evaluate: with this library's wrapper, which neither pads nor cuts, if it has Bottleneck Tokens.

    Args:
        repo (`str`): Folder or Hub id of any Sentence-Transformers model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dtype (`str`): Precision to load in. Default: the checkpoint's.
        max_pixels (`int`, *optional*): Larger images and frames are reduced to this many pixels. Default: the model's.
        device (`str`, *optional*): Default: what Sentence-Transformers finds.

    Returns:
        `SentenceTransformer`
    """
    config = cached_file(repo, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    with_tokens = config is not None and "btok_token_ids" in json.loads(Path(config).read_text("utf-8"))
    Model = BTokSentenceTransformer if with_tokens else SentenceTransformer
    return Model(
        repo,
        revision=revision,
        device=device,
        model_kwargs={"dtype": dtype},
        processor_kwargs={} if max_pixels is None else {"max_pixels": max_pixels},
    )
