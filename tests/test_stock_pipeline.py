"""What stock Sentence-Transformers reads of a repository. Its vectors are compared in test_sentence_transformer.py."""

import json

import pytest
from support import tiny
from transformers import AutoConfig

from btok_hf import BTokSentenceTransformer
from btok_hf.stock_pipeline import STOCK_MODULES, modules, write_pipeline


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_the_mean_is_that_of_the_bottleneck_tokens(repos, backbone, tmp_path):
    config = AutoConfig.from_pretrained(repos[backbone])
    write_pipeline(tmp_path, config, None, {"prompts": {"passage": "P. "}}, {"transformers": {"specifier": ">=5.17"}})
    weights = read(tmp_path, "1_WordWeights/config.json")
    assert [index for index, word in enumerate(weights["vocab"]) if word == "B"] == config.btok_token_ids
    assert len(weights["vocab"]) == config.get_text_config().vocab_size and weights["unknown_word_weight"] == 0
    modalities = read(tmp_path, "sentence_bert_config.json")["modality_config"]
    assert {"text", "image", "message"} <= modalities.keys()
    assert ("video" in modalities) == (backbone not in ("idefics3", "smolvlm", "lfm2_vl"))
    saved = read(tmp_path, "config_sentence_transformers.json")
    assert saved["prompts"] == {"query": "", "document": "P. ", "passage": "P. "}  # what encode_document looks for
    assert saved["requirements"] == {"transformers": {"specifier": ">=5.17"}}


def test_settings_are_those_of_the_model(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu", truncate_dim=16, default_prompt_name="query")
    write_pipeline(tmp_path, model.transformer.config, model, None, {})
    saved = read(tmp_path, "config_sentence_transformers.json")
    assert (saved["truncate_dim"], saved["default_prompt_name"]) == (16, "query")
    assert saved["prompts"] == model.prompts and saved["similarity_fn_name"] == "cosine"


def test_modules_are_stock_classes_in_order():
    assert [(module["path"], module["type"]) for module in modules()] == list(STOCK_MODULES)
    assert all(module["type"].startswith("sentence_transformers.") for module in modules())
