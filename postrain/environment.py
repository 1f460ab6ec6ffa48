"""What `import postrain` sets for the libraries below it. Whatever the user has set stays as it is."""

import glob
import importlib.util
import os
import sys

# Notes of transformers and of the hub about what postrain does itself, such as rendering.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_VERBOSITY": "error"}


def set_up() -> None:
    """Starts no back end of JAX and imports nothing. JAX may have been imported before."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if has_compilers_only() and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax = sys.modules.get("jax")
        if jax is not None and hasattr(jax, "config") and not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")


def has_compilers_only() -> bool:
    """Whether JAX's TPU and GPU plugins are installed, as compilers for `postrain plan`, and neither device is there.

    JAX would try both plugins, and print pages about missing devices.
    """
    devices = ("/dev/nvidia*", "/dev/dxg", "/dev/accel*", "/dev/vfio/*")
    plugins = ("libtpu", "jax_cuda13_plugin")
    return all(importlib.util.find_spec(name) for name in plugins) and not any(glob.glob(path) for path in devices)
