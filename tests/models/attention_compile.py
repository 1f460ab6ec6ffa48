"""Attention and its gradients compiled for hardware that is not there: `attention_compile.py TARGET BACKEND ...`.

Prints a line of JSON for each back end: bytes of temporaries of a device, and names of the custom calls.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from postrain.config import MeshConfig
from postrain.models.attention.dispatch import attention
from postrain.plan.targets import open_target
from postrain.sharding import make_mesh

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 1, 32768, 32, 8, 128


def compile_attention(target, mesh, backend):
    def run(q, k, v, sinks, segment_ids, window, grad):
        where = {"segment_ids": segment_ids, "positions": None, "window": window}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            fn = lambda q, k, v, sinks: attention(q, k, v, **where, sinks=sinks, softcap=30.0, backend=backend)
            out, pullback = jax.vjp(fn, q, k, v, sinks)
            return out, pullback(grad)

    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    heads = lambda count: place((BATCH, LENGTH, count, HEAD_DIM), jnp.bfloat16, None, "sequence", "tensor")
    q, k, sinks = heads(HEADS), heads(KV_HEADS), place((HEADS,), jnp.float32, "tensor")
    segment_ids, window = place((BATCH, LENGTH), jnp.int32), place((), jnp.int32)
    lowered = jax.jit(run).trace(q, k, k, sinks, segment_ids, window, q).lower()
    return lowered.compile(compiler_options=target.compiler_options)


if __name__ == "__main__":
    target = open_target(sys.argv[1])
    mesh = make_mesh(MeshConfig(1, 1, 2, sequence=-1), target.devices)
    for backend in sys.argv[2:]:
        compiled = compile_attention(target, mesh, backend)
        calls = re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())
        kernels = sum(call in ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call") for call in calls)
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        print(json.dumps({"backend": backend, "temporaries": temporaries, "kernels": kernels, "calls": calls}))
