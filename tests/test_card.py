"""The model card: metadata for the Hub's own parser, sections, snippets that print what they say."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support import tiny
from support.cards import (
    LAST_SECTIONS,
    REPO_ID,
    RUN_SECTIONS,
    SECTIONS,
    assert_well_formed,
    blocks,
    execute,
    numbers,
    section,
    sections,
)
from support.repositories import edit
from trl import TrlParser

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.hub_card.card import PLACEHOLDER, CardArguments, for_folder, for_hub, render_card
from btok_hf.hub_card.training_run import card_files


def test_metadata_is_complete_for_the_hubs_parser(trained):
    card = ModelCard.load(trained.folder / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en", "de"], ["org/pictures"])
    assert {"sentence-transformers", "bottleneck-tokens", "multimodal", "qwen2_vl"} <= set(data.tags)
    assert {"cosine_accuracy@1", "cosine_ndcg@10", "cosine_mrr@8"} <= set(data.metrics)
    assert data.base_model is None and "base_model_relation" not in data.to_dict()  # a local base
    assert card.text.lstrip().startswith("# Bottleneck-Token embedding model (qwen2_vl)")


def test_sections_come_in_order_and_are_well_formed(trained):
    card = trained.files["README.md"]
    assert sections(card) == SECTIONS + RUN_SECTIONS + LAST_SECTIONS
    assert_well_formed(card)
    assert "No training is recorded" not in card and "not evaluated" not in card
    lines = "".join(part for part in card.split("\n## Install")[0].splitlines(keepends=True))
    assert "One 64-dimensional vector" in lines and "K = 4 Bottleneck Tokens" in lines
    accuracy = trained.facts["after"]["pairs | of `run`_cosine_accuracy@1"]
    assert f"For {100 * accuracy:.1f} % of the queries of pairs \\| of \\`run\\` (8 queries, 8 candidates)" in lines
    assert "the first hit is a right answer." in lines  # the first 10 of 8 candidates would mean nothing
    assert '"sentence-transformers<7,>=6.2"' in section(card, "Install") and '"torchvision"' in section(
        card, "Install"
    )


def test_snippets_print_what_the_card_says(trained, monkeypatch):
    card, folder = trained.files["README.md"], repr(str(trained.folder))
    search, auto, memory, evaluate = blocks(card, "python")
    moved = for_hub(card, "org/other")  # hub_model_id may be a name without owner, and a folder is pushed twice
    assert REPO_ID not in moved and moved.count("org/other") == card.count(REPO_ID) == 5
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
    monkeypatch.chdir(Path(trained.file).parent)
    printed, _, namespace = execute(evaluate, (f'"{REPO_ID}"', folder))
    results = namespace["evaluator"](SentenceTransformer(str(trained.folder), device="cpu"))
    for metric, value in trained.facts["after"].items():
        assert results[metric] == pytest.approx(value, abs=1e-6)
        cell = metric.removeprefix("pairs | of `run`_").replace("_", r"\_")
        row = f"| {cell} | {trained.facts['before'][metric]:.4f} | {value:.4f} |"
        assert row in section(card, "Results")


def test_bad_statements_are_refused(trained):
    for wrong in ({"model_license": "other"}, {"license_name": "x"}, {"model_license": "mit", "license_link": "x"}):
        with pytest.raises(ValueError, match="model_license='other', license_name and license_link together"):
            CardArguments(**wrong)
    for wrong in ("Apache-2.0", "", "my licence"):
        with pytest.raises(ValueError, match=f"model_license must be an id .* got '{wrong}'"):
            CardArguments(model_license=wrong)
    for known in ("openrail++", "bsl-1.0", "cc-by-nc-sa-4.0", "llama3.1"):
        CardArguments(model_license=known)
    for name, link in (("", "LICENSE.md"), (" ", "LICENSE.md"), ("a", ""), ("a", "a b"), ("a", "<a>")):
        with pytest.raises(ValueError, match="license_name must be a name and license_link an address"):
            CardArguments(model_license="other", license_name=name, license_link=link)
    with pytest.raises(ValueError, match=r"languages must be ISO 639 codes .* got 'English'"):
        CardArguments(languages=["en", "English"])
    with pytest.raises(ValueError, match=r"data_licenses must name the datasets \['pairs.*got \['picures'\]"):
        card_files(trained.trainer, CardArguments(data_licenses={"picures": "mit"}), **trained.facts)
    with pytest.raises(ValueError, match="are needed together"):
        card_files(trained.trainer, **{**trained.facts, "before": None})


def test_statements_are_flags_and_keys_of_the_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("languages: [en, de]\ndata_licenses:\n  a: mit\n")
    parser = TrlParser((CardArguments,))
    (arguments,) = parser.parse_args_and_config(["--config", str(tmp_path / "c.yaml"), "--model_license", "mit"])
    assert arguments == CardArguments(model_license="mit", languages=["en", "de"], data_licenses={"a": "mit"})
    flags = ["--languages", "en", "de", "--data_licenses", '{"a": "mit"}', "--model_license", "mit"]
    assert TrlParser((CardArguments,)).parse_args_and_config(flags) == (arguments,)


@pytest.mark.parametrize("backbone, num_tokens", [("qwen3_vl", 4), ("qwen3_vl", 0), ("idefics3", 4), ("lfm2_vl", 4)])
def test_an_untrained_model_says_so(bases, tmp_path, backbone, num_tokens):
    repo = add_bottleneck_tokens(bases[backbone], tmp_path / "repo", num_tokens=num_tokens)
    card = (repo / "README.md").read_text("utf-8")
    assert sections(card) == SECTIONS + LAST_SECTIONS
    assert_well_formed(card)
    assert "**No training is recorded for these weights.**" in card and "No training data is recorded." in card
    assert f"| Bottleneck Tokens (K) | {num_tokens} |" in card
    assert ("baseline (K = 0)" in card) == (num_tokens == 0) == ("at the EOS token that ends every row" in card)
    # 32 x 32 pixels a token; four tiles of four tokens each, and a view of the whole of four or up to six.
    most = {
        "qwen3_vl": "| 16,384 (default) | 16 |",
        "idefics3": '| {"longest_edge": 56} (default) | 20 |',
        "lfm2_vl": "| 4 (default) | 22 |",
    }
    assert most[backbone] in card and ("a video (frames with their metadata" in card) == (backbone in tiny.WITH_VIDEO)
    assert set(ModelCard(card).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for block in blocks(card, "python"):
        printed, expected, _ = execute(block, (f'"{PLACEHOLDER}"', repr(str(repo))))
        assert not expected and len(numbers(printed)) in (0, 1, 6)


def test_the_card_of_a_stock_training_says_that_there_was_one(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    pairs = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)
    model.save_pretrained(str(tmp_path / "start"))
    assert "meaningless" in (tmp_path / "start" / "README.md").read_text("utf-8")  # only a trainer was made
    trainer.train()
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text("utf-8")
    assert "How these weights were trained is not described here, and they were not evaluated." in card
    assert "No training is recorded" not in card and "meaningless" not in card
    assert_well_formed(card)


def test_the_card_of_adapters_says_whether_they_were_trained(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    model.add_adapter(LoraConfig(r=2))
    model.save_pretrained(str(tmp_path / "new"))
    assert "No training is recorded" in (tmp_path / "new" / "README.md").read_text("utf-8")
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(values)
    model.save_pretrained(str(tmp_path / "adapters"))
    loaded = BTokSentenceTransformer(tmp_path / "adapters", device="cpu")
    export_model(loaded, tmp_path / "export")
    for folder in ("adapters", "export"):
        assert "How these weights were trained is not desc" in (tmp_path / folder / "README.md").read_text("utf-8")


def test_a_converted_model_that_was_trained_is_not_called_converted_alone(repo):
    model = BTokSentenceTransformer(repo, device="cpu")
    config = type(model.config).from_dict(model.config.to_dict())
    config.btok_converted_from = {"checkpoint": "a/b", "revision": None}
    first, then = (render_card(config, model.processor, {}, trained=trained) for trained in (False, True))
    assert "These weights were converted, and not evaluated" in first and "run `btok verify" in first
    assert "These weights were converted, and" not in then and "How these weights were trained is not" in then
    assert "converted with `btok convert`, and trained since." in then and "run `btok verify" not in then


def test_base_limits_and_prompts_are_named(trained):
    config = type(trained.trainer.model.config).from_dict(trained.trainer.model.config.to_dict())
    config.btok_base_model, config.btok_base_revision = "Qwen/Qwen2-VL-2B-Instruct", "abc123"
    processor = copy.deepcopy(trained.trainer.model.processor)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 3 * 784}
    card = render_card(config, processor, {"query": "a | b", "document": ""})
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "finetune")
    assert (
        "(https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct), revision abc123. Its licence: not recorded here" in card
    )
    assert "| prompt query | a \\| b |" in card and "prompt document" not in card
    assert re.findall(r"^\| [\d,]+.* \| (\d+) \|$", section(card, "Memory"), flags=re.M) == ["3", "1"]


def test_snippets_embed_alike_with_dimensions_cut_and_prompts_by_other_names(bases, tmp_path):
    repo = add_bottleneck_tokens(bases["qwen2_vl"], tmp_path / "repo", prompts={"query": "Find.", "passage": "Read."})
    card = (repo / "README.md").read_text("utf-8")
    assert '{"role": "system", "content": "Read."}' in card and "| prompt document | Read. |" in card

    model = BTokSentenceTransformer(repo, device="cpu", truncate_dim=16)
    export_model(model, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text("utf-8")
    assert "One 16-dimensional vector" in card and "| dimensions | 64, cut to 16 (`truncate_dim`) |" in card
    here = (f'"{PLACEHOLDER}"', repr(str(tmp_path / "export")))
    (search, auto, *_) = blocks(card, "python")
    _, _, found = execute(search, here)
    assert found["queries"].shape == (2, 16)
    printed, _, vectors = execute(auto, here)
    assert vectors["embeddings"][0].shape == (16,)
    cosine = float(found["model"].similarity(found["queries"], found["documents"])[0, 0])
    assert numbers(printed) == pytest.approx([cosine], abs=1e-4)
    whole = render_card(model.config, model.processor, model.prompts, truncate_dim=64)
    assert "| dimensions | 64 |" in whole and "truncate_dim" not in whole


@pytest.mark.parametrize("order", ["media_first", "as_given"])
def test_the_card_says_what_is_cut_of_long_rows(bases, tmp_path, order):
    base = shutil.copytree(bases["qwen2_vl"], tmp_path / "base")
    edit(base, "tokenizer_config.json", lambda saved: saved.pop("model_max_length"))
    repo = add_bottleneck_tokens(base, tmp_path / "repo", order=order)
    card = (repo / "README.md").read_text("utf-8")
    model = BTokSentenceTransformer(repo, device="cpu")
    positions = model.config.get_text_config().max_position_embeddings
    assert f"| longest row in tokens | {positions:,} |" in card and model.max_seq_length == positions
    assert SentenceTransformer(str(repo), device="cpu").max_seq_length == positions
    assert ("Longer rows with media are refused." in card) == (order == "media_first")
    assert ("So is text before media; media that would be cut are refused." in card) == (order == "as_given")


@pytest.mark.parametrize("images", [[], ["assets/a.png"]])
def test_on_the_hub_snippets_name_the_repository(model, images):
    examples = {"queries": [(images, "a")], "documents": [([], "b"), ([], "c")]}
    card = render_card(model.config, model[0].processor, model.prompts, examples=examples)
    pushed = for_hub(card, "org/model")
    assert PLACEHOLDER in card and PLACEHOLDER not in pushed
    assert pushed == render_card(
        model.config, model[0].processor, model.prompts, examples=examples, repo_id="org/model"
    )
    code = "".join(blocks(pushed, "python"))
    assert code.count('folder = snapshot_download("org/model")') == (2 if images else 0)
    assert code.count("from huggingface_hub import snapshot_download\n") == (2 if images else 0)
    assert for_hub(pushed, "org/other") == for_hub(card, "org/other") != pushed  # pushed on to another
    assert for_folder(pushed, "org/model") == card and for_folder(pushed, "org/other") == pushed
    for written in ("A card of one's own.\n", 'model = SentenceTransformer("org/model")\n'):
        assert for_hub(written, "org/other") == written
