"""One connection of the control channel: JSON lines between two processes that know the run's secret.

Both ends prove that they know it before anything else is said, each over a nonce that the other end has just chosen
(challenge and response with HMAC-SHA256, RFC 2104). The secret itself is never sent, so that neither a stranger who
connects nor an impostor in the place of process 0 learns it. Messages after that are neither encrypted nor signed:
somebody who can change packets on their way is not kept out.
"""

import hashlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from postrain.errors import UserError

SECRET = "POSTRAIN_SECRET"  # the environment variable: `ps` shows every user what stands on a command line
SECONDS_TO_PROVE = 10.0
_SHORTEST_SECRET = 16  # characters
_LONGEST_PROOF = 4096  # bytes that a stranger may send
# Bytes of one process's message, far above what is sent: a position in 65,536 shards has 10 MB, the fingerprint of
# 100,000 files 20 MB.
LONGEST = 64 << 20
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost machine: after 20 seconds


def make_secret() -> str:
    """256 random bits."""
    return secrets.token_hex(32)


def read_secret(num_processes: int, environment: Mapping[str, str] = os.environ) -> str:
    """The run's secret, which whatever starts the processes gives to all of them.

    A run of one process, which nobody joins, makes its own. Raises UserError if there is none, or one that can be
    guessed.
    """
    secret = environment.get(SECRET, "")
    if num_processes == 1:
        return secret or make_secret()
    if not secret:
        raise UserError(
            f"several processes: {SECRET} is not set: expected the same random text in all of them, which keeps "
            f"others out of the run: `export {SECRET}=...` with the output of `openssl rand -hex 32` before starting "
            "each, or start them by `postrain launch`"
        )
    if len(secret) < _SHORTEST_SECRET:
        raise UserError(
            f"several processes: {SECRET} has {len(secret)} characters: expected at least {_SHORTEST_SECRET} random "
            "ones: take the output of `openssl rand -hex 32`"
        )
    return secret


class WrongSecret(UserError):
    """The two ends of a connection have different secrets."""


class Connection:
    """JSON values out, from any thread, and in, from one."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connected.settimeout(None)
        self._socket, self._received, self._lock = connected, bytearray(), threading.Lock()

    def send(self, message: dict, limit: int | None = None) -> None:
        """Does nothing when the connection is closed: its reader notices that.

        Raises UserError where the message has more than ``limit`` bytes, which the other end would not read.
        """
        line = json.dumps(message).encode() + b"\n"
        if limit is not None and len(line) > limit:
            raise UserError(
                f"several processes: {len(line):,} bytes are to be sent to the others at once, expected at most "
                f"{limit:,}: lower data.stream.shards, or keep the data in fewer files"
            )
        try:
            with self._lock:
                self._socket.sendall(line)
        except OSError:
            return

    def receive(self, seconds: float | None = None, limit: int = LONGEST) -> Any:
        """The next value; None if the connection is closed or the next line is not JSON.

        None too if no whole line came within ``seconds`` or about ``limit`` bytes.
        """
        try:
            return json.loads(self._read_line(seconds, limit))
        except (OSError, ValueError, RecursionError):
            return None

    def _read_line(self, seconds: float | None, limit: int) -> bytes:
        deadline, searched = None if seconds is None else time.monotonic() + seconds, 0
        while (end := self._received.find(b"\n", searched)) < 0:
            if (searched := len(self._received)) > limit:
                raise ValueError("too long")
            if deadline is not None:
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
            part = self._socket.recv(min(1 << 16, limit))
            if not part:
                raise ConnectionError("closed")
            self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        if deadline is not None:
            self._socket.settimeout(None)
        return line

    def close(self) -> None:
        with self._lock:
            self._socket.close()


def admit(connection: Connection, secret: str, claim: Callable[[], bool] = lambda: True) -> dict | None:
    """The side of process 0: the ``hello`` of a process that knows the secret. Closes any other connection.

    ``hello``: ``{"process": its number, "of": how many it counts, "host": its machine}``. None if the other end does
    not speak this protocol, or is silent for ten seconds. ``claim`` is called when the other end has proved that it
    knows the secret, before it is told so; where it returns False, the connection is closed, and the other end tries
    anew. Raises WrongSecret if it does not know the secret.
    """
    nonce = secrets.token_hex(32)
    connection.send({"nonce": nonce})
    answer = connection.receive(SECONDS_TO_PROVE, _LONGEST_PROOF)
    match answer:
        case {"process": int(process), "of": int(of), "host": str(host), "nonce": str(theirs), "proof": str(proof)}:
            hello = {"process": process, "of": of, "host": host}
        case _:
            connection.close()
            return None
    if not _same(proof, _prove(secret, "joins", nonce, theirs, hello)):
        connection.send({"refused": "secret"})
        connection.close()
        raise WrongSecret("another secret")
    if not claim():
        connection.close()
        return None
    connection.send({"proof": _prove(secret, "accepts", theirs, nonce)})
    return hello


def introduce(connection: Connection, secret: str, hello: dict, seconds: float) -> bool:
    """The side of a process that joins: sends ``hello`` and returns whether process 0 has answered.

    False if the other end does not speak this protocol, or not within ``seconds``. Raises WrongSecret if it refuses
    this process's secret, or does not know it itself.
    """
    match connection.receive(min(seconds, SECONDS_TO_PROVE), _LONGEST_PROOF):
        case {"nonce": str(theirs)}:
            nonce = secrets.token_hex(32)
        case _:
            return False
    connection.send(hello | {"nonce": nonce, "proof": _prove(secret, "joins", theirs, nonce, hello)})
    match connection.receive(seconds, _LONGEST_PROOF):
        case None:
            return False
        case {"refused": _}:
            raise WrongSecret(f"does not accept this process's {SECRET}")
        case {"proof": str(proof)} if _same(proof, _prove(secret, "accepts", nonce, theirs)):
            return True
    raise WrongSecret(f"does not know this process's {SECRET}")


def _prove(secret: str, role: str, *statement: Any) -> str:
    """``role`` keeps one end's proof from being sent back to it as the other end's."""
    text = json.dumps([role, *statement], sort_keys=True)
    return hmac.new(os.fsencode(secret), text.encode(), hashlib.sha256).hexdigest()


def _same(proof: str, expected: str) -> bool:
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())
