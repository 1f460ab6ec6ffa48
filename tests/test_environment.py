"""`import postrain` in a program of one's own prints nothing of devices that are not there, and changes no choice."""

import os
import subprocess
import sys

import pytest

from postrain import environment


def test_compilers_for_other_hardware_are_not_tried_as_devices(monkeypatch):
    """With both plugins and neither device JAX would print pages about missing devices."""
    devices, plugins = [], {"libtpu", "jax_cuda13_plugin"}
    monkeypatch.setattr(
        environment.glob, "glob", lambda pattern: [path for path in devices if path.startswith(pattern[:-1])]
    )
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name in plugins or None)
    assert environment.has_compilers_only()
    devices.append("/dev/nvidia0")
    assert not environment.has_compilers_only()
    devices[:] = ["/dev/vfio/0"]
    assert not environment.has_compilers_only()
    devices.clear()
    plugins.remove("libtpu")
    assert not environment.has_compilers_only()


def run(script, **variables):
    names = ("JAX_PLATFORMS", *environment.QUIET)
    clean = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean | variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1], result.stderr


@pytest.mark.parametrize("names", ["postrain, jax", "jax, postrain"])
def test_the_first_array_prints_nothing_else(names):
    """With the packages of `postrain plan` installed; the import itself starts no back end."""
    # The number of CPU devices can be changed only as long as no back end has started.
    script = (
        f"import {names}; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices()), jax.numpy.zeros(1))"
    )
    output, errors = run(script)
    assert output == ["3 [0.]"] and errors == ""


def test_what_the_user_has_set_stays():
    script = "import postrain, os; print([os.environ.get(name) for name in {}])"
    names = ["JAX_PLATFORMS", *environment.QUIET]
    variables = {name: "cuda,cpu" if name == "JAX_PLATFORMS" else "info" for name in names}
    output, _ = run(script.format(names), **variables)
    assert output == [str(list(variables.values()))]
    script = "import jax; jax.config.update('jax_platforms', 'tpu'); import postrain; print(jax.config.jax_platforms)"
    output, _ = run(script)
    assert output == ["tpu"]
