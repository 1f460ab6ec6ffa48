"""What every test shares. Compiled programs are kept between runs: the second run is several times faster."""

import importlib.metadata
import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parents[1] / "build" / "jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# On a clean checkout most of the time is the compiler's: a third of it without LLVM's optimisation and, where XLA has
# them still, with its older emitters. An unknown flag would end the process.
FAST = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST.append("--xla_cpu_use_fusion_emitters=false")
    # Tests fill the cores already: one compilation in several threads would only wait for them.
    FAST.append("--xla_cpu_parallel_codegen_split_count=1")
# Devices that share few cores with other tests may wait long for each other.
FAST.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST]).strip()

# Collected by the process that tests/test_multidevice.py starts, and by no other.
collect_ignore = [] if os.environ.get("POSTRAIN_MULTIDEVICE") else ["multidevice"]


# Files of one long test: begun last, they would leave one of two processes with nothing to do.
LONG = ("test_multidevice.py", "test_kills.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs of a file end with it: each maps some pages, and Linux gives a process 65,530 mappings."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
