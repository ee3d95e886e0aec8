"""Compare a running server with the golden vectors of a repository, over the `/v1/embeddings` of OpenAI.

Inputs are sent as chat `messages`, which vLLM, SGLang and others take: images as data URLs, a video as a data URL of
its frames. Each input is sent alone, with numbers as the answer, and then all of them at once, in base64, which is
what clients of OpenAI ask for.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from btok_hf.hub import check_distinct, golden_file
from btok_hf.serving import KEY

TIMEOUT = 300  # seconds for one input


def verify_url(
    path_or_repo: str | Path,
    url: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    tolerance: float | None = None,
) -> float:
    """Check that a running server reproduces the golden vectors of a repository. A table is printed.

    Inputs that the server refuses, such as videos, are listed as not reached. If the environment has `BTOK_API_KEY`,
    it is sent as the key.

    Args:
        path_or_repo (`str` or `Path`): Folder or Hub id of the repository that is served.
        url (`str`): Address of the server, e.g. `http://127.0.0.1:8000`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): For the Hub. Default: `HF_TOKEN`, or the login of `hf auth login`.
        tolerance (`float`, *optional*): Largest allowed difference of a component. Default: that of the golden
            vectors, which is meant for fp32.

    Returns:
        `float`: The largest difference of a component of an embedding.

    Raises:
        ValueError: No golden vectors to compare with, or a `url` without `http://`.
        RuntimeError: The server cannot be reached, answers no input, or its vectors differ.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The address of a server starts with http:// or https://, got {url!r}.")
    url = url.rstrip("/").removesuffix("/v1")
    content = json.loads(golden_file(path_or_repo, revision=revision, token=token).read_text("utf-8"))
    check_distinct(path_or_repo, content)
    allowed = content["tolerance"] if tolerance is None else tolerance
    rows = content["inputs"]
    request = {"model": _served_model(url)}

    def embed(row: dict[str, Any], encoding: str) -> np.ndarray | str:
        body = {**request, **request_body(row), "encoding_format": encoding}
        answer, whole = _embed(url, body), len(base64.b64decode(row["embedding"])) // 4
        if isinstance(answer, str) or len(answer) >= whole:
            return answer
        longer = _embed(url, {**body, "dimensions": whole})  # of a repository with truncate_dim
        return answer if isinstance(longer, str) else longer

    alone = [embed(row, "float") for row in rows]
    with ThreadPoolExecutor(len(rows)) as pool:
        together = list(pool.map(lambda row: embed(row, "base64"), rows))
    largest, different, unreached = 0.0, [], []
    print(f"{'input':18}{'alone':>9}{'together':>10}")
    for row, *answers in zip(rows, alone, together):
        refusals = [answer for answer in answers if isinstance(answer, str)]
        if refusals:
            unreached.append(row["name"])
            print(f"{row['name']:18} not reached: {refusals[0]}")
            continue
        expected = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
        pair = [_difference(expected, answer) for answer in answers]
        fits = all(difference <= allowed for difference in pair)  # false for NaN
        largest = max(largest, *pair)
        print(f"{row['name']:18}{pair[0]:9.1e}{pair[1]:10.1e}  {'ok' if fits else 'DIFFERS'}")
        if not fits:
            different.append(f"{row['name']!r}: {max(pair):.1e}")
    if len(unreached) == len(rows):
        raise RuntimeError(f"{url} answers none of the {len(rows)} golden inputs, see above.")
    if different:
        raise RuntimeError(
            f"{url} does not give the golden vectors of {path_or_repo} (a component differs by more than "
            f"{allowed:.0e}): {'; '.join(different)}. Golden vectors are fp32: serve in fp32 (vLLM: --dtype float32), "
            "or allow more with --tolerance. If they still differ, the server pools in another way, or serves "
            "another model."
        )
    if unreached:
        print(f"reached {len(rows) - len(unreached)} of {len(rows)} inputs; not reached: {', '.join(unreached)}")
    return largest


def request_body(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a request to `/v1/embeddings` that holds the input of a golden row, with PNG images in base64.

    A video is sent as its frames, without times. The frames of golden videos are two per second, which is what servers
    of this library take them for.
    """
    if "messages" in row:
        messages = [{**message, "content": _content(message["content"])} for message in row["messages"]]
    else:
        kinds = [key for key in row if key in ("image", "video", "text")]  # some models keep the order as given
        parts = [{"type": kind, kind: value} for kind in kinds for value in _as_list(row[kind])]
        messages = [{"role": "user", "content": _content(parts)}]
        if "prompt" in row:
            messages.insert(0, {"role": "system", "content": row["prompt"]})
    return {"messages": messages}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "image":
            parts.append({"type": "image_url", "image_url": {"url": "data:image/png;base64," + part["image"]}})
        elif part["type"] == "video":
            frames = ",".join(part["video"]["array"])
            parts.append({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + frames}})
        else:
            parts.append(part)
    return parts


def _served_model(url: str) -> str:
    """The name of the first model that the server lists."""
    try:
        with urllib.request.urlopen(_request(f"{url}/v1/models"), timeout=TIMEOUT) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise RuntimeError(f"{url}/v1/models names no model ({error}). Is it a server of embeddings?") from error
        sent = "refuses" if os.environ.get(KEY) else "asks for a key, and there is none in"
        raise RuntimeError(
            f"{url} {sent} {KEY} ({error}). Set it to the server's key: {KEY}=… btok verify …"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(
            f"{url}/v1/models names no model ({error}). Start the server, and give its address without a path, "
            "e.g. http://127.0.0.1:8000."
        ) from error


def _request(address: str, body: bytes | None = None) -> urllib.request.Request:
    key = os.environ.get(KEY)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    return urllib.request.Request(address, body, headers)


def _embed(url: str, body: dict[str, Any]) -> np.ndarray | str:
    """The embedding of one input, or why the server refused it."""
    request = _request(f"{url}/v1/embeddings", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            embedding = json.load(answer)["data"][0]["embedding"]
        return _as_vector(embedding)
    except urllib.error.HTTPError as error:
        message = f"HTTP {error.code} {error.read().decode('utf-8', 'replace')[:200]}"
        if error.code < 500:
            return message
        raise RuntimeError(f"{url} failed on a golden input: {message}. See its log.") from error
    except OSError as error:
        raise RuntimeError(f"{url} stopped to answer ({error}). See its log.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise RuntimeError(
            f"{url}/v1/embeddings answers no embedding ({type(error).__name__}: {error}). Is it a server of them?"
        ) from error


def _as_vector(embedding: Any) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.asarray(embedding, np.float32)


def _difference(expected: np.ndarray, actual: np.ndarray | str) -> float:
    if isinstance(actual, str) or expected.shape != actual.shape:
        return float("inf")
    return float(np.abs(expected - actual).max())
