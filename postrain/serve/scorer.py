"""POST /v1/score: a reward model or classifier over HTTP. Rows are those of `postrain score`."""

import asyncio
import concurrent.futures
import time
import uuid

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from postrain.data.bad_row import BadRow
from postrain.errors import UserError
from postrain.rollout.score import Scorer, score_rows
from postrain.serve.app import Gate, make_starlette, to_response
from postrain.serve.errors import ApiError, wrong
from postrain.serve.limits import Limits
from postrain.serve.metrics import Metrics
from postrain.serve.schemas import Fields, check_name, describe, parse_body

MAX_ROWS = 1024


class ServedScorer:
    """``name``: of the model, as clients call it."""

    def __init__(self, model: Scorer, name: str, folder: str, limits: Limits):
        self.model, self.name, self.folder, self.limits = model, name, folder, limits
        self.names = {name, folder}  # all that a request may call the model
        self.metrics, self.created = Metrics(), int(time.time())
        self.max_length = limits.max_length or model.config.max_positions
        self.workers = concurrent.futures.ThreadPoolExecutor(1, "scores")
        self.num_open = 0

    def close(self) -> None:
        self.workers.shutdown()


def make_scorer_app(served: ServedScorer) -> Gate:
    """An ASGI application."""

    async def route(request: Request) -> Response:
        rows = read_rows(served, parse_body(await request.body()))
        if served.num_open >= served.limits.waiting + 1:
            raise ApiError(429, f"{served.num_open} requests wait: try again later", code="queue_full")
        served.num_open += 1
        try:
            scores = await asyncio.get_running_loop().run_in_executor(served.workers, score_rows, served.model, rows)
        except BadRow as error:
            raise wrong(f"rows[{error.ref.line - 1}]", f"{error.reason} {error.advice}") from None
        except UserError as error:
            raise ApiError(400, str(error), "rows") from None
        finally:
            served.num_open -= 1
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        found = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return to_response(found | {"model": served.name, "data": data})

    gauges = lambda: {"postrain_open_answers": served.num_open}
    return Gate(make_starlette(served, gauges, [Route("/v1/score", route, methods=["POST"])]), served)


def read_rows(served: ServedScorer, body: dict) -> list[dict]:
    """The rows of a request: a list as ``rows``, or one whose keys stand in the body itself."""
    fields = Fields(body)
    check_name(served, fields.text("model"))
    rows = fields.take("rows")
    if rows is None:
        return [{key: value for key, value in body.items() if key != "model"}]
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_ROWS or not all(isinstance(row, dict) for row in rows):
        raise wrong("rows", f"expected a list of 1 to {MAX_ROWS} objects, found {describe(rows)}")
    return rows
