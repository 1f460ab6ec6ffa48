"""The routes, and what stands before all of them: the API key, limits, requests under way, errors in OpenAI's form."""

import asyncio
import contextlib
import hmac
import json
import pathlib
import time
from collections.abc import AsyncGenerator, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from postrain.serve import sessions, sglang
from postrain.serve.errors import ApiError
from postrain.serve.openai_chat import read_chat
from postrain.serve.openai_completions import read_completion
from postrain.serve.schemas import check_name, parse_body, write_ignored
from postrain.serve.served import Served
from postrain.serve.streams import DONE, EventStream, out_of_time, unless_gone

PAGE = pathlib.Path(__file__).with_name("page.html")
HEALTH_PATHS = ("/health", "/health_generate")
OPEN_PATHS = ("/", *HEALTH_PATHS)  # without the API key
END = "postrain.end"  # of a request's scope: the time (``time.monotonic``) at which it is out of time
GRACE = 1.0  # seconds in which a stream may end with an error of its own, before its connection is closed


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
        Route("/sessions/{name:path}", lambda request: show_session(served, request), methods=["GET", "DELETE"]),
        *sglang.make_routes(served, make_route),
    ]
    return Gate(make_starlette(served, gauges, routes, lambda: engine.is_alive), served)


def make_starlette(
    served,
    gauges: Callable[[], dict[str, float]],
    routes: list[Route],
    is_alive: Callable[[], bool] = lambda: True,
) -> Starlette:
    """``routes``, and what all servers have. ``served``: with ``name``, ``folder``, ``max_length``, ``metrics``."""
    metrics = lambda request: PlainTextResponse(served.metrics.format(gauges()))
    common = [
        *(Route(path, lambda request: Response(status_code=200 if is_alive() else 503)) for path in HEALTH_PATHS),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/models", lambda request: to_response(list_models(served)), methods=["GET"]),
        Route("/v1/models/{name:path}", lambda request: show_model(served, request), methods=["GET"]),
    ]
    handlers = {
        ApiError: _answer_api_error,
        HTTPException: _answer_http_error,
        ClientDisconnect: lambda request, error: Response(status_code=499),
        Exception: _answer_failure,
    }
    return Starlette(routes=[*common, *routes], exception_handlers=handlers)


def make_route(served: Served, read: Callable) -> Callable:
    """A route for ``read(served, body)``, which checks a body and gives what writes its answers: an object with
    ``job``, ``completions``, ``collect(answers)`` and ``stream(answers)``."""

    async def route(request: Request) -> Response | EventStream:
        session = sessions.check_name(request.headers.get(sessions.HEADER))
        data = await request.body()
        loop = asyncio.get_running_loop()
        with served.reserve():
            reply = await loop.run_in_executor(served.workers, lambda: read(served, parse_body(data)))
            constraint = None
            if reply.job.wanted is not None:
                constraint = await loop.run_in_executor(served.compilers, served.compile, reply.job)
            answers = served.open(reply.job, constraint, request.scope[END])
        headers = {"x-ignored-fields": write_ignored(reply.job.ignored)} if reply.job.ignored else {}

        closed = False

        def close() -> None:
            nonlocal closed
            if closed:
                return
            closed = True
            answers.close()
            if session is not None and len(reply.completions) == reply.job.count:
                served.sessions.add(session, reply.job, reply.completions, served.versions)
            served.note(answers, reply.completions.values(), sum(map(len, reply.job.prompts)))

        async def stream() -> AsyncGenerator[bytes, None]:
            async with contextlib.aclosing(reply.stream(answers)) as events:
                async for event in events:
                    if event == DONE:  # who has read it finds the turn in its session
                        close()
                    yield event

        if reply.job.stream:
            return EventStream(stream(), close, headers)
        try:
            result = await unless_gone(request.receive, reply.collect(answers))
        finally:
            close()
        return to_response(result, headers) if result is not None else Response(status_code=499)

    return route


def to_response(value, headers: dict | None = None, status: int = 200) -> Response:
    """``value``: of JSON, or bytes that are JSON already."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Response(data, status, headers, "application/json")


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
    return to_response({"id": name, **served.sessions.get(name)})


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
    """Lets a request in, or refuses it; counts those that are inside, and sees to it that each of them ends.

    ``draining``: none is let in any more.
    """

    def __init__(self, app: Starlette, served):
        self.app, self.served = app, served
        self.draining, self.num_inside = False, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, seconds = 0, self.served.limits.seconds

        async def watch(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def refuse(error: ApiError) -> None:
            await Response(error.to_bytes(), error.status, media_type="application/json")(scope, receive, watch)

        self.num_inside += 1
        scope[END] = time.monotonic() + seconds
        try:
            # A body that never comes whole, a client that reads no further: waiting for these has no end of its own.
            async with asyncio.timeout(seconds + GRACE):
                try:
                    self._check(scope)
                except ApiError as error:
                    return await refuse(error)
                await self.app(scope, self._limit(receive), watch)
        except TimeoutError:
            if not status:
                await refuse(out_of_time(seconds))
            # Else the server closes a connection whose response is not whole.
        finally:
            self.num_inside -= 1
            self.served.metrics.add("postrain_requests_total", status=str(status or 500))

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
