"""`verify_url` against a small server on this machine, which embeds with the library."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from support.serving import served

from btok_hf import BTokSentenceTransformer, export_model, golden
from btok_hf.cli import main
from btok_hf.serving.verify_url import _served_model, request_body, verify_url


class Server(ThreadingHTTPServer):
    """Answers `/v1/models` and `/v1/embeddings` of OpenAI for texts and images. `change` spoils vectors."""

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.lock, self.encodings, self.key = model, threading.Lock(), [], None
        self.change, self.most = lambda vector: vector, None
        self.takes_input, self.before_input, self.reorder = True, "", lambda rows: rows[::-1]
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def allowed(self):
        return self.server.key is None or self.headers["authorization"] == f"Bearer {self.server.key}"

    def do_GET(self):
        if not self.allowed():
            return self.answer(401, {})
        self.answer(*((200, {"data": [{"id": "served"}]}) if self.path == "/v1/models" else (404, {})))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.allowed()
        assert self.path == "/v1/embeddings" and request["model"] == "served"
        if "input" in request:
            if not self.server.takes_input:
                return self.answer(422, {"error": {"message": "messages only"}})
            return self.answer_texts(request)
        item, prompt = {"image": [], "text": []}, None
        for message in request["messages"]:
            if message["role"] == "system":
                prompt = message["content"]
                continue
            for part in message["content"]:
                if part["type"] == "video_url":
                    return self.answer(400, {"error": {"message": "no videos here"}})
                if part["type"] == "text":
                    item["text"].append(part["text"])
                else:
                    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
                    item["image"].append(Image.open(io.BytesIO(base64.b64decode(data))))
        item = {key: value for key, value in item.items() if value}
        with self.server.lock:
            vectors = self.server.model.encode([item], prompt=prompt)
        self.answer_rows(request, vectors)

    def answer_texts(self, request):
        """The rows of a list in the reverse order, with their indices."""
        texts = request["input"] if isinstance(request["input"], list) else [request["input"]]
        with self.server.lock:
            vectors = self.server.model.encode([{"text": self.server.before_input + text} for text in texts])
        self.answer_rows(request, vectors)

    def answer_rows(self, request, vectors):
        rows = []
        for index, vector in enumerate(vectors):
            vector = self.server.change(vector.astype("<f4"))[: request.get("dimensions", self.server.most)]
            encoded = base64.b64encode(vector.tobytes()).decode()
            vector = encoded if request["encoding_format"] == "base64" else vector.tolist()
            rows.append({"index": index, "embedding": vector})
        self.server.encodings.append(request["encoding_format"])
        self.answer(200, {"data": self.server.reorder(rows)})

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(exported):
    server = Server(BTokSentenceTransformer(exported, device="cpu"))
    yield server
    server.shutdown()
    server.server_close()


def test_right_vectors_and_what_is_not_reached(exported, server, capsys):
    for url in (server.url, server.url + "/v1/"):
        assert verify_url(exported, url) < 1e-5
        printed = capsys.readouterr().out
        rows = json.loads((exported / "golden.json").read_text("utf-8"))["inputs"]
        videos = [row["name"] for row in rows if "video" in row]
        assert printed.count(" ok\n") == len(rows) - len(videos)
        assert f"not reached: {', '.join(videos)}" in printed and "HTTP 400" in printed and "no videos here" in printed
    assert set(server.encodings) == {"float", "base64"}


def test_texts_are_sent_as_input_too(exported, server, capsys):
    """Servers may put `messages` through the chat template, and `input` not."""
    assert verify_url(exported, server.url) < 1e-5
    lines = {line[:18].strip(): line[37:].split()[0] for line in capsys.readouterr().out.splitlines() if " ok" in line}
    assert {name for name, value in lines.items() if value != "–"} == set(golden.TEXTS)
    server.before_input = " x"
    with pytest.raises(RuntimeError, match=r"'short text': .*'long text': .*'other scripts': ") as error:
        verify_url(exported, server.url)
    assert "'prompt query'" not in str(error.value) and "'image'" not in str(error.value)
    server.takes_input = False
    assert verify_url(exported, server.url) < 1e-5
    assert "texts as input: not reached: HTTP 422" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reorder",
    [lambda rows: rows[:1], lambda rows: [{**row, "index": 0} for row in rows], lambda rows: rows * 2],
    ids=["one", "same", "twice"],
)
def test_rows_without_their_place_are_an_error(exported, server, reorder):
    server.reorder = lambda rows: reorder(rows) if len(rows) > 1 else rows
    with pytest.raises(RuntimeError, match=r"answers no embedding \(ValueError: rows \[.*\] for 3 inputs\)"):
        verify_url(exported, server.url)


def test_rows_without_a_prompt_replace_the_default_prompt(exported, tmp_path, capsys):
    options = {"prompts": {"document": "Doc."}, "default_prompt_name": "document"}
    repo = export_model(BTokSentenceTransformer(exported, device="cpu", **options), tmp_path / "model")
    with served(repo) as client:
        assert verify_url(repo, str(client.base_url)) < 1e-5
    assert "texts as input: not compared: the repository has a default prompt" in capsys.readouterr().out


def test_the_prompts_of_a_revision_are_read(hub, exported, server, tmp_path):
    """The main branch has no such file."""
    hub.run("-m", "btok_hf", "push", exported, "org/served", "--revision", "v1", home=tmp_path)
    done = hub.run("-m", "btok_hf", "verify", "org/served", "--revision", "v1", "--url", server.url, home=tmp_path)
    assert "verified: largest difference" in done.stdout


def test_the_key_of_the_server_is_sent(exported, server, monkeypatch):
    server.key = "secret"
    monkeypatch.setenv("BTOK_API_KEY", "secret")
    assert verify_url(exported, server.url) < 1e-5
    monkeypatch.setenv("BTOK_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match=r"refuses BTOK_API_KEY \(.*401"):
        verify_url(exported, server.url)
    monkeypatch.delenv("BTOK_API_KEY")
    with pytest.raises(RuntimeError, match=r"asks for a key, and there is none in BTOK_API_KEY .*BTOK_API_KEY=…"):
        verify_url(exported, server.url)


def test_the_key_is_not_sent_to_where_a_server_redirects(monkeypatch):
    asked = []

    class Other(Handler):
        def do_GET(self):
            asked.append(self.headers["authorization"])
            if self.server is first:
                self.send_response(302)
                self.send_header("location", f"http://localhost:{second.server_port}/v1/models")
                self.end_headers()
            else:
                self.answer(200, {"data": [{"id": "served"}]})

    first, second = (ThreadingHTTPServer(("127.0.0.1", 0), Other) for _ in range(2))
    with first, second:
        for each in (first, second):
            threading.Thread(target=each.serve_forever, daemon=True).start()
        monkeypatch.setenv("BTOK_API_KEY", "secret")
        assert _served_model(f"http://127.0.0.1:{first.server_port}") == "served"
        for each in (first, second):
            each.shutdown()
    assert asked == ["Bearer secret", None]


@pytest.mark.parametrize(
    "change",
    [lambda v: v + np.float32(1e-3), lambda v: v[:8], lambda v: v * np.float32("nan"), lambda v: v * 2],
    ids=["other", "short", "nan", "long"],
)
def test_other_vectors_are_an_error(exported, server, change):
    server.change = change
    with pytest.raises(RuntimeError, match=r"does not give the golden vectors of .*'short text'.*float32"):
        verify_url(exported, server.url)


def test_a_server_that_cuts_vectors_is_asked_for_whole_ones(exported, server):
    """As of a repository with truncate_dim."""
    server.most = 16
    assert verify_url(exported, server.url) < 1e-5


def test_tolerance(exported, server, capsys):
    server.change = lambda vector: vector + np.float32(1e-3)
    assert main(["verify", str(exported), "--url", server.url, "--tolerance", "0.01"]) == 0
    assert capsys.readouterr().out.endswith("verified: largest difference 1.0e-03\n")


def test_a_server_that_fails_or_is_not_there(exported, server):
    server.model = None  # every request ends in an exception, and without an answer
    with pytest.raises(RuntimeError, match="stopped answering"):
        verify_url(exported, server.url)
    with pytest.raises(RuntimeError, match=r"/v1/models names no model .*Start the server"):
        verify_url(exported, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="starts with http"):
        verify_url(exported, "127.0.0.1:8000")


@pytest.mark.parametrize("status", [401, 429])
def test_refusals_that_are_not_of_the_input_are_an_error(exported, server, monkeypatch, status):
    """A server whose queue is full has not been compared."""
    right = Handler.do_POST

    def busy(self):
        return right(self) if len(server.encodings) < 3 else self.answer(status, {"error": "busy"})

    monkeypatch.setattr(Handler, "do_POST", busy)
    with pytest.raises(RuntimeError, match=rf"did not look at a golden input: HTTP {status} .*busy.*Try again"):
        verify_url(exported, server.url)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/embeddings"])
@pytest.mark.parametrize("status", [200, 400])
def test_answers_that_are_cut_off_end_in_one_line(exported, server, monkeypatch, path, status):
    """Of these, http.client raises errors of its own."""

    def cut(self):
        self.send_response(status)
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b"{")

    method = "do_GET" if path == "/v1/models" else "do_POST"
    monkeypatch.setattr(Handler, method, cut)
    with pytest.raises(RuntimeError, match=r"stopped answering|names no model|none of the|answers none"):
        verify_url(exported, server.url)


@pytest.mark.parametrize("answer", [{"object": "error"}, {"data": []}, {"data": [{"embedding": {}}]}, None])
def test_answers_without_an_embedding_are_named(exported, server, monkeypatch, answer):
    monkeypatch.setattr(server.RequestHandlerClass, "do_POST", lambda self: self.answer(200, answer))
    with pytest.raises(RuntimeError, match="/v1/embeddings answers no embedding"):
        verify_url(exported, server.url)


def test_flags_of_the_other_kind_are_refused(exported, capsys):
    for flags, reason in (
        (["--tolerance", "0.1"], "--tolerance needs --url"),
        (["--url", "http://x", "--device", "cpu"], "--device has no meaning with --url"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(exported), *flags])
        assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_every_form_of_a_golden_row_becomes_messages():
    video = {"array": ["f1", "f2"], "video_metadata": {}}
    row = {"image": ["a", "b"], "video": video, "text": "t", "prompt": "p"}
    system, user = request_body(row)["messages"]
    assert system == {"role": "system", "content": "p"}
    urls = [part[part["type"]]["url"] for part in user["content"][:3]]
    assert urls == ["data:image/png;base64,a", "data:image/png;base64,b", "data:video/jpeg;base64,f1,f2"]
    assert user["content"][3] == {"type": "text", "text": "t"}
    parts = [{"type": "text", "text": "t"}, {"type": "image", "image": "a"}, {"type": "video", "video": video}]
    messages = [{"role": "system", "content": "p"}, {"role": "user", "content": parts}]
    _, user = request_body({"messages": messages})["messages"]
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "video_url"]
