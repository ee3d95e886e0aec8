"""The training script and `btok train`: recipes, flags, a run from base to export, a push."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from sentence_transformers import SentenceTransformer
from support import ROOT
from support.media import image
from support.publishing import LOAD, head, served
from support.repositories import TEXTS, contents
from support.training import config, text_pairs
from transformers import TrainerCallback
from trl import TrlParser, get_peft_config

from btok_hf import BTokSentenceTransformer, cli
from btok_hf.hub_card.card import CardArguments
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.checkpoints import checkpoint_to_resume
from btok_hf.training.evaluator import metric_names, retrieval_evaluator
from btok_hf.training.mixture import read_mixture
from btok_hf.training.sources import SOURCES
from btok_hf.training.train import (
    ModelArguments,
    ScriptArguments,
    adapters_of,
    find_recipe,
    main,
    parse,
    set_up,
)


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "training" / "recipes").glob("[!m]*.yaml")))
def test_recipes_are_read(recipe, tmp_path):
    """Every key is an argument, and the paper's recipes have the paper's values."""
    classes = (ScriptArguments, CondensationConfig, ModelArguments, CardArguments)
    flags = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    script, args, model_args, _ = TrlParser(classes).parse_args_and_config(
        ["--config", str(ROOT / "training" / "recipes" / recipe), *flags]
    )
    if recipe.startswith("btok"):
        mixture = read_mixture(script.train_files)
        assert len(mixture) == 25 and set(mixture) <= set(SOURCES)
        assert script.num_tokens in (4, None)  # the default is 4 for a base model
        assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (16, 32, 0)
        assert (args.temperature, args.learning_rate, args.warmup_steps) == (0.02, 5e-5, 100)
        assert (args.condensation_weight, args.condensation_steps, args.max_steps) == (5.0, 2000, 5000)
        assert get_peft_config(model_args).target_modules is None


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ROOT / "training" / "recipes" / "emoji.yaml"
    assert find_recipe("emoji") == find_recipe("emoji.yaml") == own
    (tmp_path / "emoji.yaml").touch()
    assert str(find_recipe("emoji.yaml")) == "emoji.yaml" and find_recipe("emoji") == own
    with pytest.raises(FileNotFoundError, match=r"not one of this library's recipes: btok_qwen2_5vl_3b, "):
        find_recipe("recipes/emoji.yaml")


SCRIPT = ROOT / "training" / "train.py"
BEST = "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 1\nsave_steps: 1\n"


@pytest.mark.parametrize("lora", [False, True])
def test_the_script_trains_evaluates_and_exports(repo, tmp_path, lora, monkeypatch, capsys):
    """Full training with the script, adapters with the command."""
    features = Features({"query": Value("string"), "positive": Image()})
    pairs = {"query": [f"picture {i}" for i in range(8)], "positive": [image(40, 40, i) for i in range(8)]}
    for name in ("pairs", "eval_pairs"):  # the Trainer does not put its "eval_" in front of the second
        Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {repo}\n"
        f"train_files:\n  pictures: {tmp_path}/pairs.parquet\n"
        f"eval_file: {tmp_path}/eval_pairs.parquet\n"
        f"output_dir: {tmp_path}/unused\n"
        + ("metric_for_best_model: eval_pairs_cosine_recall@1\n" if lora else BEST)
        + "condense:\n  pictures: query\n"
        "per_device_train_batch_size: 4\nmax_steps: 2\nlogging_steps: 1\nreport_to: none\nuse_cpu: true\n"
    )
    output = tmp_path / "model"
    flags = ["--output_dir", str(output), "--model_license", "apache-2.0", *(["--use_peft"] if lora else [])]
    arguments = ["--config", str(tmp_path / "config.yaml"), *flags]
    if lora:
        monkeypatch.setattr(sys, "argv", ["btok", "train", *arguments])
        assert cli.main() == 0
        text = capsys.readouterr().out
    else:
        run = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        text = run.stdout
    assert "before" in text and "Exported to" in text
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["eval_pairs_cosine_recall@1"]) == {"before", "after"}
    if not lora:  # with the evaluator's own metric, of which more is better
        state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
        scores = [log[key] for log in state["log_history"] if (key := "eval_pairs_cosine_ndcg@10") in log]
        assert state["best_metric"] == max(scores[-2:]) and state["best_model_checkpoint"]
    assert not list(output.glob("*.bin")) and not (output / "adapter_config.json").exists()
    card = (output / "README.md").read_text()
    assert (
        "license: apache-2.0" in card
        and "| pictures | training | 8 rows |" in card
        and "8 queries, 8 candidates" in card
    )
    assert SentenceTransformer(str(output), device="cpu").encode(["picture 1"]).shape == (1, 64)


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit", "--attn_implementation=sdpa"])
def test_flags_that_would_change_nothing_are_refused(repo, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model_name_or_path", repo, "--train_files", "none.csv", flag])
    with pytest.raises(ValueError, match=rf"{flag[2:].partition('=')[0]} is not supported: .* Remove"):
        main()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--load_best_model_at_end", "--save_strategy", "no"])
    with pytest.raises(ValueError, match="nothing is evaluated: set eval_file"):
        main()


@pytest.mark.parametrize("names", ["q_proj", "self_attn.q_proj", "q_proj k_proj", "all-linear", ".*layers.0.*q_proj"])
def test_adapters_are_those_of_the_names_that_are_given(repo, names):
    """TRL turns one name into a text, which PEFT reads as a pattern of whole names, and finds nothing."""
    *_, model_args, _ = parse(["--use_peft", "--lora_target_modules", *names.split()])
    model = BTokSentenceTransformer(repo, device="cpu")
    model.add_adapter(adapters_of(model_args))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert "q_proj" in adapted and ("k_proj" in adapted) == (names in ("q_proj k_proj", "all-linear"))


def test_training_pushes_what_everybody_loads(hub, bases, tmp_path):
    """From a base without Bottleneck Tokens to the Hub, with a push that fails in the middle of training."""
    pairs = [{"query": f"find {word}", "positive": f"{word} thing"} for word in ("red", "old", "tall", "wet")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    out = tmp_path / "out"
    command = [
        *(SCRIPT, "--model_name_or_path", bases["qwen2_vl"], "--train_files", tmp_path / "pairs.jsonl"),
        *("--eval_file", tmp_path / "pairs.jsonl", "--output_dir", out, "--use_cpu", "--use_peft", "--max_steps", "2"),
        *("--save_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "4"),
        *("--report_to", "none", "--disable_tqdm", "true"),
        *("--push_to_hub", "--hub_model_id", "org/trained", "--hub_strategy", "every_save"),
    ]
    hub.faults["fail_commit"] = 1
    with ThreadPoolExecutor(1) as pool:  # in parallel, because most of the time is imports
        without_login = [tmp_path / "refused" if part == out else part for part in command]
        refused = pool.submit(hub.run, *without_login, home=tmp_path / "other", token=None, check=False)
        run = hub.run(*command, home=tmp_path / "home")
    refused = refused.result()
    assert refused.returncode and "push_to_hub needs a Hub login" in refused.stderr
    assert not (tmp_path / "refused" / "start").exists() and (out / "start").exists()

    assert hub.faults.pop("fail_commit") <= 0  # the fault happened
    assert "The upload to org/trained failed" in run.stderr and "Retry with: btok push" in run.stderr
    url = run.stdout.split("Pushed to ")[-1].split()[0]
    assert url == f"{hub.endpoint}/org/trained/commit/{head(hub, 'org/trained')}"
    pushed = served(hub, "org/trained")
    assert pushed.items() <= contents(out).items()
    assert not any(name.startswith(("checkpoint-", "start/")) or name.endswith((".bin", ".pt")) for name in pushed)
    assert b"--hub_model_id org/trained" in pushed["README.md"] and b"assets/loss.png" in pushed["README.md"]

    expected = BTokSentenceTransformer(out, device="cpu").encode(TEXTS)
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(hub.run, "-m", "btok_hf", "verify", "org/trained", home=tmp_path / "empty")
        online = hub.run("-c", LOAD, "org/trained", home=tmp_path / "other").stdout
    verified.result()
    assert all(np.abs(np.array(array) - expected).max() <= 1e-6 for *_, array in json.loads(online.splitlines()[-1]))


def run_as_script(*arguments, monkeypatch):
    """`python training/train.py` in this process, which has imported everything."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run_as_command(*arguments, monkeypatch):
    """`btok train`."""
    return cli.main(["train", *arguments])


MODEL = ["--model_name_or_path", "base", "--train_files"]
NO_DATA = ["--train_files", "none.csv"]
BOTH = pytest.mark.parametrize("run", [run_as_script, run_as_command])


@BOTH
def test_training_script_shows_its_flags(run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help", monkeypatch=monkeypatch)
    assert not ended.value.code
    text = capsys.readouterr().out
    for flag in (
        "--condensation_weight",
        "--condense",
        "--mini_batch_size",
        "--lora_r",
        "--push_to_hub",
        "--eval_file",
    ):
        assert flag in text


@BOTH
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: Set model_name_or_path"),
        (["--model_name_or_path", "x", "--train_files", "none.csv", "--load_in_4bit"], "error: load_in_4bit is not"),
        ([*MODEL, "missing.csv"], "error: Pair file 'missing.csv' does not exist. Check the path"),
        ([*MODEL, "missing.yaml"], "error: Mixture file 'missing.yaml' does not exist, here or among"),
        ([*MODEL, "empty.jsonl"], "error: Pair file 'empty.jsonl' is empty"),
        ([*MODEL, "broken.jsonl"], "error: Pair file 'broken.jsonl' cannot be read"),
        ([*MODEL, "list.yaml"], "error: train_files must be a file, .* got .'a.csv'"),
        ([*MODEL, "broken.yaml"], "error: Mixture file 'broken.yaml' is not YAML"),
        ([*MODEL, "{}"], "error: train_files must be a file"),
        ([*MODEL, '{"a": 3}'], "error: Dataset 'a': a file must be a text, got 3"),
        ([*MODEL, '{"a": ["x.jsonl"]}'], "error: Dataset 'a': a file must be a text"),
        (
            ["--config", "missing.yaml"],
            "error: --config 'missing.yaml' is not a file and .*recipes: btok_.*, emoji[.]",
        ),
        (["--model_name_or_path", "none", *NO_DATA], "error: none is neither a local folder nor a readable Hub"),
        (["--model_name_or_path", "empty", *NO_DATA], "error: The folder empty has no weights"),
        (["--model_name_or_path", "other", *NO_DATA], "error: .*bert"),
        ([*MODEL, "none.csv", "--lora_r", "64"], "error: lora_r would change nothing without use_peft: all weights"),
        ([*MODEL, "none.csv", "--use_peft", "--lora_dropout", "0.1"], "error: lora_dropout must be 0, got 0.1"),
        ([*MODEL, "none.csv", "--data_licenses", '{"nobody": "MIT"}'], "error: data_licenses must name the datasets"),
        (["--config", "broken.yaml"], "error: The file of --config is not YAML"),
        ([*MODEL, "pairs.jsonl", "--resume_from_checkpoint", "true"], "error: There is no checkpoint in"),
        (
            [*MODEL, "pairs.jsonl", "--resume_from_checkpoint", "nope"],
            "error: Checkpoint 'nope' cannot be resumed from: it is not complete",
        ),
    ],
)
def test_bad_arguments_are_one_line(run, arguments, message, bases, monkeypatch, tmp_path):
    """Those of model and flags before those of the data, which may take an hour to load."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(bases["qwen2_vl"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "empty")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"query": "a", "posi')
    (tmp_path / "list.yaml").write_text("- a.csv\n")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(SystemExit, match=f"^{message}") as ended:
        run(*arguments, monkeypatch=monkeypatch)
    assert "\n" not in ended.value.code


@BOTH
def test_unknown_flags_and_keys_are_arguments_that_make_no_sense(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("no_such_key: 1\n")
    recipe = str(tmp_path / "recipe.yaml")
    for arguments in (["--no_such_flag", "1"], ["--config", recipe], [f"--config={recipe}"]):
        with pytest.raises(SystemExit) as ended:
            run(*arguments, monkeypatch=monkeypatch)
        assert ended.value.code == 2 and "error: unrecognized arguments: --no_such_" in capsys.readouterr().err


@BOTH
def test_an_error_in_training_keeps_its_traceback(run, repo, tmp_path, monkeypatch):
    def train(self, **kwargs):
        raise ValueError("in training")

    monkeypatch.setattr(CondensationTrainer, "train", train)
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    arguments = ["--model_name_or_path", repo, "--train_files", str(tmp_path / "pairs.jsonl"), "--use_cpu", "true"]
    with pytest.raises(ValueError, match=r"^in training$"):
        run(*arguments, "--output_dir", str(tmp_path / "out"), "--report_to", "none", monkeypatch=monkeypatch)


@BOTH
def test_debug_shows_where_an_error_was_raised(run, bases, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(bases["qwen2_vl"])
    with pytest.raises(FileNotFoundError, match=r"missing\.csv"):
        run(*MODEL, "missing.csv", "--debug", monkeypatch=monkeypatch)


def test_metrics_are_known_before_anything_is_evaluated(repo, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}\n')
    evaluator = retrieval_evaluator(str(tmp_path / "pairs.jsonl"))
    model = BTokSentenceTransformer(repo, device="cpu")
    names = metric_names(evaluator, model)
    assert set(names) == set(evaluator(model))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "max_steps": 1}

    def trainer(evaluator, evaluated=None, **options):
        args = config(tmp_path, **best, **options)
        data = {"train_dataset": text_pairs(4), "eval_dataset": evaluated}
        return CondensationTrainer(model=model, args=args, evaluator=evaluator, **data)

    chosen = trainer(evaluator).args
    assert chosen.metric_for_best_model == "pairs_cosine_ndcg@10" and chosen.greater_is_better
    trainer(evaluator, metric_for_best_model="eval_pairs_cosine_recall@1")
    with pytest.raises(ValueError, match=r"must be one of pairs_cosine_accuracy@1, .*got 'nonsense'"):
        trainer(evaluator, metric_for_best_model="nonsense")
    with pytest.raises(ValueError, match=r"no eval_dataset to measure it on. Name a metric of the evaluator"):
        trainer([evaluator, evaluator])
    several = {"a": text_pairs(4), "b": text_pairs(4)}
    for given in (evaluator, None):
        with pytest.raises(ValueError, match=r"must be one of a_loss, b_loss.*got 'loss'"):
            trainer(given, several)
        assert trainer(given, several, metric_for_best_model="eval_b_loss").args.greater_is_better is False
        with pytest.raises(ValueError, match=r"must be one of loss.*got 'ndcg@10'"):
            trainer(given, text_pairs(4), metric_for_best_model="ndcg@10")
    assert trainer(evaluator, text_pairs(4)).args.metric_for_best_model == "loss"  # as in transformers


@pytest.mark.parametrize(
    ("metric", "mode"),
    [(None, "max"), ("pairs_cosine_map@100", "max"), ("loss", "min")],
    ids=["default", "map", "loss"],
)
def test_a_scheduler_that_waits_for_a_plateau_knows_which_way_the_metric_goes(repo, tmp_path, metric, mode):
    args = config(
        tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", metric_for_best_model=metric
    )
    data = {"train_dataset": text_pairs(4), "eval_dataset": text_pairs(4) if metric == "loss" else None}
    evaluator, model = retrieval_evaluator(text_pairs(4)), BTokSentenceTransformer(repo, device="cpu")
    trainer = CondensationTrainer(model=model, args=args, evaluator=evaluator, **data)
    trainer.create_optimizer_and_scheduler(1)
    assert trainer.lr_scheduler.mode == mode


def test_a_run_that_is_stopped_exports_nothing(repo, tmp_path):
    """A scheduler sends SIGTERM before it takes the machine away."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # transformers waits three seconds before it writes the checkpoint

    text_pairs().to_parquet(tmp_path / "pairs.parquet")
    out = tmp_path / "out"
    flags = {"model_name_or_path": repo, "train_files": tmp_path / "pairs.parquet", "output_dir": out, "max_steps": 20}
    flags |= {"enable_jit_checkpoint": "true", "report_to": "none", "use_cpu": "true", "save_strategy": "no"}
    job = set_up([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    job.trainer.add_callback(Stop())
    with pytest.raises(RuntimeError, match=r"step \d+ of 20, so nothing is exported. Go on .*--resume_from"):
        job.run()
    assert checkpoint_to_resume(True, str(out), saves=True) and not (out / "README.md").exists()


@pytest.mark.parametrize("content", ["3: 4\n", "null: 1\n"])
def test_a_recipe_is_a_mapping_of_names(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"The file of --config must hold names of flags"):
        set_up(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("wrong", [{"seed": [1]}, {"max_pixels": {"a": 1}}])
def test_values_of_a_wrong_type_are_named_before_training(repo, tmp_path, wrong):
    """transformers and TRL do not check the types of a recipe's values."""
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 4)
    recipe = {
        "model_name_or_path": repo,
        "train_files": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "use_peft": True,
        **wrong,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises((ValueError, OSError)):
        set_up(["--config", str(tmp_path / "recipe.yaml")])
