"""What requests may name: their own content, and only hosts and files that the flags allow."""

import base64
import contextlib
import io
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from support.media import image
from support.pictures import MEDIA
from support.serving import png

from btok_hf import read_video
from btok_hf.serving.origins import Origins

BOUNDS = (10**6, 10**6, 60)


def data(content, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(content).decode()


@pytest.fixture
def folder(tmp_path):
    """A folder that may be named, and a secret beside it with links to it."""
    folder = tmp_path / "allowed"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "deep" / "a b.png", tmp_path / "secret.png"):
        image(28, 28).save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to(folder / "deep" / "a b.png")
    (folder / "up").symlink_to(tmp_path)
    return folder


# ---------------------------------------------------------------- the request itself


def test_pixels_are_bounded_before_they_are_decoded():
    header = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(header, "png")
    with pytest.raises(ValueError, match="more than 1000000 pixels"):
        Origins(*BOUNDS).image(data(header.getvalue()[:60]))
    frames = "data:video/jpeg;base64," + ",".join([png(image(28, 28))] * 2)
    with pytest.raises(ValueError, match="more than 1567 pixels in all"):
        Origins(1567, 10**6, 60).video(frames)
    reserved = []
    video, pixels = Origins(1568, 10**6, 60).video(frames, reserve=reserved.append)
    assert len(video) == 2 and pixels == 1568 and reserved == [784, 784]  # the end of a request ends the reading


def test_pixels_of_a_request_are_counted_together():
    url = data(base64.b64decode(png(image(28, 28))))
    origins = Origins(1568, 10**6, 60)
    content, pixels = origins.image(url)
    assert content == base64.b64decode(png(image(28, 28))) and pixels == 784
    assert origins.image(url, 784)[1] == 784
    with pytest.raises(ValueError, match=r"one has 28 x 28\. Reduce them, or send fewer"):
        origins.image(url, 785)
    with pytest.raises(ValueError, match="more than 1568 pixels in all"):
        origins.video(f"data:video/jpeg;base64,{png(image(28, 28))}", 785)
    film = data((MEDIA / "rotated.mp4").read_bytes(), "video/mp4")
    whole = Origins(10**6, 10**6, 60).video(film)[1]
    assert whole == 8 * 160 * 112 and Origins(whole + 5, 10**6, 60).video(film, 5)
    with pytest.raises(ValueError, match=f"more than {whole - 1} pixels"):
        Origins(whole, 10**6, 60).video(film, 1)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX"])
def test_formats_that_nobody_sends_are_refused(kind):
    file = io.BytesIO()
    image(28, 28).save(file, kind)
    with pytest.raises(ValueError, match="not one of PNG"):
        Origins(*BOUNDS).image(data(file.getvalue()))


def two_files_at_once(width, height):
    """A TIFF file of 1 x 1 pixels that is also an IM file of this size, which Pillow tries before TIFF."""
    im = b": x\nImage type: 0 1 image\nImage size (x*y): %d*%d\nFile size (no of images): 1\n\x1a" % (width, height)
    im = im.ljust(504, b"\0") + b"\xaa" * ((width + 7) // 8 * height)
    tags = [(256, 3, 1), (257, 3, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1)]
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in [*tags, (279, 4, 1)])
    return b"II*\0" + struct.pack("<I", 8 + len(im)) + im + struct.pack("<H", 9) + tags + bytes(4)


def test_files_of_two_formats_cannot_hide_their_pixels(monkeypatch):
    Image.init()  # which format Pillow tries first depends on what was imported before
    monkeypatch.setattr(Image, "ID", ["IM", *(name for name in Image.ID if name != "IM")])
    content = two_files_at_once(300, 200)
    assert Image.open(io.BytesIO(content), formats=["TIFF"]).size == (1, 1)
    with Image.open(io.BytesIO(content)) as decoded:
        assert decoded.size == (300, 200)
    origins = Origins(10_000, 10**6, 60)
    for read in (
        lambda: origins.image(data(content, "image/tiff")),
        lambda: origins.video(data(content, "video/jpeg")),
    ):
        with pytest.raises(ValueError, match=r"two files at once: TIFF of 1 x 1, and IM of 300 x 200\. Save it anew"):
            read()


def test_files_of_cameras_with_several_pictures_are_images():
    """MPO, which Pillow tells from JPEG only by what is in it."""
    file = io.BytesIO()
    image(28, 28).save(file, "MPO", save_all=True, append_images=[image(28, 28, 1)])
    assert Origins(*BOUNDS).image(data(file.getvalue()))[1] == 784


def test_damaged_images_are_refused():
    """Found by `benchmarks.fuzz.requests`: at damaged AVIF files Pillow raises RuntimeError, which was status 500."""
    file = io.BytesIO()
    image(28, 28).save(file, "AVIF")
    content = file.getvalue()
    for place in range(len(content)):
        damaged = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        with contextlib.suppress(ValueError):
            Origins(*BOUNDS).image(data(damaged))


def test_a_video_file_is_read_as_in_the_library():
    content = (MEDIA / "rotated.mp4").read_bytes()
    for kind in ("video/mp4", "video/webm"):
        video, _ = Origins(*BOUNDS).video(data(content, kind))
        np.testing.assert_array_equal(video["array"], read_video(MEDIA / "rotated.mp4")["array"])
    with pytest.raises(ValueError, match=r"its 8 frames of .* have more than 1000 pixels"):
        Origins(1000, 10**6, 60).video(data(content, "video/mp4"))
    with pytest.raises(ValueError, match="takes more than 0 seconds"):
        Origins(10**6, 10**6, 0).video(data(content, "video/mp4"))


def test_pixels_of_a_video_file_are_reserved_before_they_are_decoded(monkeypatch):
    film, reserved = data((MEDIA / "rotated.mp4").read_bytes(), "video/mp4"), []
    whole = 8 * 160 * 112
    assert Origins(*BOUNDS).video(film, 0, reserved.append)[1] == whole and reserved == [whole, 0]
    frame = data((MEDIA / "n1.mp4").read_bytes(), "video/mp4")  # one frame, which is there twice
    pixels = Origins(*BOUNDS).video(frame, 0, reserved.append)[1]
    assert pixels < reserved[2] and sum(reserved[2:]) == pixels

    def full(pixels):
        raise KeyError("full")

    monkeypatch.setattr("btok_hf.serving.origins.read_video", None)  # it is not reached
    with pytest.raises(KeyError, match="full"):
        Origins(*BOUNDS).video(film, 0, full)


def test_a_server_without_pyav_says_what_it_reads(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # its import fails, as where it is not installed
    content = (MEDIA / "rotated.mp4").read_bytes()
    with pytest.raises(ValueError, match=r"PyAV is missing \(pip install 'btok-hf\[video\]'\); send frames as data:"):
        Origins(*BOUNDS).video(data(content, "video/mp4"))


# ---------------------------------------------------------------- files


def test_files_below_the_folder_are_read(folder):
    origins = Origins(*BOUNDS, folder=folder)
    expected = (folder / "deep" / "a b.png").read_bytes()
    for path in ("deep/a%20b.png", "deep/a b.png", "inside.png", "up/allowed/inside.png"):
        assert origins.image(f"file://{folder}/{path}")[0] == expected
    with pytest.raises(ValueError, match="this server opens no files and no other addresses"):
        Origins(*BOUNDS).image(f"file://{folder}/inside.png")


@pytest.mark.parametrize(
    "path",
    [
        "{folder}/link.png",
        "{folder}/up/secret.png",
        "{folder}/../secret.png",
        "{folder}/%2e%2e/secret.png",
        "{folder}/deep/..%2f..%2fsecret.png",
        "{folder}.png",
        "{folder}",
        "{folder}/nothing.png",
        "{folder}/nothing%00.png",
        "{folder}/" + 300 * "a",
        "localhost{folder}/inside.png",
        "/dev/stdin",
        "",
    ],
)
def test_other_files_are_not(folder, path):
    origins = Origins(*BOUNDS, folder=folder)
    with pytest.raises(ValueError, match="no file below the folder"):
        origins.image("file://" + path.format(folder=folder))
    for url in (f"{folder}/inside.png", f"file:{folder}/inside.png", f"FILE://{folder}/inside.png"):
        with pytest.raises(ValueError, match="this server opens file:///… below its folder"):
            origins.image(url)


def test_large_files_are_refused(folder):
    with pytest.raises(ValueError, match="--max-body"):
        Origins(10**6, 100, 60, folder=folder).image(f"file://{folder}/inside.png")


# ---------------------------------------------------------------- other servers


class Handler(BaseHTTPRequestHandler):
    """A picture at /a.png. /to?ADDRESS leads to the address."""

    def do_GET(self):
        path, _, target = self.path.partition("?")
        self.server.asked.append(self.path)
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(base64.b64decode(png(image(28, 28))))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    """Two servers, by their `host:port`."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.asked, server.name = [], f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def test_addresses_of_allowed_hosts_are_read(web):
    here, _ = web
    origins = Origins(*BOUNDS, hosts=["example.org", here.name])
    for path in ("a.png", f"to?http://{here.name}/a.png", "to?/a.png"):
        assert origins.image(f"http://{here.name}/{path}")[0] == base64.b64decode(png(image(28, 28)))
    with pytest.raises(ValueError, match="it holds more than 100 bytes"):
        Origins(10**6, 100, 60, hosts=[here.name]).image(f"http://{here.name}/a.png")
    with pytest.raises(ValueError, match=r"opens addresses at example.org, 127.*Send the content itself"):
        origins.image("ftp://example.org/a.png")


def test_other_hosts_are_not_even_through_redirects(web):
    here, there = web
    origins = Origins(*BOUNDS, hosts=[here.name])
    for host in (there.name, f"{here.name}@{there.name}", f"localhost:{here.server_port}", "127.0.0.1", "[::1]"):
        with pytest.raises(ValueError, match="is not one of the allowed hosts"):
            origins.image(f"http://{host}/a.png")
    for target in (
        f"http://{there.name}/a.png",
        "http://169.254.169.254/",
        f"ftp://{there.name}/",
        "file:///etc/passwd",
    ):
        with pytest.raises(ValueError, match=r"not one of the allowed hosts|not allowed"):
            origins.image(f"http://{here.name}/to?{target}")
    assert not there.asked


NO_HOSTS = ["", "*", "https://example.org", "example.org/a", "a@example.org", "*.example.org"]


@pytest.mark.parametrize("host", [*NO_HOSTS, " b.org", "b.org:", "b.org:x", "b.org:99999"])
def test_hosts_are_names(host):
    with pytest.raises(ValueError, match="--allow-urls takes names of hosts"):
        Origins(*BOUNDS, hosts=[host])


def test_the_folder_exists(tmp_path):
    with pytest.raises(ValueError, match="--allow-files takes a folder"):
        Origins(*BOUNDS, folder=tmp_path / "nothing")
