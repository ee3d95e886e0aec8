"""Model cards: a trained model with its card, and the card's parts."""

import contextlib
import io
import re
from types import SimpleNamespace

from datasets import Dataset, Features, Image, Value
from huggingface_hub import ModelCard
from peft import LoraConfig

from btok_hf import BTokSentenceTransformer, export_model
from btok_hf.hub_card.card import CardArguments
from btok_hf.hub_card.training_run import card_files
from btok_hf.training import CondensationConfig, CondensationTrainer
from btok_hf.training.evaluator import retrieval_evaluator
from support.media import image

TOKEN = "hf_" + "aB3" * 12

REPO_ID = "org/tiny-btok"

SECTIONS = ["Install", "Use with Sentence-Transformers", "Use with transformers", "Memory", "Architecture"]

RUN_SECTIONS = ["Results", "Training"]

LAST_SECTIONS = ["Training data and licences", "Limitations", "Citation"]

# Texts that would break Markdown, YAML or Python without quoting.
NASTY = [
    "a | \"double\" and 'single' \\ back\\slash {{ jinja }} {% raw %} <|im_end|>",
    "```\nfence: - [x]\n---\n# heading",
    *("<b>html</b>", "naïve ☃ *stars* _under_ `ticks` $$x$$ &amp;", "third: 'yaml' # no", "plain", "more", "last"),
]


def train_with_card(repo, folder):
    """A short run on text → image pairs, evaluated before and after, exported with its card."""
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
    """Fenced blocks of a language. A block ends at a line of at least as many backticks, as in CommonMark."""
    return [code for _, code in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1`*$", card, flags=re.M | re.S)]


def section(card, name):
    return card.split(f"\n## {name}\n")[1].split("\n## ")[0]


def execute(block, *replacements):
    """What a block prints, what its last comments say that it prints, and its variables."""
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
    """No value is missing, table rows have the columns of their head, and Python blocks compile."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1`*$", "block", card, flags=re.M | re.S)
    for wrong in ("None", "nan", "Undefined", "{{", "{%", "\n\n\n"):
        assert wrong not in re.sub(r"\\.", "", text), wrong
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    for block in blocks(card, "python"):
        compile(block, "README.md", "exec")
    ModelCard(card)
