"""A server in a thread, on a port of its own, of a tiny model with Qwen3's tokenizer and chat template."""

import contextlib
import shutil
import threading
import time

from real_tokenizers import get_template, get_tokenizer_folder
from tiny_models import make_tiny_model

from postrain.serve.app import make_app
from postrain.serve.limits import Limits
from postrain.serve.served import Served
from postrain.serve.server import bind, make_server

KEY = "sk-test"
NAME = "tiny"
SHAPE = {"slots": 4, "min_rows": 4, "min_positions": 512}  # of every engine here: what one has compiled, all have


def make_qwen(folder, seed=0):
    make_tiny_model(folder, "qwen3", seed=seed, vocab_size=151_936, tie_word_embeddings=True)
    for path in get_tokenizer_folder("qwen3").iterdir():
        shutil.copy(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(get_template("qwen3"), encoding="utf-8")
    return folder


@contextlib.contextmanager
def run_server(model, folder, **limits):
    """(Served, Gate, address) of a server that answers until the block ends."""
    limits = {"slots": SHAPE["slots"], "warm_length": SHAPE["min_positions"], "waiting": 16, "api_key": KEY, **limits}
    served = Served(model, NAME, str(folder), Limits(**limits))
    gate = make_app(served)
    with run_gate(gate) as address:
        yield served, gate, address


@contextlib.contextmanager
def run_gate(gate):
    server, socket = make_server(gate), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        gate.served.close()
        socket.close()


def wait_until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
