"""A trained model over HTTP: health, metrics, predictions, and a page to drop an image on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import python_multipart.exceptions
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from piip_scale.data.images import ImageError
from piip_scale.errors import DataError, PiipError
from piip_scale.serving.answering import Answering, Question, TooLargeError
from piip_scale.serving.waiting_line import LineFullError, TooLateError, WaitingLine

_MIB = 1 << 20
_FORM_ROOM = 64 << 10
# The page brings all that it shows.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src blob: data:"
)
# A request's own fault first; anything else of ours is the server's.
_CODES: tuple[tuple[type[PiipError], int], ...] = (
    (TooLargeError, 413),
    (LineFullError, 503),
    (TooLateError, 504),
    (ImageError, 415),
    (DataError, 400),
    (PiipError, 422),
)


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        mib: Size of a body.
        pixels: Of an image.
        seconds: From the first byte to the answer.
        waiting: Requests that wait while one is answered; more are sent away.
    """

    mib: float = 20.0
    pixels: int = 50_000_000
    seconds: float = 60.0
    waiting: int = 16


class _Metrics:
    """What ``/metrics`` holds."""

    def __init__(self, line: WaitingLine) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("piip_requests", "Answers.", ["path", "code"], registry=self.registry)
        meaning = "From a prediction's request to its answer, waiting included."
        self.seconds = Histogram("piip_predict_seconds", meaning, registry=self.registry)
        gauge = Gauge("piip_requests_in_line", "Predictions that run or wait.", registry=self.registry)
        gauge.set_function(lambda: line.length)


def build_app(answering: Answering, limits: Limits) -> FastAPI:
    """The application; one process of it serves one network.

    Args:
        answering: The model.
        limits: What a request may cost.
    """
    line = WaitingLine(limits.waiting, limits.seconds)
    metrics = _Metrics(line)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        line.close()

    app = FastAPI(title="piip_scale", lifespan=lifespan)
    app.middleware("http")(_counting(metrics))
    app.exception_handler(PiipError)(_refused)
    app.exception_handler(RequestValidationError)(_misasked)
    app.exception_handler(HTTPException)(_not_offered)
    page = resources.files("piip_scale.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": line.length, **answering.about}

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/predict")
    async def predict(
        request: Request,
        threshold: Annotated[float, Query(ge=0, le=1)] = 0.5,
        branches: bool = False,
        picture: bool = False,
    ) -> dict[str, Any]:
        started = time.perf_counter()
        content = await _image_of(request, limits)
        question = Question(content, threshold, branches, picture)
        answer = await line.run(lambda: answering.answer(question))
        metrics.seconds.observe(time.perf_counter() - started)
        return answer

    return app


def _counting(metrics: _Metrics) -> Callable[..., Awaitable[Response]]:
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        # By what is there, not by what was asked: anybody can ask for any path.
        route = request.scope.get("route")
        metrics.requests.labels(getattr(route, "path", "other"), str(response.status_code)).inc()
        return response

    return count


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PiipError)
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    headers = {"Retry-After": "1"} if code == 503 else {}
    return JSONResponse({"error": error.line}, status_code=code, headers=headers)


async def _misasked(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # Numbers that JSON has no word for, as nan, would break the answer: their text.
    wrong = (f"{problem['loc'][-1]}: got {str(problem['input'])!r}; {problem['msg']}" for problem in error.errors())
    return JSONResponse({"error": "; ".join(wrong)}, status_code=422)


async def _not_offered(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    line = f"{request.method} {request.url.path}: {error.detail}; GET / is a page, POST /predict takes an image"
    return JSONResponse({"error": line}, status_code=error.status_code, headers=error.headers)


async def _image_of(request: Request, limits: Limits) -> bytes:
    """The image file in a request's body: raw, or the first file of a form.

    Raises:
        TooLargeError: The body is too large; no more of it is read.
        TooLateError: It does not come.
        DataError: It is empty, or a form without a file.
    """
    try:
        body = await asyncio.wait_for(_body_of(request, limits), limits.seconds)
    except asyncio.TimeoutError:
        raise TooLateError(f"the body did not come within {limits.seconds:g} s") from None
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        body = await _file_of(request, body)
    if not body:
        raise DataError("no image was sent", fix="send a file as the body, or in a form (multipart/form-data)")
    return body


async def _body_of(request: Request, limits: Limits) -> bytes:
    most = int(limits.mib * _MIB) + _FORM_ROOM
    too_large = TooLargeError(f"the body is larger than {limits.mib:g} MiB", fix="send a smaller image")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
    except ClientDisconnect:
        raise DataError("the body ended before it was whole") from None
    return bytes(body)


async def _file_of(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_part_size=len(body)).parse()
    except (MultiPartException, python_multipart.exceptions.FormParserError, KeyError) as error:
        fix = "send multipart/form-data, or the file alone"
        raise DataError("the form cannot be read", value=str(error), fix=fix) from None
    try:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        return await files[0].read() if files else b""
    finally:
        await form.close()
