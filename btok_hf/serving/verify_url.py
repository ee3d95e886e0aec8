"""Compare a running server with the golden vectors of a repository, over the `/v1/embeddings` of OpenAI.

Inputs are sent as chat `messages`, which vLLM, SGLang and others take: images as data URLs, a video as a data URL of
its frames. Each input is sent alone, with numbers as the answer, and then all of them at once, in base64, which is
what clients of OpenAI ask for. Texts without instruction are sent as `input` too: servers may embed it in another way.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download

from btok_hf import golden
from btok_hf.input_kinds import as_list
from btok_hf.serving import KEY, SETTINGS
from btok_hf.verification import check_distinct, golden_file

# From the part of a request that holds the inputs, and the encoding, to the embeddings, or why the server refused it.
Embed = Callable[[dict[str, Any], str], "list[np.ndarray] | str"]
TIMEOUT = 300  # seconds for one request
NOT_OF_THE_INPUT = (401, 403, 408, 429)  # status of a refusal that other inputs, or another time, would meet too


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
    it is sent as the key. If the repository has a default prompt, texts are not sent as `input`, because a server may
    put the prompt before them or not.

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
        RuntimeError: The server cannot be reached, is too busy to look at an input (429), wants another key, answers
            no input, or its vectors differ.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The address of a server starts with http:// or https://, got {url!r}.")
    url = url.rstrip("/").removesuffix("/v1")
    content = json.loads(golden_file(path_or_repo, revision=revision, token=token).read_text("utf-8"))
    check_distinct(path_or_repo, content)
    allowed = content["tolerance"] if tolerance is None else tolerance
    rows = content["inputs"]
    whole = len(base64.b64decode(rows[0]["embedding"])) // 4
    has_default = _has_default_prompt(path_or_repo, revision, token)
    request = {"model": _served_model(url)}

    def embed(body: dict[str, Any], encoding: str) -> list[np.ndarray] | str:
        body = {**request, **body, "encoding_format": encoding}
        answer = _embed(url, body)
        if isinstance(answer, str) or len(answer[0]) >= whole:
            return answer
        longer = _embed(url, {**body, "dimensions": whole})  # of a repository with truncate_dim
        return answer if isinstance(longer, str) else longer

    bodies = [request_body(row, has_default) for row in rows]
    alone = [embed(body, "float") for body in bodies]
    with ThreadPoolExecutor(len(rows)) as pool:
        together = list(pool.map(lambda body: embed(body, "base64"), bodies))
    texts = {row["name"]: row["text"] for row in rows if row.keys() == {"name", "text", "embedding"}}
    plain: dict[str, list[np.ndarray]] = {}
    note = "not compared: the repository has a default prompt, which a server may put before them or not"
    if not has_default:
        plain, note = _embed_as_input(texts, embed)
    largest, different, unreached = 0.0, [], []
    print(f"{'':18}{'alone':>9}{'together':>10}{'as input':>10}")
    for row, *answers in zip(rows, alone, together):
        if refusals := [answer for answer in answers if isinstance(answer, str)]:
            unreached.append(row["name"])
            print(f"{row['name']:18} not reached: {refusals[0]}")
            continue
        expected = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
        vectors = [answer[0] for answer in answers if not isinstance(answer, str)] + plain.get(row["name"], [])
        found = [golden.difference(expected, vector) for vector in vectors]
        fits = all(difference <= allowed for difference in found)  # false for NaN
        largest = max(largest, *found)
        last = f"{np.max(found[2:]):.1e}" if found[2:] else "–"
        print(f"{row['name']:18}{found[0]:9.1e}{found[1]:10.1e}{last:>10}  {'ok' if fits else 'DIFFERS'}")
        if not fits:
            different.append(f"{row['name']!r}: {np.max(found):.1e}")
    if note:
        print(f"texts as input: {note}")
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


def _embed_as_input(texts: Mapping[str, str], embed: Embed) -> tuple[dict[str, list[np.ndarray]], str]:
    """The embeddings of texts that are sent as `input`, alone and in one list, by name; or none, and why not."""
    if not texts:
        return {}, "there is no golden text without instruction"
    answers = [embed({"input": text}, "float") for text in texts.values()]
    answers.append(embed({"input": list(texts.values())}, "base64"))
    if refusals := [answer for answer in answers if isinstance(answer, str)]:
        return {}, f"not reached: {refusals[0]}"
    *alone, together = [answer for answer in answers if not isinstance(answer, str)]
    return {name: [one[0], other] for name, one, other in zip(texts, alone, together)}, ""


def request_body(row: Mapping[str, Any], has_default: bool = False) -> dict[str, Any]:
    """The part of a request to `/v1/embeddings` that holds the input of a golden row, with PNG images in base64.

    A video is sent as its frames, without times. The frames of golden videos are two per second, which is what servers
    of this library take them for.

    Args:
        row (`dict`): Of a golden file.
        has_default (`bool`): The repository has a default prompt, which an empty system message replaces: chat
            templates render nothing for it.
    """
    if "messages" in row:
        messages = [{**message, "content": _content(message["content"])} for message in row["messages"]]
    else:
        kinds = [key for key in row if key in ("image", "video", "text")]  # some models keep the order as given
        parts = [{"type": kind, kind: value} for kind in kinds for value in as_list(row[kind])]
        messages = [{"role": "user", "content": _content(parts)}]
        if "prompt" in row:
            messages.insert(0, {"role": "system", "content": row["prompt"]})
    if has_default and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ""})
    return {"messages": messages}


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


def _has_default_prompt(path_or_repo: str | Path, revision: str | None, token: str | None) -> bool:
    """Whether texts without a prompt have one, by the settings of the repository."""
    path = Path(path_or_repo, SETTINGS)
    if not Path(path_or_repo).exists():
        path = Path(hf_hub_download(str(path_or_repo), SETTINGS, revision=revision, token=token))
    saved = json.loads(path.read_text("utf-8"))
    return bool(saved.get("prompts", {}).get(saved.get("default_prompt_name")))


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
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(
            f"{url}/v1/models names no model ({error}). Start the server, and give its address without a path, "
            "e.g. http://127.0.0.1:8000."
        ) from error


def _request(address: str, body: bytes | None = None) -> urllib.request.Request:
    request = urllib.request.Request(address, body, {"content-type": "application/json"})
    if key := os.environ.get(KEY):  # not for the host that an answer may redirect to
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    return request


def _embed(url: str, body: dict[str, Any]) -> list[np.ndarray] | str:
    """The embeddings of a request, in the order of its inputs, or why the server refused it."""
    request = _request(f"{url}/v1/embeddings", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            rows = sorted(json.load(answer)["data"], key=lambda row: row["index"])
        count = len(body["input"]) if isinstance(body.get("input"), list) else 1
        if [row["index"] for row in rows] != list(range(count)):
            raise ValueError(f"rows {[row['index'] for row in rows]} for {count} inputs")
        return [_as_vector(row["embedding"]) for row in rows]
    except urllib.error.HTTPError as error:
        message = f"HTTP {error.code} {_body(error)}"
        if error.code in NOT_OF_THE_INPUT:
            raise RuntimeError(
                f"{url} did not look at a golden input: {message}. Try again when it is less busy, or with its key in "
                f"{KEY}."
            ) from error
        if error.code < 500:
            return message
        raise RuntimeError(f"{url} failed on a golden input: {message}. See its log.") from error
    except (OSError, HTTPException) as error:
        raise RuntimeError(f"{url} stopped answering ({error!r}). See its log.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise RuntimeError(
            f"{url}/v1/embeddings answers no embedding ({type(error).__name__}: {error}). Is it a server of them?"
        ) from error


def _body(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says to an error."""
    try:
        return error.read().decode("utf-8", "replace")[:200]
    except (OSError, HTTPException):
        return "(and its text is cut off)"


def _as_vector(embedding: Any) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.asarray(embedding, np.float32)
