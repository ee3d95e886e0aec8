"""The model card and its files: metadata for the Hub's own parser, sections, snippets that print what they say."""

import contextlib
import copy
import io
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import image, video
from datasets import Dataset, Features, Image, Value
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from trl import TrlParser

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.hub_card.card import PLACEHOLDER, CardArguments, render_card
from btok_hf.hub_card.examples import measured_examples
from btok_hf.hub_card.training_run import _command, card_files, loss_curves
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.data import retrieval_evaluator

TOKEN = "hf_" + "aB3" * 12
REPO_ID = "org/tiny-btok"
SECTIONS = ["Install", "Use with Sentence-Transformers", "Use with transformers", "Memory", "Architecture"]
RUN_SECTIONS = ["Results", "Ablation", "Training"]
LAST_SECTIONS = ["Training data and licences", "Limitations", "Citation"]
# Each would break Markdown, YAML or Python if it were pasted instead of quoted.
NASTY = [
    "a | \"double\" and 'single' \\ back\\slash {{ jinja }} {% raw %} <|im_end|>",
    "```\nfence: - [x]\n---\n# heading",
    *("<b>html</b>", "naïve ☃ *stars* _under_ `ticks` $$x$$ &amp;", "third: 'yaml' # no", "plain", "more", "last"),
]


@pytest.fixture(scope="module")
def run(repo, tmp_path_factory):
    """A short real run on text → image pairs, evaluated before and after, exported with its card."""
    folder = tmp_path_factory.mktemp("run")
    features = Features({"query": Value("string"), "positive": Image()})
    sizes = [(60, 40), (40, 90), (900, 300)] + [(40, 40)] * 5
    pairs = {"query": NASTY, "positive": [image(*size, seed) for seed, size in enumerate(sizes)]}
    file = str(folder / "pairs | of `run`.parquet")
    Dataset.from_dict(pairs, features=features).to_parquet(file)
    model = BTokSentenceTransformer(repo, device="cpu")
    args = CondensationConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        condense="query",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        hub_token=TOKEN,
        hub_model_id=REPO_ID,
    )
    trainer = CondensationTrainer(
        model=model,
        args=args,
        train_dataset={"pic|tures": Dataset.from_dict(pairs, features=features)},
        peft_config=LoraConfig(r=4, lora_dropout=0.0),
    )
    evaluator = retrieval_evaluator(file)
    before = evaluator(model)
    trainer.train()
    after = evaluator(model)
    facts = {
        "sources": {"pic|tures": "org/pictures"},
        "evaluator": evaluator,
        "eval_source": file,
        "before": before,
        "after": after,
        "ablation": {"last-token pooling (K = 0)": before},
        "command": [
            "training/train.py",
            "--hub_token",
            TOKEN,
            "--train_files",
            '{"a": "x y"}',
            "--note",
            "\n```\n# x",
        ],
    }
    files = card_files(trainer, CardArguments(model_license="apache-2.0", languages=["en", "de"]), **facts)
    export_model(model, folder / "export", files=files)
    return SimpleNamespace(trainer=trainer, facts=facts, files=files, folder=folder / "export", file=file)


def sections(card):
    return re.findall(r"^## (.+)$", re.sub(r"^(`{3,})\w*\n.*?^\1`*$", "", card, flags=re.M | re.S), flags=re.M)


def blocks(card, language):
    """Fenced blocks of a language, as CommonMark ends them: at a line of at least as many backticks."""
    return [code for _, code in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1`*$", card, flags=re.M | re.S)]


def section(card, name):
    return card.split(f"\n## {name}\n")[1].split("\n## ")[0]


def execute(block, *replacements):
    """What a block prints, and what the comments after its last line say that it prints."""
    for old, new in replacements:
        assert old in block
        block = block.replace(old, new)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), namespace := {})
    comments = re.search(r"print\(.*\)\n((?:# .*\n)*)\Z", block)
    return printed.getvalue(), comments and comments[1], namespace


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", text)]


def assert_well_formed(card):
    """No value that was forgotten, every table row with the columns of its head, every Python block compiles."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1`*$", "block", card, flags=re.M | re.S)
    for wrong in ("None", "nan", "Undefined", "{{", "{%", "\n\n\n"):
        assert wrong not in re.sub(r"\\.", "", text), wrong
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    for block in blocks(card, "python"):
        compile(block, "README.md", "exec")
    ModelCard(card)


# ---------------------------------------------------------------- a trained model


def test_metadata_is_complete_for_the_hubs_parser(run):
    card = ModelCard.load(run.folder / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en", "de"], ["org/pictures"])
    assert {"sentence-transformers", "bottleneck-tokens", "multimodal", "qwen2_vl"} <= set(data.tags)
    assert {"cosine_accuracy@1", "cosine_ndcg@10", "cosine_mrr@8"} <= set(data.metrics)
    assert data.base_model is None and "base_model_relation" not in data.to_dict()  # a local base
    assert card.text.lstrip().startswith("# Bottleneck-Token embedding model (qwen2_vl)")


def test_sections_come_in_order_and_are_well_formed(run):
    card = run.files["README.md"]
    assert sections(card) == SECTIONS + RUN_SECTIONS + LAST_SECTIONS
    assert_well_formed(card)
    assert "No training is recorded" not in card and "not evaluated" not in card
    lines = "".join(part for part in card.split("\n## Install")[0].splitlines(keepends=True))
    assert "One 64-dimensional vector" in lines and "K = 4 Bottleneck Tokens" in lines
    accuracy = run.facts["after"]["pairs | of `run`_cosine_accuracy@1"]
    assert f"For {100 * accuracy:.1f} % of the queries of pairs \\| of \\`run\\` (8 queries, 8 candidates)" in lines
    assert "the first hit is a right answer." in lines  # the first 10 of 8 candidates would mean nothing
    assert '"sentence-transformers>=6.2"' in section(card, "Install") and '"torchvision"' in section(card, "Install")


def test_snippets_print_what_the_card_says(run, monkeypatch):
    card, folder = run.files["README.md"], repr(str(run.folder))
    search, auto, memory, evaluate = blocks(card, "python")
    download = (f'snapshot_download("{REPO_ID}")', folder)
    printed, expected, namespace = execute(search, download)
    assert numbers(printed) == pytest.approx(numbers(expected), abs=2e-4) and len(numbers(expected)) == 6
    assert namespace["queries"].shape == (2, 64) and namespace["documents"].shape == (3, 64)
    first = numbers(expected)[0]
    printed, expected, _ = execute(auto, download)
    assert numbers(printed) == pytest.approx(numbers(expected), abs=2e-4)
    assert numbers(expected)[0] == pytest.approx(first, abs=2e-4)
    assert '{"role": "system", "content": "Find it."}' in auto  # the prompt of encode_query

    _, _, namespace = execute(memory, (f'"{REPO_ID}"', folder))
    assert namespace["model"].processor.image_processor.size["longest_edge"] == 4 * 784
    monkeypatch.chdir(Path(run.file).parent)
    printed, _, namespace = execute(evaluate, (f'"{REPO_ID}"', folder))
    results = namespace["evaluator"](SentenceTransformer(str(run.folder), device="cpu"))
    for metric, value in run.facts["after"].items():
        assert results[metric] == pytest.approx(value, abs=1e-6)
        cell = metric.removeprefix("pairs | of `run`_").replace("_", r"\_")
        row = f"| {cell} | {run.facts['before'][metric]:.4f} | {value:.4f} |"
        assert row in section(card, "Results")
        assert f"| {cell} | {value:.4f} | {run.facts['before'][metric]:.4f} |" in section(card, "Ablation")


def test_pictures(run):
    loss = run.folder / "assets" / "loss.png"
    assert PILImage.open(loss).size == (960, 240) and PILImage.open(loss).format == "PNG"
    assert loss.stat().st_size < 60_000
    assert "](assets/loss.png)" in section(run.files["README.md"], "Training")
    examples = [PILImage.open(run.folder / "assets" / f"example_{n}.png") for n in (1, 2, 3)]
    assert [example.size for example in examples] == [(60, 40), (40, 90), (512, 171)]
    assert examples[0].tobytes() == image(60, 40, 0).tobytes()
    log = [{"loss": 1.0, "infonce": 1.0, "step": step} for step in range(1, 500)]
    assert PILImage.open(io.BytesIO(loss_curves(log))).size == (640, 240)  # nothing was condensed
    assert len(loss_curves(log)) < 60_000
    assert loss_curves([{"train_loss": 1.0, "step": 1}, {"eval_loss": 1.0, "step": 1}]) is None


def test_training_is_described_as_it_was(run):
    text = section(run.files["README.md"], "Training")
    last = [log for log in run.trainer.state.log_history if "loss" in log][-1]
    assert "| steps | 6 (3.00 epochs) |" in text and "| rows per step | 4 |" in text
    assert f"loss {last['loss']:.4f}, infonce {last['infonce']:.4f}, condensation {last['condensation']:.4f}" in text
    assert f"{sum(p.numel() for p in run.trainer.model.parameters() if p.requires_grad):,} |" in text
    assert "rank 4, alpha 8" in text and "float32 weights |" in text and "threads) |" in text
    assert blocks(text, "bash") == [_command(run.facts["command"], run.trainer.args) + "\n"]
    arguments = yaml.safe_load(blocks(text, "yaml")[0])
    assert arguments["learning_rate"] == 1e-2 and arguments["condensation_weight"] == 5.0
    assert arguments["condense"] == "query" and arguments["max_steps"] == 6 and arguments["seed"] == 42
    assert not {"output_dir", "hub_token", "hub_model_id", "report_to", "logging_steps"} & set(arguments)
    # A key of the YAML is an argument: it can be trained with.
    CondensationConfig(output_dir="unused", use_cpu=True, report_to="none", **arguments)
    data = section(run.files["README.md"], "Training data and licences")
    assert "| pic\\|tures | training | 8 rows | [org/pictures](https://huggingface.co/datasets/org/pictures) |" in data
    assert (
        "| evaluation | 8 queries, 8 candidates | local file pairs \\| of \\`run\\`.parquet | not recorded |" in data
    )
    assert "Languages of the training data: en, de." in data


def test_no_token_gets_into_any_file(run):
    for name, content in run.files.items():
        assert TOKEN not in (content.decode("latin-1") if isinstance(content, bytes) else content), name
    assert "--hub_token '***'" in run.files["README.md"]
    args = SimpleNamespace(hub_token="secret", world_size=1)
    for words in (["--hub_token=secret"], ["--hub_tok", "secret"], [f"--note={TOKEN}"], ['{"token": "secret"}']):
        shown = _command(words, args)
        assert "secret" not in shown and TOKEN not in shown and "***" in shown


def test_command_runs_in_a_shell_as_it_was_given(monkeypatch):
    monkeypatch.setenv("HOME", "/home/some one")
    words = [
        "a b",
        "/home/some one/z",
        "it's",
        "",
        '{"a": "/home/some one/x.parquet"}',
        "--file=/home/some one/y",
        "$HOME `ls`",
        "c\nd",
    ]
    shown = _command(words, SimpleNamespace(hub_token=None, world_size=1))
    assert "some one" not in shown and shown.startswith("python 'a b' \"$HOME\"/z ")
    script = f"printf '%s\\0' {shown.removeprefix('python ')}"
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.split("\0")[:-1] == words
    distributed = _command(["train.py"], SimpleNamespace(hub_token=None, world_size=8))
    assert distributed == "accelerate launch --num_processes 8 train.py"


# ---------------------------------------------------------------- what a person says


def test_eval_results_only_for_a_task_of_a_benchmark(run):
    assert not any(name.startswith(".eval_results") for name in run.files)
    arguments = CardArguments(eval_task="retrieval")
    arguments.check(["any"], "org/bench")
    with pytest.raises(ValueError, match=r"eval_task is 'retrieval', but the evaluation data is .*parquet"):
        card_files(run.trainer, arguments, **run.facts)
    files = card_files(run.trainer, arguments, **{**run.facts, "eval_source": "org/bench"})
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/bench.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("org/bench", "retrieval")
    assert entry.value == run.facts["after"]["pairs | of `run`_cosine_ndcg@10"]
    assert entry.notes == "cosine_ndcg@10, 8 queries, 8 candidates" and entry.date
    assert 'retrieval_evaluator("org/bench")' in files["README.md"].replace("'", '"')
    assert ModelCard(files["README.md"]).data.datasets == ["org/pictures"]  # not what it was evaluated on


def test_licences_are_stated_or_said_to_be_unknown(run):
    assert run.files["LICENSE"] == (Path(__file__).parents[1] / "LICENSE").read_text("utf-8")
    stated = CardArguments(
        model_license="other",
        license_name="my licence",
        license_link="https://example.org/licence",
        base_license="apache-2.0 | notice",
        data_licenses='{"pic|tures": "CC BY 4.0"}',
    )
    files = card_files(run.trainer, stated, **run.facts)
    data = ModelCard(files["README.md"]).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "my licence",
        "https://example.org/licence",
    )
    text = section(files["README.md"], "Training data and licences")
    assert "[my licence](https://example.org/licence)" in text and "Its licence: apache-2.0 \\| notice." in text
    assert "| CC BY 4.0 |" in text and "| not recorded |" in text and "Languages of the training data: not rec" in text
    assert "LICENSE" not in files

    files = card_files(run.trainer, **run.facts)
    text = section(files["README.md"], "Training data and licences")
    assert "No licence is stated for these weights" in text and "Its licence: unknown." in text
    assert "LICENSE" not in files and ModelCard(files["README.md"]).data.license is None


def test_bad_statements_are_refused(run):
    for wrong in ({"model_license": "other"}, {"license_name": "x"}, {"model_license": "mit", "license_link": "x"}):
        with pytest.raises(ValueError, match="model_license='other', license_name and license_link together"):
            CardArguments(**wrong)
    with pytest.raises(ValueError, match=r"languages takes ISO 639 codes .* got 'English'"):
        CardArguments(languages=["en", "English"])
    with pytest.raises(ValueError, match=r"data_licenses names \['picures'\], but the datasets are \['pairs"):
        card_files(run.trainer, CardArguments(data_licenses={"picures": "mit"}), **run.facts)
    with pytest.raises(ValueError, match="belong together"):
        card_files(run.trainer, **{**run.facts, "before": None})
    with pytest.raises(ValueError, match=r"The ablation 'x' has the metrics \['mrr'\]"):
        card_files(run.trainer, **{**run.facts, "ablation": {"x": {"mrr": 1.0}}})


def test_statements_are_flags_and_keys_of_the_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("languages: [en, de]\ndata_licenses:\n  a: mit\n")
    parser = TrlParser((CardArguments,))
    (arguments,) = parser.parse_args_and_config(["--config", str(tmp_path / "c.yaml"), "--model_license", "mit"])
    assert arguments == CardArguments(model_license="mit", languages=["en", "de"], data_licenses={"a": "mit"})
    flags = ["--languages", "en", "de", "--data_licenses", '{"a": "mit"}', "--model_license", "mit"]
    assert TrlParser((CardArguments,)).parse_args_and_config(flags) == (arguments,)


# ---------------------------------------------------------------- less is known


def test_a_run_without_evaluation_and_hub_id(run, monkeypatch):
    monkeypatch.setattr(run.trainer.args, "hub_model_id", None)
    monkeypatch.setattr(run.trainer.state, "log_history", [])
    files = card_files(run.trainer)
    card = files["README.md"]
    assert set(files) == {"README.md"}
    assert sections(card) == [*SECTIONS, "Training", *LAST_SECTIONS]
    assert_well_formed(card)
    assert "trained but not evaluated" in card and "No losses were logged" in card
    assert "| pic\\|tures | training | 8 rows | not recorded | not recorded |" in card
    assert ModelCard(card).data.metrics is None
    for block in blocks(card, "python")[:2]:
        printed, expected, _ = execute(block, (f'"{PLACEHOLDER}"', repr(str(run.folder))))
        assert numbers(printed) == pytest.approx(numbers(expected), abs=2e-4)


@pytest.mark.parametrize("num_tokens", [4, 0])
def test_an_untrained_model_says_so(bases, tmp_path, num_tokens):
    repo = add_bottleneck_tokens(bases["qwen3_vl"], tmp_path / "repo", num_tokens=num_tokens)
    card = (repo / "README.md").read_text("utf-8")
    assert sections(card) == SECTIONS + LAST_SECTIONS
    assert_well_formed(card)
    assert "**No training is recorded for these weights.**" in card and "No training data is recorded." in card
    assert f"| Bottleneck Tokens (K) | {num_tokens} |" in card
    assert ("baseline (K = 0)" in card) == (num_tokens == 0) == ("at the EOS token that ends every row" in card)
    assert "| 16,384 (default) | 16 |" in card  # 32 x 32 pixels a token
    assert set(ModelCard(card).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for block in blocks(card, "python"):
        printed, expected, _ = execute(block, (f'"{PLACEHOLDER}"', repr(str(repo))))
        assert not expected and len(numbers(printed)) in (0, 1, 6)


def test_base_limits_and_prompts_are_named(run):
    config = type(run.trainer.model.config).from_dict(run.trainer.model.config.to_dict())
    config.btok_base_model, config.btok_base_revision = "Qwen/Qwen2-VL-2B-Instruct", "abc123"
    processor = copy.deepcopy(run.trainer.model.processor)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 3 * 784}
    card = render_card(config, processor, {"query": "a | b", "document": ""})
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "finetune")
    assert (
        "(https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct), revision abc123. Its licence: not recorded here" in card
    )
    assert "| prompt query | a \\| b |" in card and "prompt document" not in card
    assert re.findall(r"^\| [\d,]+.* \| (\d+) \|$", section(card, "Memory"), flags=re.M) == ["3", "1"]


def test_examples_of_every_kind(run, tmp_path, monkeypatch):
    """Dicts, several images, files; videos, addresses and messages cannot be shown and are passed over."""
    monkeypatch.chdir(tmp_path)
    image(50, 50, 1).convert("RGBA").save("photo.png")
    queries = {
        "q1": {"video": video()},
        "q2": "https://example.org/cat.png",
        "q3": {"image": [image(30, 30), image(40, 60)], "text": ["two", "x" * 500]},
        "q4": "with the same answer",
        "q5": "photo.png",
    }
    corpus = {
        "d1": [{"role": "user", "content": "m"}],
        "d2": "t " * 200,
        "d3": image(900, 20).convert("CMYK"),
        "d4": {"text": "name.png"},
        "d5": {"text": "only\ntext"},
    }
    relevant = {"q1": {"d2"}, "q2": {"d2"}, "q3": {"d2"}, "q4": {"d2"}, "q5": {"d3"}}
    files = {}
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant)
    examples = measured_examples(run.trainer.model, evaluator, files)
    paths = [f"assets/example_{n}.png" for n in (1, 2, 3, 4)]
    assert examples["queries"] == [(paths[:2], "two " + "x" * 116), ([paths[2]], None)]
    assert examples["documents"] == [([], ("t " * 60)[:120]), ([paths[3]], None), ([], "only\ntext")]
    assert list(files) == paths and examples["similarities"]["source"] == "evaluation"
    assert PILImage.open(io.BytesIO(files[paths[3]])).size == (900, 20)  # reduced, it would be thinner than a patch
    model = run.trainer.model
    card = render_card(model.config, model.processor, model.prompts, repo_id=REPO_ID, examples=examples)
    assert_well_formed(card)
    export_model(model, tmp_path / "export", files={**files, "README.md": card})
    for block in blocks(card, "python")[:2]:
        printed, expected, _ = execute(block, (f'snapshot_download("{REPO_ID}")', repr(str(tmp_path / "export"))))
        assert numbers(printed) == pytest.approx(numbers(expected), abs=2e-4)

    evaluator = InformationRetrievalEvaluator({"q1": {"video": video()}}, corpus, {"q1": {"d2"}})
    examples = measured_examples(model, evaluator, {})
    assert examples["similarities"]["source"] is None and examples["queries"][0] == ([], "a cat with hearts for eyes")
    assert json.dumps(examples)
