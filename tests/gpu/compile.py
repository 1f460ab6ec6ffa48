"""Compiles what tests/gpu/run.py would run, for a device that is not there: `compile.py TARGET [--only kernels|sft]`.

A line of JSON for each program: GiB of its arguments and temporaries, seconds. Needs the extra postrain[plan].
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("gpu", "models", "benchmarks")]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import parts  # noqa: E402
from attention_cases import MECHANISMS  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from postrain.models.attention.dispatch import load_kernel  # noqa: E402
from postrain.plan.targets import Target, open_target  # noqa: E402
from postrain.recipes.sft import make_program  # noqa: E402
from postrain.sharding import make_mesh  # noqa: E402
from postrain.training.model import abstract_model  # noqa: E402


def compile_kernel(target: Target, mesh, name: str, heads: tuple[int, int, int], dtype) -> jax.stages.Compiled:
    """Forward and gradients with every mechanism, as ``parts.compare_kernel`` runs them."""
    num_heads, num_kv, head_dim = heads
    options = dict(MECHANISMS["all"])
    options.pop("sinks")
    attend = parts.make_attention(load_kernel(name), options.pop("window"), **options)

    def run(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # by which Triton knows the device
            return attend(*arrays)

    whole = NamedSharding(mesh, PartitionSpec())
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    length = parts.FULL.exact_length
    q, k = array(dtype, 3, length, num_heads, head_dim), array(dtype, 3, length, num_kv, head_dim)
    sinks, segment_ids = array(jnp.float32, num_heads), array(jnp.int32, 3, length)
    weights = array(jnp.float32, 3, length, num_heads, head_dim)
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(run).trace(q, k, k, sinks, segment_ids, weights).lower()
    return lowered.compile(compiler_options=target.compiler_options)


def compile_step(target: Target, name: str) -> jax.stages.Compiled:
    """The train step of ``parts.train_on``."""
    with tempfile.TemporaryDirectory() as folder:
        folder = parts.write_config(pathlib.Path(folder), parts.FULL.model)
        config = parts.training_config(parts.FULL, folder, **parts.VARIANTS[name])
        mesh = make_mesh(dataclasses.replace(config.mesh, fsdp=len(target.devices)), target.devices)
        program = make_program(config, abstract_model(config, folder, mesh), mesh, 1000)
    lowered = program.train_step.trace(program.abstract_state, program.abstract_batch).lower()
    return lowered.compile(compiler_options=target.compiler_options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--only", choices=("kernels", "sft"))
    arguments = parser.parse_args()
    target = open_target(arguments.target)
    platform = target.chip.platform
    mesh = make_mesh(parts.training_config(parts.FULL, pathlib.Path("unread")).mesh, target.devices)
    programs = {}
    if arguments.only != "sft":
        for name in parts.KERNELS[platform]:
            for heads in parts.FULL.heads:
                for dtype in (jnp.bfloat16, jnp.float32):
                    key = f"{name} {heads} {jnp.dtype(dtype).name}"
                    programs[key] = lambda name=name, heads=heads, dtype=dtype: compile_kernel(
                        target, mesh, name, heads, dtype
                    )
    if arguments.only != "kernels":
        programs |= {name: lambda name=name: compile_step(target, name) for name in parts.FULL.variants}
    for name, compile_program in programs.items():
        start = time.perf_counter()
        memory = compile_program().memory_analysis()
        line = {
            "program": name,
            "arguments_gib": round(memory.argument_size_in_bytes / parts.GIB, 2),
            "temporaries_gib": round(memory.temp_size_in_bytes / parts.GIB, 2),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
