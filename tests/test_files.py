"""Files: folders that cannot be written to, full disks, and writes that end in one step."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from btok_hf import BTokSentenceTransformer, export_model
from btok_hf.files import check_writable, replacing


def test_folders_that_cannot_be_written_to_are_refused(repo, tmp_path):
    (tmp_path / "file").write_text("")
    model = BTokSentenceTransformer(repo, device="cpu")
    for folder in (tmp_path / "file", tmp_path / "file" / "model", "/proc/model"):
        with pytest.raises(OSError, match=r"The output folder .* cannot be written to.*Choose another folder"):
            export_model(model, folder)
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["chat_template.jinja", "README.md"])
def test_a_full_disk_is_named(repo, tmp_path, name):
    """Writing to /dev/full fails as on a full disk."""
    model = BTokSentenceTransformer(repo, device="cpu")
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"The disk is full: .* was not written whole.*need [\d,]+ bytes.*Make room"):
        export_model(model, tmp_path)


def test_weights_on_a_full_disk(repo, tmp_path):
    """On a real disk of 256 kB, mounted in its own namespace. safetensors raises another error than Python."""
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    export = shlex.join([sys.executable, "-m", "btok_hf", "export", repo, str(tmp_path / "model")])
    run = subprocess.run([*namespace, f"{mount} && {export}"], capture_output=True, text=True)
    assert run.returncode == 1
    says = r"error: .*The disk is full: .*/model was not written whole. The weights need 681,472 bytes"
    assert re.search(says, run.stderr)


def test_a_name_may_be_as_long_as_file_systems_allow(tmp_path):
    path = tmp_path / ("a" * 255)
    with replacing(path) as file:
        file.write(b"content")
    assert path.read_bytes() == b"content"


def test_two_runs_may_write_one_file(tmp_path, monkeypatch):
    path = tmp_path / "a.embeddings"
    with replacing(path) as first:
        first.write(b"first")
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")  # with the same process id
            with replacing(path) as second:
                second.write(b"2nd")
        assert path.read_bytes() == b"2nd"
    assert path.read_bytes() == b"first"


def test_a_file_that_was_not_finished_leaves_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "a") as file:
        file.write(b"new")
        raise ValueError("stop")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"
