"""Exports: every tensor, further files, and adapters whose base is on the Hub."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from support import tiny
from support.repositories import TEXTS, add_noise, contents, differences

import btok_hf
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_adapters, export_model
from btok_hf.files import write_files
from btok_hf.hub_card.card import apache_license
from btok_hf.training import CondensationLoss


@pytest.mark.parametrize("untied", [False, True])
def test_export_keeps_the_head_and_every_tensor(tmp_path, untied):
    from transformers import AutoModelForImageTextToText

    base = tiny.build("qwen2_vl", tmp_path / "base", tied=not untied)
    repo = add_bottleneck_tokens(base, tmp_path / "repo")
    export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path / "export")
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (repo, tmp_path / "export"))
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name


def test_an_earlier_export_in_other_files_leaves_no_weights_behind(repo, tmp_path):
    """Loaders would prefer the old weights, and a push would upload both."""
    model = BTokSentenceTransformer(repo, device="cpu")
    expected = model.encode(["one"])
    changed = BTokSentenceTransformer(repo, device="cpu")
    with torch.no_grad():
        changed[0].model.language_model.norm.weight.mul_(torch.rand(64) + 0.5)
    for first, then in (("50GB", "100KB"), ("100KB", "50GB")):
        export_model(changed, tmp_path / first, max_shard_size=first)
        export_model(model, tmp_path / first, max_shard_size=then)
        assert (tmp_path / first / "model.safetensors").exists() == (then == "50GB")
        again = BTokSentenceTransformer(str(tmp_path / first), device="cpu").encode(["one"])
        np.testing.assert_allclose(again, expected, atol=2e-6)


def test_a_model_saved_over_an_export_has_no_golden_vectors_of_other_weights(repo, copied):
    assert (copied / "golden.json").exists()
    BTokSentenceTransformer(repo, device="cpu").save_pretrained(str(copied))
    assert not (copied / "golden.json").exists()


def test_a_repository_names_the_release_that_it_needs(repos, tmp_path):
    model = BTokSentenceTransformer(repos["idefics3"], device="cpu")
    for size, specifier in ((7, ">=5.17,<6"), (5, ">=5.21,<6")):  # 4 and 5 patches a side
        model[0].model.config.vision_config.patch_size = size
        model.save(tmp_path / "repo")
        saved = json.loads((tmp_path / "repo" / "config_sentence_transformers.json").read_text())
        assert saved["requirements"]["transformers"]["specifier"] == specifier


def test_adapters_with_a_base_on_the_hub(hub, exported, with_adapters, tmp_path):
    expected = with_adapters.encode(TEXTS)
    with_adapters.save_pretrained(str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match=r"base_model must be a Hub id, got .*Push the repository"):
        export_adapters(with_adapters, tmp_path / "wrong")
    for base in (str(exported), "no-namespace", "a/b/c"):
        with pytest.raises(ValueError, match="must be a Hub id"):
            export_adapters(with_adapters, tmp_path / "wrong", base)
    with pytest.raises(ValueError, match="contains a merged model"):
        export_adapters(with_adapters, exported, "org/start")
    with pytest.raises(ValueError, match="has no adapters"):
        export_adapters(BTokSentenceTransformer(exported, device="cpu"), tmp_path / "wrong", "org/start")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match=r"must be a Hub id, got .* nobody else"):
        btok_hf.push(tmp_path / "checkpoint", "org/lora")

    home, lora = tmp_path / "home", tmp_path / "lora"
    hub.run("-m", "btok_hf", "push", exported, "org/start", home=home)
    arguments = (
        "-m",
        "btok_hf",
        "export",
        tmp_path / "checkpoint",
        lora,
        "--adapter_only",
        "--base_model",
        "org/start",
    )
    hub.run(*arguments, home=home)
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/start"
    assert not (lora / "config.json").exists() and not list(lora.glob("model*")) and not list(lora.glob("golden*"))
    card = (lora / "README.md").read_text("utf-8")
    assert "base_model: org/start\n" in card and "base_model_relation: adapter\n" in card and '"peft"' in card
    assert "AutoModel.from_pretrained" not in card and "modeling_btok" not in card and "transformers>=5.18" in card
    hub.run("-m", "btok_hf", "push", lora, "org/lora", home=home)
    add_noise(lora, 0.3)
    hub.run("-m", "btok_hf", "push", lora, "org/lora", "--revision", "v2", home=home)
    # Before 5.18, stock loaders refuse adapters: tests/test_adapters.py.
    stock = "SentenceTransformer, " if Version(transformers.__version__) >= Version("5.18") else ""
    code = (
        "import json, sys\n"
        "from sentence_transformers import SentenceTransformer\n"
        "from btok_hf import BTokSentenceTransformer\n"
        f"models = [kind('org/lora', device='cpu') for kind in ({stock}BTokSentenceTransformer,)]\n"
        "models += [BTokSentenceTransformer('org/lora', device='cpu', revision='v2')]\n"
        "print('\\n' + json.dumps([model.encode(json.loads(sys.argv[1])).tolist() for model in models]))\n"
    )
    run = hub.run("-c", code, json.dumps(TEXTS), home=tmp_path / "empty")
    *vectors, other = np.array(json.loads(run.stdout.splitlines()[-1]))
    assert all(np.abs(loaded - expected).max() <= 2e-6 for loaded in vectors)
    assert np.abs(other - expected).max() > 1e-3


def test_further_files_replace_the_default_card(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    files = {"README.md": "---\nlicense: mit\n---\né", "LICENSE": "text", "assets/a/x.bin": b"\x00\xff"}
    folder = export_model(model, tmp_path / "model", files=files)
    assert (folder / "README.md").read_text("utf-8") == files["README.md"]
    assert (folder / "assets" / "a" / "x.bin").read_bytes() == b"\x00\xff"


def test_a_model_that_is_saved_again_keeps_its_card(repo, tmp_path, caplog):
    """With licence and pictures; what the card names beside pictures does not replace what was just written."""
    card = '---\nlicense: mit\n---\nR@1 61 ![loss](assets/loss.png) [notes](notes.txt) {folder}/assets/a.b.jpg"'
    card += " ![up](../secret.png) ![url](https://a.example/x.png) ![gone](gone.png)"
    files = {"README.md": card, "LICENSE": "MIT", "assets/loss.png": b"1", "assets/a.b.jpg": b"2"}
    first = export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path / "first", files=files)
    (tmp_path / "secret.png").write_bytes(b"3")
    (first / "notes.txt").write_text("x")
    model = BTokSentenceTransformer(first, device="cpu")
    again = export_model(model, tmp_path / "again")
    assert "shows gone.png, which cannot be found there" in caplog.text
    model.save_pretrained(str(tmp_path / "saved"))
    for folder in (again, tmp_path / "saved"):
        assert all(
            (folder / name).read_bytes() == (first / name).read_bytes()
            for name in ("README.md", "LICENSE", "assets/loss.png", "assets/a.b.jpg")
        )
        assert not (folder / "notes.txt").exists() and not (folder / "gone.png").exists()
    export_model(model, tmp_path / "named", files={"README.md": "mine"})
    assert not (tmp_path / "named" / "LICENSE").exists()

    changes = ({"prompts": {"query": "Another."}}, {"prompts": {"more": "One more."}}, {"max_seq_length": 99})
    changes += ({"default_prompt_name": "query"}, {"truncate_dim": 8}, {"processor_kwargs": {"max_pixels": 3136}})
    for options in changes:
        caplog.clear()
        other = export_model(BTokSentenceTransformer(first, device="cpu", **options), tmp_path / "other")
        assert "No training is recorded" in (other / "README.md").read_text("utf-8")
        assert f"The README.md of {first} is not kept" in caplog.text


def test_another_card_takes_away_what_an_earlier_one_brought(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    brought = {"LICENSE": apache_license(), "assets/example_2.png": b"2", ".eval_results/x.yaml": "score: 61"}
    mine = {"assets/example_mine.png": b"3", "notes.txt": "x"}
    folder = export_model(model, tmp_path, files={"README.md": "one", **brought, **mine})
    export_model(model, tmp_path, files={"README.md": "one"})
    assert all((folder / name).exists() for name in (*brought, *mine))
    export_model(model, tmp_path, files={"README.md": "two", "assets/example_2.png": b"4"})
    assert {name for name in brought if (folder / name).exists()} == {"assets/example_2.png"}
    assert all((folder / name).exists() for name in mine)
    (folder / "LICENSE").write_text("MIT")
    export_model(model, tmp_path)
    assert (folder / "LICENSE").read_text() == "MIT" and not (folder / "assets" / "example_2.png").exists()


def test_the_card_of_a_model_that_changed_is_not_kept(exported, with_adapters, tmp_path, caplog):
    model = BTokSentenceTransformer(exported, device="cpu")
    assert model.kept_card() is not None
    model.encode(["a"])
    model.half()
    assert model.kept_card() is not None
    model = BTokSentenceTransformer(exported, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # a training loop of one's own
    model(model.preprocess(["a"]))["sentence_embedding"][0, 0].backward()
    optimizer.step()
    assert model.kept_card() is None and "it describes other weights" in caplog.text
    model = BTokSentenceTransformer(exported, device="cpu")
    model[0].model.get_input_embeddings().weight.data[model.config.btok_token_ids[0], 0] += 1e-3
    assert model.kept_card() is None
    model = BTokSentenceTransformer(exported, device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.kept_card() is None
    with_adapters.save_pretrained(str(tmp_path / "adapters"))
    model = BTokSentenceTransformer(tmp_path / "adapters", device="cpu")
    model[0].model.delete_adapter("default")
    assert model.kept_card() is None  # it tells how to load adapters


def test_a_saved_repository_truncates_nothing_by_itself(repo, tmp_path):
    """What the tokenizer was set to by the last call is not saved: every loader's max_seq_length is obeyed."""
    model = BTokSentenceTransformer(repo, device="cpu", max_seq_length=12)
    model.encode(["a text that is longer than twelve tokens", "short"])
    export_model(model, tmp_path / "model")  # with golden vectors of longer inputs
    assert model.max_seq_length == 12
    assert btok_hf.verify(tmp_path / "model") <= 1e-6
    state = json.loads((tmp_path / "model" / "tokenizer.json").read_text("utf-8"))
    assert state["truncation"] is None and state["padding"] is None
    for length in (8, 30):
        for cls in (BTokSentenceTransformer, SentenceTransformer):
            loaded = cls(str(tmp_path / "model"), device="cpu")
            loaded.max_seq_length = length
            assert loaded.preprocess(["long " * 20])["input_ids"].shape[1] == length


def test_half_an_export_over_another_is_no_repository(exported, copied, repo, monkeypatch):
    """New weights beside the configuration and prompts of the old ones."""
    (copied / ".weights-killed").mkdir()
    (copied / ".weights-killed" / "model.safetensors").write_bytes(b"of an export that was killed")
    with monkeypatch.context() as patch:
        patch.setattr("btok_hf.export._write_config", None)
        with pytest.raises(TypeError):
            export_model(BTokSentenceTransformer(repo, device="cpu"), copied)
    with pytest.raises(ValueError, match=r"not an exported repository: .*modules\.json missing"):
        btok_hf.push(copied, "org/x")
    export_model(BTokSentenceTransformer(exported, device="cpu"), copied)
    assert contents(copied) == contents(exported)


def test_a_full_disk_leaves_a_repository_whole(copied, monkeypatch):
    before = contents(copied)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("btok_hf.export.write_weights", full)
    with pytest.raises(OSError, match="The disk is full"):
        export_model(BTokSentenceTransformer(copied, device="cpu"), copied)
    assert contents(copied) == before


def test_a_stock_model_is_refused_by_name(exported, tmp_path):
    with pytest.raises(ValueError, match=r"needs a btok_hf\.BTokSentenceTransformer, got SentenceTransformer"):
        export_model(SentenceTransformer(str(exported), device="cpu"), tmp_path / "out")


def test_a_failed_export_leaves_the_old_weights(repo, tmp_path, monkeypatch):
    """The folder that the model was loaded from: its weights are replaced when the new ones are complete."""
    folder = Path(shutil.copytree(repo, tmp_path / "model"))
    model = BTokSentenceTransformer(folder, device="cpu")
    before = (folder / "model.safetensors").read_bytes()

    def fail(shard, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("btok_hf.weights.save_file", fail)
        with pytest.raises(OSError, match="The disk is full"):
            export_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.glob(".weights*"))
    export_model(model, folder)
    assert max(differences(folder).values()) <= 1e-6


def test_further_modules_are_refused_instead_of_lost(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    model.append(Dense(64, 8))
    assert model.encode("a").shape == (8,)
    for write in (model.save_pretrained, lambda path: export_model(model, path)):
        with pytest.raises(ValueError, match="The model has 2 modules, but a repository holds the first alone"):
            write(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_adapters_are_saved_in_a_folder_of_their_own(copied, with_adapters, repo, tmp_path):
    """Beside a model nobody could load them, or a push would take both."""
    with pytest.raises(ValueError, match="contains a merged model"):
        with_adapters.save_pretrained(str(copied))
    assert not (copied / "adapter_config.json").exists()
    with_adapters.save_pretrained(str(tmp_path / "adapters"))
    saved = contents(tmp_path / "adapters")
    loaded = BTokSentenceTransformer(tmp_path / "adapters", device="cpu")
    with pytest.raises(ValueError, match=r"must not be where the adapters are from, got .*could not resume"):
        export_model(loaded, tmp_path / "adapters")
    with pytest.raises(ValueError, match="already holds a model"):
        add_bottleneck_tokens(repo, tmp_path / "adapters")
    assert contents(tmp_path / "adapters") == saved


def test_files_of_other_names_stay(repo, tmp_path):
    """Only those go that a loader would read as weights."""
    others = {
        "model_ema.safetensors": b"1",
        "model.fp16.safetensors": b"2",
        "adapter_notes.md": b"3",
        "adapter_x/y": b"4",
    }
    write_files(tmp_path, {**others, "adapter_model.safetensors": b"5"})
    export_model(BTokSentenceTransformer(repo, device="cpu"), tmp_path)
    found = contents(tmp_path)
    assert all(found[name] == content for name, content in others.items())
    assert "adapter_model.safetensors" not in found


def test_content_of_files_is_checked_before_anything_is_written(exported, copied):
    with pytest.raises(TypeError, match=r"files must hold str or bytes, got PosixPath for 'README\.md'"):
        export_model(BTokSentenceTransformer(exported, device="cpu"), copied, files={"README.md": Path("x")})
    assert contents(copied) == contents(exported)


def test_sizes_that_adapters_were_trained_for(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    CondensationLoss(model, matryoshka_dims=[32, 64])
    model.add_adapter(LoraConfig(r=2))
    model.save(tmp_path / "adapters")
    again = BTokSentenceTransformer(tmp_path / "adapters", device="cpu")
    again.save(tmp_path / "again")
    export_model(BTokSentenceTransformer(tmp_path / "again", device="cpu"), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["matryoshka_dimensions"] == [32, 64]
    assert "matryoshka_dimensions" not in (tmp_path / "merged" / "config_sentence_transformers.json").read_text()
    stock = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(stock.encode(TEXTS), again.encode(TEXTS), atol=2e-6)


def test_layers_that_peft_replaced_by_itself_are_not_saved(repo, tmp_path):
    model = BTokSentenceTransformer(repo, device="cpu")
    get_peft_model(model[0].model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"other tensors than a Qwen2VLFor.*model\.add_adapter"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_subfolder_is_a_folder(copied, exported, with_adapters, tmp_path):
    """Adapters that are added to it belong to it, not to the model around it."""
    add_noise(copied, 0.3)
    shutil.copytree(exported, copied / "inner")
    with_adapters.save_pretrained(str(copied / "lora"))
    model = BTokSentenceTransformer(copied, subfolder="inner", device="cpu")
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.save(tmp_path / "saved")
    for source, subfolder, expected in ((tmp_path / "saved", None, model), (copied, "lora", with_adapters)):
        loaded = BTokSentenceTransformer(source, subfolder=subfolder, device="cpu")
        np.testing.assert_allclose(loaded.encode(TEXTS), expected.encode(TEXTS), atol=2e-6)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nothing\. Correct subfolder"):
        BTokSentenceTransformer(copied, subfolder="nothing", device="cpu")


def test_a_card_is_found_from_another_folder(copied, tmp_path, monkeypatch):
    write_files(copied, {"LICENSE": "MIT"})
    monkeypatch.chdir(copied.parent)
    model = BTokSentenceTransformer(copied.name, device="cpu")
    monkeypatch.chdir("/")
    assert model.kept_card()["LICENSE"] == b"MIT"
