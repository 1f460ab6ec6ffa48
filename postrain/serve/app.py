"""The routes, and what stands before all of them: the API key, limits, requests under way, errors in OpenAI's form."""

import asyncio
import hmac
import json
import pathlib
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from postrain.serve import sessions, sglang
from postrain.serve.errors import ApiError
from postrain.serve.openai_chat import read_chat
from postrain.serve.openai_completions import read_completion
from postrain.serve.schemas import check_name, parse_body
from postrain.serve.served import Served
from postrain.serve.streams import EventStream, unless_gone

PAGE = pathlib.Path(__file__).with_name("page.html")
OPEN_PATHS = ("/", "/health", "/health_generate")  # without the API key


def make_app(served: Served) -> "Gate":
    """An ASGI application for a language model."""
    engine = served.engine

    def gauges() -> dict[str, float]:
        return {
            "postrain_open_answers": engine.num_open,
            "postrain_running_answers": engine.engine.num_running,
            "postrain_weights_version": engine.engine.version,
        }

    routes = [
        Route("/", lambda request: HTMLResponse(PAGE.read_text(encoding="utf-8")), methods=["GET"]),
        Route("/v1/chat/completions", make_route(served, read_chat), methods=["POST"]),
        Route("/v1/completions", make_route(served, read_completion), methods=["POST"]),
        Route("/sessions/{name}", lambda request: show_session(served, request), methods=["GET", "DELETE"]),
        *sglang.make_routes(served, make_route),
    ]
    return Gate(make_starlette(served, gauges, routes), served)


def make_starlette(served, gauges: Callable[[], dict[str, float]], routes: list[Route]) -> Starlette:
    """``routes``, and what all servers have. ``served``: with ``name``, ``folder``, ``max_length``, ``metrics``."""
    metrics = lambda request: PlainTextResponse(served.metrics.format(gauges()))
    common = [
        Route("/health", lambda request: Response(), methods=["GET"]),
        Route("/health_generate", lambda request: Response(), methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/models", lambda request: to_response(list_models(served)), methods=["GET"]),
        Route("/v1/models/{name:path}", lambda request: show_model(served, request), methods=["GET"]),
    ]
    handlers = {ApiError: _answer_api_error, HTTPException: _answer_http_error, Exception: _answer_failure}
    return Starlette(routes=[*common, *routes], exception_handlers=handlers)


def make_route(served: Served, read: Callable) -> Callable:
    """A route for ``read(served, body)``, which checks a body and gives what writes its answers: an object with
    ``job``, ``completions``, ``collect(answers)`` and ``stream(answers)``."""

    async def route(request: Request) -> Response | EventStream:
        session = sessions.check_name(request.headers.get(sessions.HEADER))
        body = parse_body(await request.body())
        loop = asyncio.get_running_loop()
        reply = await loop.run_in_executor(served.workers, read, served, body)
        headers = {"x-ignored-fields": ", ".join(map(ascii, reply.job.ignored))} if reply.job.ignored else {}
        answers = served.open(reply.job)

        def close() -> None:
            answers.close()
            if session is not None and len(reply.completions) == reply.job.count:
                served.sessions.add(session, reply.job, reply.completions, served.versions)
            served.note(answers, reply.completions.values(), sum(map(len, reply.job.prompts)))

        if reply.job.stream:
            return EventStream(reply.stream(answers), close, headers)
        try:
            result = await unless_gone(request.receive, reply.collect(answers))
        finally:
            close()
        return to_response(result, headers) if result is not None else Response(status_code=499)

    return route


def to_response(value, headers: dict | None = None, status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, headers, "application/json")


def list_models(served) -> dict:
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "postrain"}
    return {"object": "list", "data": [model | {"max_model_len": served.max_length, "root": served.folder}]}


def show_model(served, request: Request) -> Response:
    check_name(served, request.path_params["name"])
    return to_response(list_models(served)["data"][0])


def show_session(served: Served, request: Request) -> Response:
    name = request.path_params["name"]
    if request.method == "DELETE":
        return to_response({"id": name, "deleted_turns": served.sessions.delete(name)})
    return to_response({"id": name, "turns": served.sessions.get(name)})


async def _answer_api_error(request: Request, error: ApiError) -> Response:
    return Response(error.to_bytes(), error.status, media_type="application/json")


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Of an unknown path, or a method that it does not have."""
    found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return Response(found.to_bytes(), found.status, error.headers, "application/json")


async def _answer_failure(request: Request, error: Exception) -> Response:
    """Of a mistake of ours, which Starlette raises again for the log."""
    return Response(
        ApiError(500, f"the server failed: {type(error).__name__}").to_bytes(), 500, None, "application/json"
    )


class Gate:
    """Lets a request in, or refuses it; counts those that are inside. ``draining``: none is let in any more."""

    def __init__(self, app: Starlette, served):
        self.app, self.served = app, served
        self.draining, self.num_inside = False, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def watch(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.num_inside += 1
        try:
            try:
                self._check(scope)
            except ApiError as error:
                return await Response(error.to_bytes(), error.status, media_type="application/json")(
                    scope, receive, watch
                )
            await self.app(scope, self._limit(receive), watch)
        finally:
            self.num_inside -= 1
            self.served.metrics.add("postrain_requests_total", status=str(status))

    def _check(self, scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.draining:
            raise ApiError(503, "the server is about to end: it takes no new requests", code="shutting_down")
        key, path = self.served.limits.api_key, scope["path"]
        if key and path not in OPEN_PATHS:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, key.encode()):
                raise ApiError(
                    401, "expected the server's API key as `Authorization: Bearer KEY`", code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self.served.limits.max_bytes):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the {self.served.limits.max_bytes} bytes that are taken")

    def _limit(self, receive):
        """Bodies that do not say how long they are are counted."""
        count = 0

        async def counted():
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.served.limits.max_bytes:
                raise self._too_large()
            return message

        return counted
