"""The check of a kernel before a run: it passes what is right and refuses every fault that a kernel could have."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from odd_config import ODD_CONFIG

from postrain.errors import UserError
from postrain.models.attention import dispatch
from postrain.models.attention.chunked import chunked
from postrain.models.attention.dispatch import check_backend, compare_kernel
from postrain.models.attention.gpu import flash_gpu
from postrain.models.attention.tpu import flash_tpu

CONFIG = dataclasses.replace(
    ODD_CONFIG, layer_windows=(0, 70, 0), attention_sinks=True, attention_softcap=4.0, compute_dtype="bfloat16"
)
RIGHT = functools.partial(chunked, chunk=128)


def other_document(q, k, v, starts, *rest, **options):
    """Every query sees one key too many."""
    return RIGHT(q, k, v, jnp.maximum(starts - 1, 0), *rest, **options)


def no_documents(q, k, v, starts, *rest, **options):
    return RIGHT(q, k, v, jnp.zeros_like(starts), *rest, **options)


def no_sinks(q, k, v, starts, sinks, first, **options):
    return RIGHT(q, k, v, starts, None, first, **options)


def no_cap(*inputs, softcap, scale):
    return RIGHT(*inputs, softcap=0.0, scale=scale)


def no_gradient_of_values(q, k, v, *rest, **options):
    return RIGHT(q, k, jax.lax.stop_gradient(v), *rest, **options)


def no_number_in_the_gradient(q, k, v, *rest, **options):
    out = RIGHT(q, k, v, *rest, **options)
    return out + 0 * jnp.sqrt(jnp.zeros_like(q) * q)  # sqrt has no derivative at 0


def not_a_number(*inputs, **options):
    return RIGHT(*inputs, **options).at[0, 3].set(jnp.nan)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(ODD_CONFIG, compute_dtype="float32")])
@pytest.mark.parametrize("kernel", [RIGHT, functools.partial(flash_tpu, interpret=True)])
def test_what_is_right_passes(kernel, config):
    found = compare_kernel(kernel, config)
    assert len(found) == (5 if config.attention_sinks else 4)
    assert max(found.values()) < (0.02 if config.compute_dtype == "bfloat16" else 1e-5)


def test_the_kernel_of_gpus_passes():
    assert max(compare_kernel(functools.partial(flash_gpu, interpret=True), CONFIG).values()) < 0.02


FAULTS = [other_document, no_documents, no_sinks, no_cap, no_gradient_of_values]
FAULTS += [not_a_number, no_number_in_the_gradient]


@pytest.mark.parametrize("kernel", FAULTS)
def test_what_is_wrong_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "select_backend", lambda name: "flash_gpu")
    monkeypatch.setattr(dispatch, "load_kernel", lambda name: kernel)
    with pytest.raises(UserError, match="attention back end flash_gpu departs from the reference on this .*chunked"):
        check_backend(CONFIG)


def test_a_run_says_what_it_found(monkeypatch):
    assert check_backend(CONFIG) == ""  # on a CPU the reference runs itself
    monkeypatch.setattr(dispatch, "select_backend", lambda name: "flash_tpu")
    monkeypatch.setattr(dispatch, "load_kernel", lambda name: RIGHT)
    assert check_backend(CONFIG).startswith("flash_tpu is the reference within ")
