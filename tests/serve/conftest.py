"""One server for all tests of this folder, and clients of it."""

import httpx
import jax
import openai
import pytest
from serve_server import KEY, make_qwen, run_server

from postrain.rollout.chat import load_chat_model


@pytest.fixture(scope="package", autouse=True)
def free_programs():
    """In place of that of all tests, which frees them after each file: here all files use those of one server."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return make_qwen(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="package")
def running(folder):
    with run_server(load_chat_model(folder), folder) as found:
        yield found


@pytest.fixture(scope="package")
def served(running):
    return running[0]


@pytest.fixture(scope="package")
def client(running):
    with openai.OpenAI(base_url=f"{running[2]}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="package")
def http(running):
    """Without a library that knows the protocol."""
    with httpx.Client(base_url=running[2], headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http
