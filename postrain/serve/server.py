"""`postrain serve`: loads the model, answers until SIGTERM, and then finishes what has begun."""

import asyncio
import contextlib
import signal
import socket
import sys
import time

from postrain.errors import UserError
from postrain.hf.classifier import read_trunk
from postrain.hf.find_model import find_model
from postrain.rollout.chat import encode_prompt, for_tokenizer, load_chat_model
from postrain.rollout.requests import SamplingParams
from postrain.rollout.score import load_scorer
from postrain.serve.limits import Limits
from postrain.serve.served import Served

try:
    import uvicorn

    from postrain.serve.app import GRACE, Gate, make_app
    from postrain.serve.scorer import ServedScorer, make_scorer_app
except ModuleNotFoundError as error:
    raise UserError(f"`postrain serve` needs the package {error.name}: pip install 'postrain[serve]'") from None

DRAIN_CHECK = 0.05  # seconds between two looks at whether all requests have ended
CLOSE_SECONDS = 5  # for connections of clients that do not read their last answer


def serve(folder: str, *, name: str, host: str, port: int, limits: Limits) -> None:
    """Serves a model's folder until the process is told to end. Raises UserError, such as for a port that is taken."""
    with contextlib.closing(bind(host, port)) as listening:
        served, gate = open_model(folder, name, limits)
        try:
            address = f"http://{host}:{listening.getsockname()[1]}"
            print(f"serving {name} at {address}/v1, contexts of up to {served.max_length} tokens", flush=True)
            make_server(gate).run(sockets=[listening])
        finally:
            served.close()


def bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        message = f"--host {host} --port {port}: cannot listen there ({reason}): choose another port or address"
        raise UserError(message) from None


def open_model(folder: str, name: str, limits: Limits) -> tuple[Served | ServedScorer, Gate]:
    """A language model, or a reward model or classifier, ready to answer."""
    found = find_model(folder)
    if found.adapter is None and read_trunk(found.base).labels:
        scorer = ServedScorer(load_scorer(folder), name, folder, limits)
        return scorer, make_scorer_app(scorer)
    served = Served(load_chat_model(folder), name, folder, limits)
    warm_up(served)
    return served, make_app(served)


def make_server(gate: Gate) -> "Server":
    config = uvicorn.Config(
        gate, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=CLOSE_SECONDS
    )
    return Server(config, gate)


def warm_up(served: Served) -> None:
    """Compiles what the first requests need."""
    ids = encode_prompt(served.tokenizer, "a", raw=True)

    def answer(engine) -> None:
        if served.limits.warm_length:
            return engine.warm_up()
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(temperature=temperature, max_new_tokens=2)
            engine.generate([ids], for_tokenizer(sampling, served.tokenizer, served.model.config))
        engine.prefixes.clear()

    served.engine.call(answer).result()


class Server(uvicorn.Server):
    """SIGTERM or ^C: new requests are refused, those inside are finished, then the process ends with 0. A second one
    ends it at once."""

    def __init__(self, config: uvicorn.Config, gate: Gate):
        super().__init__(config)
        self.gate = gate

    @contextlib.contextmanager
    def capture_signals(self):
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self._drain)
        except (RuntimeError, ValueError, NotImplementedError):  # not in the main thread
            numbers = ()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _drain(self) -> None:
        if self.gate.draining:
            self.force_exit = self.should_exit = True
            return
        self.gate.draining = True
        print(f"ending: {self.gate.num_inside} requests are finished first", file=sys.stderr, flush=True)
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        end = time.monotonic() + self.gate.served.limits.seconds + GRACE
        while self.gate.num_inside and time.monotonic() < end:
            await asyncio.sleep(DRAIN_CHECK)
        self.should_exit = True
