"""The card that a model was loaded with. What `save` and `export_model` keep of it is in test_export.py."""

import pytest

from btok_hf.hub_card.kept import Described, LoadedCard

CARD = """# A model
![Losses](assets/loss.png) <img src="assets/a.b.jpg"> <img src='https://example.com/far.png'>
model.encode({"image": f"{folder}/assets/example_1.png"})
[a file](notes.txt) ![outside](../secret.png)
"""


@pytest.fixture
def described():
    return Described({"query": "Find. "}, None, None, 512, 1003520)


@pytest.fixture
def folder(tmp_path):
    for name in ("assets/loss.png", "assets/a.b.jpg", "assets/example_1.png", "notes.txt", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def test_a_card_is_kept_with_its_licence_and_pictures(folder, described, caplog):
    files = LoadedCard(str(folder), {}, described).files(described)
    names = ("LICENSE", "assets/a.b.jpg", "assets/example_1.png", "assets/loss.png")
    assert files == {"README.md": CARD, **{name: name.encode() for name in names}} and not caplog.text
    (folder / "assets" / "loss.png").unlink()
    card = LoadedCard(str(folder), {}, described)
    assert "assets/loss.png" not in card.files(described)
    assert "shows assets/loss.png, which cannot be found" in caplog.text


def test_a_card_that_describes_other_settings_is_not_kept(folder, described, caplog):
    card = LoadedCard(str(folder), {}, described)
    for other in ({"prompts": {}}, {"truncate_dim": 8}, {"max_seq_length": 9}, {"max_pixels": 784}):
        caplog.clear()
        assert card.files(described._replace(**other)) is None
        assert f"The README.md of {folder} is not kept" in caplog.text
    assert LoadedCard(str(folder), {}, None).files(described) is None  # loaded with other settings


def test_without_a_card_there_is_nothing_to_keep(tmp_path, described, caplog):
    assert LoadedCard(str(tmp_path), {}, described).files(described) is None and not caplog.text
