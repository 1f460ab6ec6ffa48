"""Runs tests/multidevice in a process of its own: XLA fixes the number of CPU devices when it starts."""

import os
import pathlib
import subprocess
import sys

NUM_DEVICES = 8


def test_on_eight_cpu_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={NUM_DEVICES}",
        "POSTRAIN_MULTIDEVICE": "1",
        # Of programs that are read from the cache, CPU devices begin independent collectives in different orders, and
        # wait for each other for ever.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    folder = pathlib.Path(__file__).parent / "multidevice"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
