"""An abstract model is the loaded one without its numbers: what `postrain plan` compiles is what `train` runs."""

from contextlib import nullcontext

import jax
import numpy as np
import pytest
from tiny_models import make_tiny_model

from postrain.config import resolve
from postrain.errors import UserError
from postrain.plan.plan import count_held
from postrain.plan.roofline import count_traced_flops
from postrain.recipes.sft import make_program
from postrain.sharding import current_platform, make_mesh
from postrain.training.model import abstract_model, load_model
from postrain.training.step import init_train_state

FAMILIES = ("llama", "qwen3")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("build") / "model", request.param, vocab_size=301)


def configure(folder, rank, **model):
    values = {"model": {"path": str(folder), "lora": {"rank": rank}, **model}, "data": {"train": "unread"}}
    values["data"] |= {"sequence_length": 64, "batch_size": 2}
    return resolve(values | {"optimizer": {"ema_decay": 0.9}, "mesh": {"fsdp": 1}})


def describe(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding) for path, leaf in leaves}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_abstract_model_is_the_loaded_one(folder, rank, dtype):
    config = configure(folder, rank, compute_dtype=dtype, remat="dots")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    abstract, loaded = abstract_model(config, folder, mesh), load_model(config, folder, mesh)
    assert abstract.config == loaded.config and (abstract.config.lora is not None) == bool(rank)
    assert describe(abstract.params) == describe(loaded.params)
    assert describe(abstract.frozen) == describe(loaded.frozen)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((abstract.params, abstract.frozen)))

    step = make_program(config, abstract, mesh, 10)
    state = init_train_state(loaded.params, loaded.frozen, step.optimizer, jax.random.key(0), mesh=mesh, ema=True)
    assert describe(step.abstract_state) == describe(state)
    numbers = jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state
    )
    held = count_held(step)
    assert sum(held.values()) - held["batch"] == sum(leaf.nbytes for leaf in jax.tree.leaves(numbers))


@pytest.mark.parametrize(
    ("lora", "refused"),
    [
        ({"rank": 41}, True),
        ({"rank": 40}, False),
        ({"rank": 65536, "targets": ["q", "up"]}, True),
        ({"rank": 25, "targets": ["k", "v"]}, True),  # 2 heads of 12
        ({"rank": 25, "targets": ["k", "q"]}, False),
        ({"rank": 25, "targets": ["k"], "ranks": {"k": 8}}, False),
        ({"rank": 8, "targets": ["k"], "ranks": {"k": 25}}, True),
    ],
)
def test_adapters_larger_than_every_matrix_are_refused(folder, lora, refused):
    config = configure(folder, 0, lora=lora)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(UserError, match="rank' = .* is above the smaller .*lower it") if refused else nullcontext():
        abstract_model(config, folder, mesh)


@pytest.mark.parametrize(("rank", "remat"), [(0, "none"), (0, "dots"), (4, "none"), (4, "full")])
def test_traced_products_are_the_formula_of_the_layers(folder, rank, remat):
    """Attention and unembedding run in loops over the data's blocks and are left out; the rest is counted exactly."""
    config = configure(folder, rank, remat=remat)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model = abstract_model(config, folder, mesh)
    step = make_program(config, model, mesh, 10)
    counted = count_traced_flops(step.train_step.trace(step.abstract_state, step.abstract_batch).jaxpr)
    c, tokens = model.config, 2 * 64
    sizes = {
        "q": (c.embed_size, c.num_heads * c.head_dim),
        "k": (c.embed_size, c.num_kv_heads * c.head_dim),
        "v": (c.embed_size, c.num_kv_heads * c.head_dim),
        "o": (c.num_heads * c.head_dim, c.embed_size),
        "gate": (c.embed_size, c.mlp_size),
        "up": (c.embed_size, c.mlp_size),
        "down": (c.mlp_size, c.embed_size),
    }
    expected = 0
    for name, (size_in, size_out) in sizes.items():
        products = 2 if rank else 3  # a frozen matrix has no gradient
        adapters = 3 * rank * (size_in + size_out) if rank else 0
        again = remat == "full" and name != "down"
        expected += (products + again) * size_in * size_out + adapters
        if remat == "full" and rank:  # of the last layer's adapters the first product is needed, for B's gradient
            expected += rank * (size_in + size_out * again)
    assert counted == 2 * c.num_layers * tokens * expected


def test_the_platform_is_that_of_the_mesh_in_use():
    """What is traced for devices of another kind must not look at those of the process."""
    assert current_platform() == jax.default_backend() == "cpu"
    mesh = make_mesh(resolve({"data": {"train": "t"}, "model": {"path": "m"}}).mesh, jax.devices()[:1])
    other = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    abstract = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=other)
    seen = []
    with jax.sharding.use_abstract_mesh(abstract):
        jax.make_jaxpr(lambda x: seen.append(current_platform()) or x)(np.zeros(3))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        seen.append(current_platform())
    assert seen == ["tpu", "cpu"]
