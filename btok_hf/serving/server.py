"""The server behind `btok serve`: OpenAI's embeddings over HTTP, with vLLM's `messages`, bounds and metrics.

What every request passes is in `gate.py`, what it may hold in `schema.py`, how rows become batches in `batching.py`.
"""

import asyncio
import base64
import math
import os
import reprlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from btok_hf.arguments import check_free
from btok_hf.encoding import NotFiniteError
from btok_hf.lengths import media_tokens
from btok_hf.model_info import trained_dimensions
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.serving import KEY
from btok_hf.serving.batching import Batcher, Budget, QueueFull, Row
from btok_hf.serving.gate import Gate, error_response
from btok_hf.serving.limits import Limits
from btok_hf.serving.origins import Origins
from btok_hf.serving.schema import EmbeddingRequest


class ServedModel(BTokSentenceTransformer):
    """The model, which counts tokens and embeds a batch of inputs that were checked."""

    lengths: np.ndarray

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, positions: Sequence[int] = (), **kwargs: Any
    ) -> dict[str, Any]:
        """As in the superclass, and remember the length of each row."""
        features = super().preprocess(inputs, prompt=prompt, positions=positions, **kwargs)
        self.lengths[list(positions)] = features["attention_mask"].sum(1)
        return features

    def check_media(self, item: Any) -> None:
        """Refuse images and videos that fit no row, before the processor makes gigabytes of tiny ones.

        Raises:
            ValueError: They have twice the tokens of a row, or more. The number is an estimate, so what is nearer is
                left to `preprocess`.
        """
        tokens, most = media_tokens(item, self.processor), self.max_seq_length or math.inf
        if tokens > 2 * most:
            raise ValueError(
                f"the images and videos of a row have about {tokens} tokens, and a row has {most} (max_seq_length): "
                "send fewer or smaller ones"
            )

    def embed(self, items: list[Any], prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of shape `(inputs, dimensions)` and tokens of each input. For one thread.

        Raises:
            RuntimeError: An embedding is not finite, which no client can mend.
        """
        self.lengths = np.zeros(len(items), int)
        # Whole: each request says how many numbers it wants.
        whole = self.transformer.config.get_text_config().hidden_size
        try:
            vectors = self.encode(items, prompt=prompt, truncate_dim=whole, show_progress_bar=False)
        except NotFiniteError as error:
            raise RuntimeError(str(error)) from error
        return vectors, self.lengths


class _Metrics:
    """What Prometheus reads at `/metrics`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("btok_requests", "Answers, by status", ["status"], registry=self.registry)
        self.seconds = Histogram("btok_request_seconds", "Time to the answer", registry=self.registry)
        self.tokens = Counter("btok_tokens", "Embedded tokens", registry=self.registry)
        sizes = [2**power for power in range(11)]
        self.batch = Histogram("btok_batch_rows", "Rows of a batch", buckets=sizes, registry=self.registry)
        self.rows = Gauge("btok_rows", "Rows waiting, being read or being embedded", registry=self.registry)

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests.labels(status).inc()
        self.seconds.observe(seconds)


def make_app(model: ServedModel, name: str, limits: Limits, origins: Origins, api_key: str | None = None) -> FastAPI:
    """The application.

    Args:
        model (`ServedModel`): The model. One thread of the application uses it.
        name (`str`): What clients call it.
        limits (`Limits`): Bounds.
        origins (`Origins`): What requests may name.
        api_key (`str`, *optional*): What clients must send as `Authorization: Bearer …` for paths below `/v1`.
    """
    metrics = _Metrics()
    row_budget = Budget(limits.queue_rows, "rows (--queue-rows)")
    pixel_budget = Budget(limits.queue_pixels, "pixels (--queue-pixels)")
    metrics.rows.set_function(lambda: row_budget.held)
    image_limits = model.transformer.image_limits

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(model.embed, limits.batch_rows, metrics.batch.observe)
        # Two threads are enough to decode images while a batch is embedded. Downloads and videos have others, because
        # a slow host or a long video occupies a thread for long.
        with ThreadPoolExecutor(2) as app.state.readers, ThreadPoolExecutor(8) as app.state.slow_readers:
            yield
        app.state.batcher.close()

    # The page with interactive documentation would load scripts from elsewhere. Redirects would lead to the host that
    # the client names.
    app = FastAPI(title="btok serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(
        Gate, limits=limits, key=None if api_key is None else os.fsencode(api_key), answered=metrics.answered
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Of a value that may have two forms, the error of the one that was read further.
        last = max(reversed(error.errors()), key=lambda one: len(one["loc"]))
        where = _place(last, error.body)
        message = last["msg"].removeprefix("Value error, ")
        if last["type"] == "literal_error":
            message += f", got {reprlib.repr(last['input'])}"
        if last["type"] == "json_invalid":
            where, message = "", f"the body is not JSON (at character {last['loc'][-1]})"
        elif isinstance(error.body, bytes):
            where, message = "", "the body is not read as JSON: send the header Content-Type: application/json"
        return error_response(400, f"{where}: {message}" if where else message, where or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "the server failed at this request; its log says why")

    described = {"id": name, "object": "model", "created": 0, "owned_by": "btok"}

    def no_model(asked: str) -> Response:
        return error_response(404, f"there is no model {asked!r} here, only {name!r}", "model")

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return Response()

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{asked:path}")
    async def show_model(asked: str) -> Any:
        return described if asked == name else no_model(asked)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> Any:
        if body.model not in (None, name):
            return no_model(body.model)
        if not 0 < body.count() <= limits.max_rows:
            text = f"a request has 1 to {limits.max_rows} rows (--max-rows), got {body.count()}"
            return error_response(400, text, "input")
        if body.characters() > limits.max_text:
            text = f"the texts of a request have {limits.max_text} characters at most (--max-text), got "
            return error_response(400, f"{text}{body.characters()}")
        try:
            dimensions = _dimensions(model, body.dimensions)
            prompt = instruction_of(model, body)
            with row_budget.reserve(body.count()), pixel_budget.reserve() as reserve:
                read = asyncio.get_running_loop().run_in_executor
                threads = app.state.slow_readers if body.reads_slowly() else app.state.readers
                items = await read(threads, body.rows, image_limits, origins, reserve)
                for item in items:
                    model.check_media(item)
                futures = app.state.batcher.submit(items, prompt)
                try:
                    rows = await asyncio.gather(*map(asyncio.wrap_future, futures))
                finally:
                    for future in futures:  # a request that failed, timed out or has no client leaves the queue
                        future.cancel()
        except QueueFull as error:
            return error_response(429, str(error))
        except ValueError as error:
            return error_response(400, str(error))
        tokens = sum(row.tokens for row in rows)
        metrics.tokens.inc(tokens)
        return {
            "object": "list",
            "model": name,
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(row, dimensions, body.encoding_format)}
                for index, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return app


def _place(error: Mapping[str, Any], body: Any) -> str:
    """The path to a wrong value: names of fields and numbers, without those that pydantic gives to alternatives."""
    path, value = [], body
    for part in error["loc"][1:]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
            path.append(part)
    missing = error["loc"][1:][-1:] if error["type"] == "missing" else ()
    return ".".join(map(str, (*path, *missing)))


def instruction_of(model: BTokSentenceTransformer, body: EmbeddingRequest) -> str:
    """The instruction of a request: the system message, a named one, or else the default of the model.

    Raises:
        ValueError: Two at once, or a name that the model does not have.
    """
    given = body.instruction()
    prompt_name = body.input_type if body.prompt_name is None else body.prompt_name
    if given is not None and prompt_name is not None:
        raise ValueError("give either a system message or 'prompt_name' / 'input_type', not both")
    if given is not None:
        return given
    prompt_name = model.default_prompt_name if prompt_name is None else prompt_name
    if prompt_name is None:
        return ""
    if prompt_name not in model.prompts:
        raise ValueError(f"the model has no prompt {prompt_name!r}, only {sorted(model.prompts)}")
    return model.prompts[prompt_name] or ""


def _dimensions(model: ServedModel, asked: int | None) -> int | None:
    """Dimensions to cut embeddings to: those asked for, if the model was trained for them, or the model's own."""
    own = [] if model.truncate_dim is None else [model.truncate_dim]
    allowed = {*trained_dimensions(model.transformer.config), *own}
    if asked is not None and asked not in allowed:
        raise ValueError(
            f"'dimensions' must be one of {sorted(allowed)}, got {asked}: config.json (matryoshka_dimensions) names "
            "no others that the model was trained for. Leave 'dimensions' out"
        )
    return asked or model.truncate_dim


def _written(row: Row, dimensions: int | None, encoding: str | None) -> str | list[float]:
    vector = row.embedding[:dimensions]
    if dimensions is not None:
        vector = vector / np.linalg.norm(vector)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


def serve(
    repo: str,
    host: str,
    port: int,
    name: str | None,
    limits: Limits,
    hosts: Collection[str] = (),
    folder: Path | None = None,
    **load: Any,
) -> None:
    """Load a model and serve it until SIGTERM or SIGINT, after which what is queued is answered.

    Args:
        repo (`str`): Folder or Hub id.
        host, port: Where to listen.
        name (`str`, *optional*): What clients call the model. Default: `repo`.
        limits (`Limits`): Bounds.
        hosts (`Collection[str]`): Hosts that clients may name addresses of.
        folder (`Path`, *optional*): Folder that clients may name files of.
        load: For `BTokSentenceTransformer`.
    """
    api_key = os.environ.get(KEY)
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        raise ValueError(f"{KEY} is set, but empty or with white space around it. Give a key, or unset it for none.")
    check_free(host, port)  # before the model is loaded, because that takes a while
    # Pillow's own bound is for applications without one. Origins checks images before they are decoded.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.max_image_pixels)
    origins = Origins(limits.max_image_pixels, limits.max_body, limits.timeout, hosts, folder)
    app = make_app(ServedModel(repo, **load), name or repo, limits, origins, api_key)
    # h11 bounds the size of headers, httptools does not. After SIGTERM, all that outlasts the timeout is a client that
    # does not read its answer.
    uvicorn.run(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        workers=1,  # not the variable WEB_CONCURRENCY, which hosts set: the model is loaded once, here
        timeout_graceful_shutdown=math.ceil(limits.timeout) + 1,
        access_log=False,
        server_header=False,
    )
