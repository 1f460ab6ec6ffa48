"""``postrain.sharding.to_host`` is the only way from an array on devices to Python.

Every other way (``np.asarray``, ``float``, ``.item()``, ``jax.device_get``, ...) raises on an array that is spread over
several processes, after hours of training at worst. So the source is searched for them, and what is found must be
listed here with the reason why no such array can get there.
"""

import ast
import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from postrain.cluster.launch import find_ports
from postrain.config import MeshConfig
from postrain.sharding import make_mesh, replicated, to_host

PACKAGE = pathlib.Path(__file__).parents[1] / "postrain"
NUMBERS = ("float", "int", "bool", "complex")
OF_NUMPY = ("asarray", "array", "ascontiguousarray", "stack", "concatenate")
OTHERS = ("item", "tolist", "device_get", "addressable_data", "addressable_shards", "process_allgather")
# Whole files and folders.
WITHOUT_ARRAYS = {
    "cluster/": "JSON between processes",
    "hf/gguf/": "tensors of a file, in numpy",
    "hf/verify/": "a command of one process",
    "plan/": "compiled, never run",
    "rollout/chat.py": "a command of one process",
    "rollout/score.py": "a command of one process",
    "rollout/evaluate_policy.py": "a command of one process",
    "rollout/off_policy.py": "arithmetic on arrays of numpy",
    "serve/": "a command of one process",
    "models/flops.py": "batches before they are placed on devices, in numpy",
}
# Single expressions.
ALLOWED = {
    "checkpoint/checkpointer.py": ("names of folders", {"int(place.name)"}),
    "export.py": (
        "numpy: the arguments of check_logits; dtypes",
        {
            "float(np.sqrt(np.mean((found - expected) ** 2)))",
            "float(expected.std())",
            "np.array([other == dtype for other in dtypes])",
        },
    ),
    "hf/load.py": ("digits in a name", {"int(part)"}),
    "hf/peft/adapter.py": (
        "adapter_config.json; numpy: tensors of a file or out of to_host",
        {
            "bool(raw.get('use_dora'))",
            "float(alpha)",
            "float(lora.alpha)",
            "int(lora.alpha)",
            "np.stack(found)",
        },
    ),
    "hf/save.py": (
        "numpy, out of to_host; numbers of layers",
        {"np.stack(arrays, axis=-1)", "np.asarray(layers)"},
    ),
    "hf/tree.py": ("digits in a name", {"int(match.group(1))"}),
    "models/attention/dispatch.py": (
        "arrays that this process alone has made, on one of its devices",
        {"np.asarray(x, np.float32)", "float(np.abs(ours - theirs).max() / np.abs(theirs).max())"},
    ),
    "models/fp8.py": ("a dtype", {"float(jnp.finfo(dtype).max)", "float(jnp.finfo(jnp.float32).tiny)"}),
    "models/quantized.py": ("a table of numbers, in numpy", {"NF4_LEVELS.tolist()"}),
    "models/transformer.py": (
        "the model's config",
        {"np.asarray(config.layer_windows or (0,) * config.num_layers, np.int32)"},
    ),
    "report/metrics.py": (
        "numpy, out of to_host; numbers",
        {"array.item()", "float(str(array))", "int(array)", "int(step)"},
    ),
    "recipes/reward.py": (
        "numpy: fields of documents",
        {
            "int(label)",
            "int(values[0])",
            "values[:1].tolist()",
            "(values[values > 0] == stepwise.RIGHT).astype(int).tolist()",
        },
    ),
    "rollout/answers.py": (
        "a rendered row, in numpy; texts",
        {"float(found.strip() == expected.strip())", "part.tolist()"},
    ),
    "rollout/beams.py": (
        "numpy: prompts, a trie on the host, and what is out of to_host",
        {
            "bool(is_stop[place])",
            "float(length_penalty)",
            "float(totals[ranked[place]])",
            "int(counts.max())",
            "int(lengths.max())",
            "int(rows[place])",
            "int(token)",
            "int(tokens[place])",
            "np.asarray(banned_ids, np.int64)",
            "np.asarray(prompt, np.int32)",
        },
    ),
    "rollout/constraints/device_trie.py": (
        "numpy: a trie on the host",
        {
            "int(counts.max())",
            "int(counts[num_dense:].max())",
            "int(trie.tokens.max())",
            "int(trie.tokens.min())",
            "trie.level_starts[1:-1].tolist()",
        },
    ),
    "rollout/prefixes.py": (
        "numpy: ids",
        {
            "int(differ.argmax())",
        },
    ),
    "rollout/sampling.py": (
        "a dtype",
        {
            "float(jnp.finfo(jnp.float32).min)",
        },
    ),
    "rollout/engine.py": (
        "numpy: prompts, and a chunk out of to_host",
        {
            "bool(edits or tops)",
            "bool(request.until(token))",
            "chunk.tokens[slot, :count].tolist()",
            "int((chunk.tokens[slot] >= 0).sum())",
            "int(finite.argmin())",
            "np.asarray(prompt_ids)",
        },
    ),
    "rollout/filling.py": (
        "numpy: ids, and scores out of to_host",
        {
            "int(done[row])",
            "int(filling.done[0])",
            "int(left.max())",
            "np.array([len(context) for context in filling.contexts])",
            "np.array([min(done, len(context)) for (done, _), context in zip(found, contexts, strict=True)], np.int32)",
            "np.concatenate([piece[i] for piece in scores])",
            "np.concatenate(logprobs)",
        },
    ),
    "rollout/slots.py": (
        "numpy: what rows are asked and where they stand",
        {
            "int((last + np.minimum(self.rows.remaining, steps))[open_rows].max())",
        },
    ),
    "sharding.py": (
        "to_host itself; the config and a device's version",
        {
            "float(stated)",
            "int(getattr(config, axis, 1))",
            "multihost_utils.process_allgather(array, tiled=True)",
            "np.asarray(array)",
        },
    ),
    "training/compatibility.py": ("names of folders", {"int(path.name)"}),
    "training/model.py": (
        "the config; a list of ids; names of parameters",
        {
            "bool(config.model.lora.rank)",
            "np.asarray(pairs, np.int32)",
        },
    ),
    "training/teaching/teach.py": (
        "numpy: rows that are out of to_host",
        {"np.concatenate(arrays)", "np.concatenate(masses)", "float(np.concatenate(masses).mean())"},
    ),
    "training/step.py": ("shapes", {"float(a.size)", "float(sum((a.size for a, _ in pairs)))"}),
    "training/session.py": ("lengths of documents; metrics as numbers", {"float(value)", "int(length)"}),
}


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported_names(path):
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def files_with_arrays():
    """Those that import jax, themselves or by another of the package; the rest cannot make an array."""
    files = {
        ".".join(("postrain", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
    }
    found = {name for name, path in files.items() if any(i.split(".")[0] == "jax" for i in imported_names(path))}
    while more := {name for name, path in files.items() if name not in found and imported_names(path) & found}:
        found |= more
    return [files[name] for name in sorted(found)]


def find_conversions(tree):
    """Every call that makes numbers or a numpy array of a value, unless the value is what to_host returns."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        call = calls.get(id(node), node)  # the function itself where it is handed over, as to `map`
        if isinstance(node, ast.Name) and node.id in NUMBERS and call is not node and call.args:
            value = call.args[0]
        elif isinstance(node, ast.Attribute) and node.attr in OF_NUMPY and ast.unparse(node.value) == "np":
            value = node if call is node else call.args[0]
        elif isinstance(node, ast.Attribute) and node.attr in OTHERS:
            value = call
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("map")
            and ast.unparse(node.args[0]) in NUMBERS
        ):
            value = ast.Tuple(node.args[1:])
        else:
            continue
        names = {part.id for part in ast.walk(value) if isinstance(part, ast.Name)}
        if names and "to_host" not in names:
            yield ast.unparse(call)


def test_nothing_else_takes_arrays_from_devices():
    unknown, used = [], set()
    for path in files_with_arrays():
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(tuple(WITHOUT_ARRAYS)):
            continue
        _, allowed = ALLOWED.get(name, ("", set()))
        for conversion in find_conversions(parse(path)):
            used.add((name, conversion))
            if conversion not in allowed:
                unknown.append(f"{name}: {conversion}")
    assert not unknown, "use postrain.sharding.to_host, or say in this file why no array on devices can get there"
    assert all((PACKAGE / name).exists() for name in WITHOUT_ARRAYS)
    assert used == {(name, conversion) for name, (_, allowed) in ALLOWED.items() for conversion in allowed}


def test_the_search_finds_what_it_should():
    source = """
a = np.asarray(x), float(x), x.item(), jax.device_get(x)
b = list(map(np.asarray, xs)), jax.tree.map(float, xs), np.stack([x]), x.addressable_data(0)
c = np.asarray(to_host(x)), float(to_host(x).sum()), np.array([1.0, -2.0], np.float32), jnp.asarray(x), def_float(x)
"""
    found = [
        "np.asarray(x)",
        "float(x)",
        "x.item()",
        "jax.device_get(x)",
        "np.asarray",
        "np.stack([x])",
        "jax.tree.map(float, xs)",
    ]
    assert sorted(find_conversions(ast.parse(source))) == sorted([*found, "x.addressable_data(0)"])


def test_in_one_process():
    array = jax.device_put(np.arange(6.0, dtype=np.float32).reshape(2, 3), replicated(make_mesh(MeshConfig())))
    assert isinstance(to_host(array), np.ndarray) and float(to_host(array[1, 2])) == 5.0
    np.testing.assert_array_equal(to_host(array), np.arange(6.0).reshape(2, 3))
    assert to_host(3) == 3 and to_host(array[0].astype("bfloat16")).dtype == "bfloat16"


IN_A_PROCESS = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from postrain.config import MeshConfig
from postrain.sharding import make_mesh, replicated, to_host
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
whole = np.arange(24, dtype=np.float32).reshape(4, 6)
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
for spec in (P("fsdp"), P("fsdp", "tensor"), P(None, "tensor"), P()):
    array = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec), lambda index: whole[index])
    np.testing.assert_array_equal(to_host(array), whole)
    np.testing.assert_array_equal(to_host(array != 3), whole != 3)  # made by an operation, outside of jit
    assert float(to_host(array.sum())) == whole.sum()
print("whole")
"""


def test_in_two_processes():
    """Arrays that are split over the processes, split in each of them alone, and copied to both."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-c", IN_A_PROCESS, f"127.0.0.1:{find_ports()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"XLA_FLAGS": flags}
    processes = [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(2)]
    for out, _ in [process.communicate(timeout=120) for process in processes]:
        assert out.endswith("whole\n"), out
