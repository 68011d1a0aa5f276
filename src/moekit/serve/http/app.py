"""The routes.

POST /v1/chat/completions, /v1/completions     as OpenAI's; the field `steer` picks a loaded plan
GET  /v1/models, /v1/models/{name}             the model, its context, the plans
GET  /health                                   200 while requests are taken, 503 when the server goes down
GET  /metrics                                  Prometheus
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from moekit.errors import UserError
from moekit.serve.http.calls import Call, Service, asks
from moekit.serve.http.errors import ApiError, api_error
from moekit.serve.http.guard import Guard
from moekit.serve.http.metrics import Metrics
from moekit.serve.http.replies import Kind, Reply
from moekit.serve.http.schemas import ChatRequest, CompletionRequest, Request
from moekit.serve.scheduler import ClosedError, QueueFullError

MAX_BODY_BYTES = 1 << 20
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The server as an ASGI application.

    Args:
        service: what it works with.
        api_key: that requests must bring (all but /health); None: none.
        max_body_bytes: of a request.
    """
    app = FastAPI(title="moekit", docs_url=None, redoc_url=None, openapi_url=None)
    answers: Counter[int] = Counter()
    metrics = Metrics(service.scheduler, answers)

    def told(error: ApiError) -> Response:
        answers[error.status] += 1
        return error.response

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> Response:
        return told(api_error(error))

    for known in (ApiError, UserError, ClosedError, QueueFullError):  # any other is logged along with its answer
        app.add_exception_handler(known, failed)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return told(_first(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(_: HttpRequest, error: HTTPException) -> Response:
        return told(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        service.check_model(request.model)
        return await answer("chat", request, [service.chat_ids(request)], http)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, http: HttpRequest) -> Response:
        service.check_model(request.model)
        prompts = [service.ids(x) if isinstance(x, str) else x for x in request.prompts]
        if not prompts:
            raise ApiError(400, "there is no prompt", "prompt")
        return await answer("completion", request, prompts, http)

    async def answer(kind: Kind, request: Request, prompts: Sequence[Sequence[int]], http: HttpRequest) -> Response:
        wanted = asks(request, prompts)
        likely = wanted[0].top_logprobs is not None
        tokens = sum(map(len, prompts))
        reply = Reply(kind, service.name, service.tokenizer, tokens, len(wanted), likely)
        call = Call(service.scheduler, wanted, http)
        if not request.stream:
            return JSONResponse(await reply.whole(call))
        chunks = reply.chunks(call, request.stream_options.include_usage)
        first = await anext(chunks)  # what fails before there is any text gets a status of its own
        return StreamingResponse(_again(first, chunks, call), media_type="text/event-stream", headers=NO_CACHE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card()

    def card() -> dict[str, Any]:
        batcher = service.scheduler.batcher
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "moekit",
            "max_model_len": batcher.engine.context,
            "steer": batcher.steering.names if batcher.steering else [],
        }

    @app.get("/health")
    async def health() -> Response:
        scheduler = service.scheduler
        state = {
            "status": "ok" if scheduler.alive else "shutting down",
            "model": service.name,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "batched": service.why_not_batched is None,
        }
        return JSONResponse(state, 200 if scheduler.alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=METRICS_TYPE)

    app.add_middleware(Guard, told=told, api_key=api_key, max_body_bytes=max_body_bytes)
    return app


NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _again(first: str, chunks: AsyncIterator[str], call: Call) -> AsyncIterator[str]:
    try:
        yield first
        async for chunk in chunks:
            yield chunk
    finally:
        call.end()


def _first(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body; of what can be several things, the one that was looked at closest."""
    error = max(errors, key=lambda x: len(x["loc"]))
    place = [str(x) for x in error["loc"] if x != "body"]
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(place)} is not supported here", place[0], "unsupported_parameter")
    message = str(error["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(place)}: {message}" if place else message, place[0] if place else None)
