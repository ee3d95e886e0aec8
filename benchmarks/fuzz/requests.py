"""Random requests against `btok serve`: each gets the right vectors, or a refusal below 500, and the server stays.

    python -m benchmarks.fuzz.requests --requests 10000 --seed 0

A request depends on the seed and its number only. Four clients send them at once. Vectors are compared with those of
`encode`, and a golden input is sent after every 500 requests. The server's memory is printed then.
"""

import argparse
import base64
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks import ROOT
from benchmarks.fuzz.inputs import text
from benchmarks.fuzz.media import damaged, encoded, image_bytes, pick, video_bytes
from btok_hf import BTokSentenceTransformer
from btok_hf.golden import read_golden
from btok_hf.serving.origins import Origins
from btok_hf.serving.schema import EmbeddingRequest
from btok_hf.serving.server import instruction_of
from btok_hf.serving.verify_url import request_body

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
KEY, BODY, PIXELS, STEP = "a key", 2_000_000, 2_000_000, 500
# A request whose announced length is longer than what comes gets 504, which whole requests must not get.
REFUSALS = {400, 401, 404, 405, 413, 429, 431}
# What JSON may hold in the place of anything else; some of it Python's json does not write.
JUNK = (b"null", b"true", b"0", b"-1", b"64", b"1e999", b"NaN", b"-Infinity", b"9" * 5000, b"1.5", b"[]", b"{}",
        b'""', b'"\\ud800"', b'"\\u0000"', b'"float"', b'"query"', b'{"url": null}', b'"<|btok_0|><|image_pad|>"',
        b'"' + b"a" * 3000 + b'"', b"[" * 3000, b'{"a":' * 900, b"1" + b"0" * 400, b"'a'", b"\xff")  # fmt: skip
FIELDS = (*EmbeddingRequest.model_fields, "inputs", "\ud800", "__proto__", "", "a" * 2000)
URLS = ("file:///etc/passwd", "http://127.0.0.1:1/a.png", "https://[", "data:image/png,abc", "data:image/png;base64,",
        "data:text/html;base64,YQ==", "DATA:IMAGE/PNG;BASE64,YQ==", "data:image/png;base64,YQ", "\ud800", "", " ",
        "data:image/png;base64," + "A" * 10_000, "data:video/jpeg;base64,", "data:video/jpeg;base64,,,,")  # fmt: skip
# Playlists, other programs' files, and pictures of 30,000 x 30,000 pixels in a few bytes.
FILES = (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile '/etc/passwd'\n", b"%PDF-1.4\n",
         b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"PK\x03\x04", b"", b"\x00" * 999,
         b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x75\x30\0\0\x75\x30\x08\x06\0\0\0\0\0\0\0",
         b"GIF89a\x30\x75\x30\x75\xf7\0\0,\0\0\0\0\x30\x75\x30\x75\0\x08\x05\0;")  # fmt: skip
TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "application/xml", "",
         "application/json; charset=utf-16", "application/json; charset=\xff", "/", "a" * 999)  # fmt: skip
METHODS = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "BREW")
PATHS = ("/", "/v1", "/v1/", "//v1/embeddings", "/v1/embeddings/", "/v1/%00", "/pooling", "/docs", "/openapi.json",
         "/v1/../health", "/v1/embeddings?a=%ff", "http://x/v1/embeddings", "/" + "a" * 9000, "/v1/\xff")  # fmt: skip
LINES = ("POST /v1/embeddings HTTP/1.0", "POST /v1/embeddings HTTP/3", "POST", "\x16\x03\x01", "", "PRI * HTTP/2.0")
HOSTS = ("", "a/b?", "[", "x:99999999", "\xff", "a\\b", "x@y", "a b")
EXTRAS = ({"Expect": "100-continue"}, {"Upgrade": "websocket", "Connection": "Upgrade"}, {"Range": "bytes=0-1"},
          {"Content-Encoding": "gzip"}, {"Transfer-Encoding": "chunked"})  # fmt: skip
LENGTHS = ("-1", "a", "0", "1e3", "9" * 30, "7", "")
KEYS = ("", "Bearer", "Bearer x", f"Basic {KEY}", "Bearer \xff" + "a" * 5000)
CODINGS = ("chunked", "chunked", "gzip", "chunked, chunked", "identity")


def message(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}]}


def medium(kind, url):
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def data(kind, content):
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def words(rng):
    value = text(rng)
    return value[:2000] if isinstance(value, str) else "a"


def good(rng):
    """A request as it should be, of texts or media."""
    kind = int(rng.integers(4))
    if kind == 0:
        return {
            "input": [words(rng) for _ in range(int(rng.integers(1, 4)))],
            "encoding_format": "base64",
        }
    if kind == 1:
        return {"input": "a", "input_type": "query", "dimensions": 128, "user": "u", "model": str(MODEL)}
    image = medium("image", data("image/png", encoded(rng)))
    if kind == 2:
        return message(image, words(rng))
    return {"messages": [{"role": "system", "content": "Find it."}, *message("a", image)["messages"]]}


def written(body):
    return json.dumps(body).encode()


def changed_bytes(rng):
    body = written(good(rng))
    return damaged(rng, body, written(good(rng))) if rng.random() < 0.5 else _with_junk(rng, body)


def _with_junk(rng, body):
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(body)))
        body = body[:place] + pick(rng, JUNK) + body[place + int(pick(rng, (0, 1, 9, 200))) :]
    return body


def changed_fields(rng):
    """JSON in which a value is another, a field is missing, or one too many."""
    body = good(rng)
    place, inner = body, body
    while isinstance(inner, (dict, list)) and inner and (place is body or rng.random() < 0.7):
        place = inner
        key = pick(rng, list(place)) if isinstance(place, dict) else int(rng.integers(len(place)))
        inner = place[key]
    action = rng.random()
    if action < 0.2:
        del place[key]
        return written(body)
    if action < 0.4 and isinstance(place, dict):
        key = pick(rng, FIELDS)
    place[key] = "@junk@"
    return written(body).replace(b'"@junk@"', pick(rng, JUNK))


def texts(rng):
    some = [words(rng) for _ in range(int(rng.integers(1, 5)))]
    return written({"input": some} if rng.random() < 0.5 else message(*some))


def images(rng):
    content = pick(rng, FILES) if rng.random() < 0.1 else image_bytes(rng)
    url = pick(rng, URLS) if rng.random() < 0.1 else data(pick(rng, ("image/png", "image/x")), content)
    return written(message(*[medium("image", url)] * int(pick(rng, (1, 1, 1, 2, 30))), words(rng)))


def videos(rng):
    if rng.random() < 0.4:
        frames = ",".join(base64.b64encode(image_bytes(rng)).decode() for _ in range(int(rng.integers(1, 5))))
        return written(message(medium("video", "data:video/jpeg;base64," + frames)))
    content = pick(rng, FILES) if rng.random() < 0.1 else video_bytes(rng)
    return written(message(medium("video", data("video/mp4", content))))


def deep(rng):
    depth = int(pick(rng, (3, 90, 990, 1100, 100_000)))
    inner = pick(rng, (b"[", b'{"a":', b'{"input":', b'[{"messages":'))
    return pick(rng, (b"", b'{"input":', b'{"messages":')) + inner * depth + pick(rng, (b"", b"1" + b"]" * depth))


KINDS = {changed_bytes: 25, changed_fields: 25, texts: 12, images: 12, videos: 6, deep: 4}


def request(seed, number):
    """The bytes of a request on the wire, its body if it is a whole `POST`, and whether its client goes at once."""
    rng = np.random.default_rng((seed, number))
    body = pick(rng, [kind for kind, share in KINDS.items() for _ in range(share)])(rng)
    line, head = "POST /v1/embeddings HTTP/1.1", {"Host": "x", "Content-Type": "application/json"}
    head |= {"Content-Length": str(len(body)), "Connection": "close", "Authorization": f"Bearer {KEY}"}
    strange, goes, sent = rng.random() < 0.2, rng.random() < 0.04, body
    if strange:
        action = int(rng.integers(11))
        if action == 0:
            line = f"{pick(rng, METHODS)} /v1/embeddings HTTP/1.1"
        elif action == 1:
            line = f"POST {pick(rng, PATHS)} HTTP/1.1"
        elif action == 2:
            line = pick(rng, LINES)
        elif action == 3:
            head |= {f"X-{index}": "a" for index in range(int(pick(rng, (200, 900, 5000, 20_000))))}
        elif action == 4:
            head["X"] = "a" * int(pick(rng, (1000, 60_000, 500_000)))
        elif action == 5:
            del head["Content-Length"]
            head["Transfer-Encoding"] = pick(rng, CODINGS)
            cuts = [0, *sorted(int(cut) for cut in rng.integers(0, len(body) + 1, 3)), len(body)]
            pieces = [body[start:end] for start, end in itertools.pairwise(cuts) if end > start]
            sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            sent = damaged(rng, sent, sent) if rng.random() < 0.5 else sent
        else:
            names = ("Content-Type", "Content-Length", "Authorization", "Host")
            choices = dict(zip(names, (TYPES, LENGTHS, KEYS, HOSTS)))
            head |= pick(rng, EXTRAS) if action == 6 else {names[action - 7]: pick(rng, choices[names[action - 7]])}
    lines = [line, *(f"{name}: {value}" for name, value in head.items()), "", ""]
    sent = "\r\n".join(lines).encode("latin-1") + sent
    return (sent[: int(rng.integers(len(sent)))] if goes else sent), None if strange else body, goes


def send(port, sent, goes):
    """The status and the body of an answer; no status if there is none."""
    with socket.create_connection(("127.0.0.1", port), timeout=90) as connection:
        received = b""
        try:
            connection.sendall(sent)
            if goes:
                return None, b""
            while part := connection.recv(2**16):
                received += part
        except (ConnectionResetError, BrokenPipeError):
            pass  # the server refuses before it has read everything
        except TimeoutError:
            return "no answer in 90 s", received
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").removeprefix(b"HTTP/1.1 100 \r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else "closed"), body


def wrong(body, answer, model, limits, origins):
    """What is wrong with the vectors of an answer; `None` if they are those of `encode`."""
    try:
        asked = EmbeddingRequest.model_validate(json.loads(body))
        expected = model.encode(asked.rows(limits, origins, lambda pixels: None), prompt=instruction_of(model, asked))
    except ValueError as error:
        return f"the library refuses what the server embeds: {error}"
    rows = [row["embedding"] for row in json.loads(answer)["data"]]
    found = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else np.array(row) for row in rows]
    difference = np.abs(np.stack(found) - expected).max()
    return None if difference < 1e-4 else f"the vectors differ by {difference}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one request")
    return run(parser.parse_args())


def run(options):
    """Start a server, send requests, and end it. 0 if nothing was wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--max-body", str(BODY), "--max-image-pixels", str(PIXELS), "--timeout", "10"]
    command = [sys.executable, "-m", "btok_hf", "serve", str(MODEL), *flags]
    with subprocess.Popen(command, env={**os.environ, "BTOK_API_KEY": KEY}) as server:
        try:
            return fuzz(options, port, server)
        finally:
            server.terminate()


def fuzz(options, port, server):
    model = BTokSentenceTransformer(MODEL, device="cpu")
    limits, origins = model.transformer.image_limits, Origins(PIXELS, BODY, 60)
    path, name = MODEL / "golden.json", "image and text"
    (right,) = (row["embedding"] for row in read_golden(path)["inputs"] if row["name"] == name)
    (body,) = (written(request_body(row)) for row in json.loads(path.read_text())["inputs"] if row["name"] == name)
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    check = f"{head}Content-Length: {len(body)}\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode() + body
    while True:
        try:
            if send(port, check, False)[0] == 200:
                break
        except ConnectionRefusedError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)

    statuses, findings = Counter(), 0
    numbers = range(options.requests) if options.only is None else range(options.only, options.only + 1)
    with ThreadPoolExecutor(4) as clients:
        for start in range(numbers.start, numbers.stop, STEP):
            some = range(start, min(start + STEP, numbers.stop))
            requests = [request(options.seed, number) for number in some]
            answers = clients.map(lambda asked: send(port, asked[0], asked[2]), requests)
            for number, (_, body, goes), (status, answer) in zip(some, requests, answers):
                statuses["gone" if goes else status] += 1
                fault = None
                if status == 200 and body is not None:
                    fault = wrong(body, answer, model, limits, origins)
                elif status == "closed" and body is not None and len(body) > BODY:
                    pass  # refused before it was read: the reset overtook the answer
                elif not goes and status != 200 and status not in REFUSALS | ({504} if body is None else set()):
                    fault = f"status {status}: {answer[:300]!r}"
                if fault:
                    findings += 1
                    print(f"request {number}: {fault}", flush=True)
            status, answer = send(port, check, False)
            assert status == 200, f"the golden input got {status}"
            difference = np.abs(np.array(json.loads(answer)["data"][0]["embedding"]) - right).max()
            assert difference < 1e-4, f"the golden vector differs by {difference}"
            print(f"{some.stop:6} requests, memory {_megabytes(server.pid)} MB, golden {difference:.0e}", flush=True)
    print(f"answers: {dict(sorted(statuses.items(), key=str))}; findings: {findings}")
    return int(findings > 0)


def _megabytes(process):
    with open(f"/proc/{process}/status") as lines:
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    sys.exit(main())
