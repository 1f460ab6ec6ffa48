"""Run by test_checkpoint.py in its own process: other meshes, a kill in mid-save, a disk that is full."""

import os
import pathlib
import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from postrain.checkpoint.checkpointer import Checkpointer
from postrain.checkpoint.record import RunRecord
from postrain.config import CheckpointConfig, MeshConfig
from postrain.errors import UserError
from postrain.sharding import make_global_batch, make_mesh, named_shardings
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from toy_network import LOGICAL_AXES, compute_loss, make_batch, make_params  # noqa: E402

OPTIMIZER = optax.adam(1e-2)
BIG = (1 << 25,)  # 128 MiB of float32: long enough to be killed in the middle


def meshes(folder):
    def describe(mesh):
        shapes = jax.eval_shape(make_params)
        shardings = named_shardings(LOGICAL_AXES, mesh, shapes)
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
        return abstract_train_state(placed, {}, OPTIMIZER, mesh=mesh, ema=True)

    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = shardings_of(describe(mesh))
    params = jax.device_put(make_params(), shardings.params)
    state = init_train_state(params, {}, OPTIMIZER, jax.random.key(3), mesh=mesh, ema=True)
    step = make_train_step(compute_loss, OPTIMIZER, mesh=mesh, state_shardings=shardings, ema_decay=0.9)
    state, _ = step(state, make_global_batch(make_batch(), mesh))
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        checkpointer.save(RunRecord(1, {}, {}, {}, {}), state)
        for sizes, devices in [((1, 8, 1), 8), ((1, 2, 4), 8), ((1, 1, 1), 1)]:
            other = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
            restored = checkpointer.restore(describe(other)).state
            for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(describe(other)), strict=True):
                assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim), (leaf.sharding, expected.sharding)
            strip = [tree.replace(rng=jax.random.key_data(tree.rng)) for tree in (state, restored)]
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), *strip)
            print(sizes, "ok")


def big_state(step):
    return init_train_state({"w": jnp.full(BIG, float(step))}, {}, optax.sgd(1.0), jax.random.key(0))


def save(checkpointer, step):
    checkpointer.save(RunRecord(step, {"rows": step}, {}, {}, {}), big_state(step))


def kill(folder):
    checkpointer = Checkpointer(folder, CheckpointConfig())
    save(checkpointer, 1)
    checkpointer.wait()
    save(checkpointer, 2)
    while not any(name.startswith("2.saving") for name in os.listdir(folder)):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def read(folder):
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        describe = abstract_train_state({"w": jax.ShapeDtypeStruct(BIG, jnp.float32)}, {}, optax.sgd(1.0))
        restored = checkpointer.restore(describe)
    assert (restored.state.params["w"] == restored.record.step).all()
    print("step", restored.record.step, "ok")


def full(folder):
    """No file may grow beyond 64 MiB: what a full disk looks like to the one who writes."""
    checkpointer = Checkpointer(folder, CheckpointConfig())
    save(checkpointer, 1)
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    save(checkpointer, 2)
    for call in (lambda: save(checkpointer, 3), checkpointer.latest_step, checkpointer.wait, checkpointer.close):
        try:
            call()
        except UserError as error:
            print("refused:", error)
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        save(checkpointer, 2)


if __name__ == "__main__":
    {"meshes": meshes, "kill": kill, "read": read, "full": full}[sys.argv[1]](sys.argv[2])
