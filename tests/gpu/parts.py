"""What tests/gpu/run.py measures on a device: each part is a list of cases, each case gives figures.

A part runs in a process of its own. It is a function ``(sizes) -> iterator of (name, case)``; ``case()`` returns a dict
of plain numbers and words, with "ok" where there is something to be right or wrong about. Nothing here needs torch.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from attention_cases import MECHANISMS, dense_attention, make_row

from postrain.config import resolve
from postrain.models.attention.chunked import chunked
from postrain.models.attention.dispatch import compute_visible_starts, load_kernel
from postrain.models.flops import count_batch, count_flops
from postrain.models.params import init_params, num_params
from postrain.objectives.logprobs import compute_weighted_nll
from postrain.recipes.sft import make_program
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams
from postrain.sharding import make_mesh
from postrain.training.model import abstract_model
from postrain.training.step import init_train_state
from postrain.training.throughput import measure_matmul_rate, peak_flops
from postrain.types import Batch

ROOT = pathlib.Path(__file__).resolve().parents[2]
GIB = 2**30
KERNELS = {"gpu": ("flash_gpu",), "tpu": ("flash_tpu",), "cpu": ("flash_tpu", "flash_gpu")}  # on a CPU interpreted
# A kernel may be this many times as far from float32 as the reference in the same dtype is, or this far at all.
ERROR_RATIO, ERROR_FLOOR = 3.0, 1e-5

Cases = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    model: dict[str, int]  # of a Qwen3
    rows: int  # of an update
    length: int  # of a row
    updates: int  # that are timed
    variants: tuple[str, ...]  # of VARIANTS
    mechanisms: tuple[str, ...]  # of attention
    heads: tuple[tuple[int, int, int], ...]  # of attention: queries', keys', head_dim
    layouts: tuple[str, ...]  # of the rows whose attention is timed
    exact_length: int  # of rows whose attention is held to softmax written out
    vocab: int  # of the loss
    embed: int
    tokens: int
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]  # prompts that are answered together
    repeats: int


VARIANTS = {  # of the train step: keys of config.model
    "full": {},
    "full, remat full": {"remat": "full"},
    "full, chunked attention": {"attention": "chunked"},
    "LoRA, rank 16": {"lora": {"rank": 16}},
    "LoRA on nf4": {"lora": {"rank": 16}, "quantization": "nf4"},
    "full, fp8": {"fp8": True},
}
FULL = Sizes(
    model={
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    rows=4,
    length=8192,
    updates=8,
    variants=tuple(VARIANTS),
    mechanisms=tuple(MECHANISMS),
    heads=((16, 8, 128), (8, 1, 64), (4, 4, 256), (12, 4, 80)),
    layouts=("one document", "packed", "window"),
    exact_length=1500,
    vocab=151936,
    embed=2048,
    tokens=8192,
    prompt=512,
    new_tokens=256,
    batches=(1, 16, 64),
    repeats=10,
)
SMALL = Sizes(
    model={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 301,
    },
    rows=2,
    length=64,
    updates=2,
    variants=("full", "LoRA on nf4"),
    mechanisms=("all",),
    heads=((4, 2, 16),),
    layouts=("packed",),
    exact_length=150,
    vocab=301,
    embed=16,
    tokens=64,
    prompt=8,
    new_tokens=4,
    batches=(2,),
    repeats=1,
)
SIZES = {"full": FULL, "small": SMALL}


# Measuring.


def time_call(fn: Callable, *arrays, repeats: int) -> dict[str, float]:
    """Median time of a jitted ``fn``, that of its compilation, and the memory that it needs beside its arguments."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*arrays).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*arrays))
    seconds = workloads.time_steps(lambda: jax.block_until_ready(compiled(*arrays)), repeats)
    return {
        "ms": 1e3 * statistics.median(seconds),
        "compile_s": compile_seconds,
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / GIB,
    }


def peak_memory_gib() -> float | None:
    """Most bytes that this process has had on the device; None where the platform does not count them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None


def draw_lengths(total: int, seed: int = 0) -> list[int]:
    """Log-normal lengths of documents that fill a row of ``total`` positions."""
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < total:
        length = int(np.clip(np.exp(np.log(total / 16) + rng.standard_normal()), 1, total))
        lengths.append(min(length, total - sum(lengths)))
    return lengths


def device_cases(sizes: Sizes) -> Cases:
    """What the device is, and what its matrix unit and its memory reach at best."""

    def describe():
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        published = None if device.platform == "cpu" else peak_flops([device])
        return {
            "kind": device.device_kind,
            "platform": device.platform,
            "devices": jax.device_count(),
            "memory_gib": limit and limit / GIB,
            "published_tflops": published and published / 1e12,
        }

    def multiply():
        size = 8192 if sizes is FULL else 64
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
        measured = time_call(jnp.matmul, x, x, repeats=sizes.repeats)
        return {"ms": measured["ms"], "tflops": 2 * size**3 / measured["ms"] / 1e9}

    def multiply_float32():
        rate = measure_matmul_rate(jax.devices()[0], size=4096 if sizes is FULL else 64)
        return {"tflops": rate / 1e12}

    def copy():
        x = jnp.ones(((1 << 30) if sizes is FULL else (1 << 12),), jnp.bfloat16)
        measured = time_call(lambda x: x + 1, x, repeats=sizes.repeats)
        return {"ms": measured["ms"], "gb_per_second": 2 * x.nbytes / measured["ms"] / 1e6}

    yield "device", describe
    yield "bfloat16 product", multiply
    yield "float32 product", multiply_float32
    yield "read and write", copy


# Attention.


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, T, K, H]
    v: jax.Array
    segment_ids: jax.Array  # int32 [B, T]
    sinks: jax.Array | None  # float32 [N]
    weights: jax.Array  # [B, T, N, H]: the gradient of the output, 0 at padding


def draw_attention(heads: tuple[int, int, int], rows: list[list[int]], total: int, sinks: bool) -> AttentionInputs:
    num_heads, num_kv, head_dim = heads
    rng = np.random.default_rng(0)
    draw = lambda count: jnp.asarray(rng.standard_normal((len(rows), total, count, head_dim)), jnp.float32)
    segment_ids = jnp.asarray(np.stack([make_row(lengths, total)[0] for lengths in rows]))
    weights = draw(num_heads) * (segment_ids > 0)[:, :, None, None]
    logits = jnp.asarray(rng.standard_normal(num_heads), jnp.float32) if sinks else None
    return AttentionInputs(draw(num_heads), draw(num_kv), draw(num_kv), segment_ids, logits, weights)


def open_backend(name: str) -> Callable:
    """A back end of attention, interpreted where this process has no device for it."""
    if name == "chunked":
        return functools.partial(chunked, chunk=128)
    kernel = load_kernel(name)
    if name in KERNELS[jax.default_backend()] and jax.default_backend() != "cpu":
        return kernel
    return functools.partial(kernel, interpret=True, max_block=128 if name == "flash_tpu" else 32)


def make_attention(backend: Callable, window: int, **options) -> Callable:
    """``(q, k, v, sinks, segment_ids, weights) -> [output, *gradients]`` of sum(output * weights)."""

    def run(q, k, v, sinks, segment_ids, weights):
        real = (segment_ids > 0)[:, :, None, None]

        def loss(arrays):
            out = backend(*arrays[:3], compute_visible_starts(segment_ids, window), arrays[3], 0, **options)
            return (out.astype(jnp.float32) * weights).sum(), jnp.where(real, out, 0)

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)((q, k, v, sinks))
        return [x.astype(jnp.float32) for x in (out, *grads) if x is not None]

    return run


def largest_difference(ours, theirs) -> float:
    """Of any array, over the largest entry of that array in ``theirs``. A NaN counts as infinite.

    An array that is 0 (as the gradient of queries that see one key) is measured by the largest of all arrays.
    """
    ours, theirs = [np.asarray(x) for x in ours], [np.asarray(x) for x in theirs]
    largest = [float(np.abs(x).max()) for x in theirs]
    scales = [scale if scale > 1e-3 * max(largest) else max(largest) for scale in largest]
    found = [float(np.abs(a - b).max()) / scale for a, b, scale in zip(ours, theirs, scales, strict=True)]
    return max(x if np.isfinite(x) else np.inf for x in found)


def compare_kernel(name: str, mechanism: str, heads: tuple[int, int, int], dtype: str, total: int) -> dict[str, Any]:
    """Errors of a kernel's output and gradients against softmax written out in float32, beside the reference's own."""
    options = {"scale": heads[2] ** -0.5, "softcap": 0.0} | MECHANISMS[mechanism]
    sinks, window = options.pop("sinks", False), options.pop("window", 0)
    rows = [[total // 60, total // 2, 1, 1, total // 5], [total], draw_lengths(total)]
    inputs = draw_attention(heads, rows, total, sinks)
    arrays = inputs.q, inputs.k, inputs.v, inputs.sinks
    rounded = [x if x is None else x.astype(dtype).astype(jnp.float32) for x in arrays[:3]]

    def dense(q, k, v, starts, sinks, first, **options):
        del starts, first
        real = (inputs.segment_ids > 0)[:, :, None, None]
        return jnp.where(real, dense_attention(q, k, v, inputs.segment_ids, window, sinks, **options), 0)

    rest = inputs.segment_ids, inputs.weights
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(make_attention(dense, window, **options))(*rounded, inputs.sinks, *rest)
        errors = {}
        for backend in (name, "chunked"):
            given = [x.astype(dtype) for x in arrays[:3]]
            found = jax.jit(make_attention(open_backend(backend), window, **options))(*given, inputs.sinks, *rest)
            errors[backend] = largest_difference(found, expected)
    limit = max(ERROR_RATIO * errors["chunked"], ERROR_FLOOR)
    return {"error": errors[name], "reference_error": errors["chunked"], "ok": bool(errors[name] <= limit < 0.1)}


def kernel_cases(sizes: Sizes) -> Cases:
    """Kernels against softmax written out, forward and backward: packed ragged rows, windows, soft caps, sinks."""
    for name in KERNELS[jax.default_backend()]:
        for i, mechanism in enumerate(sizes.mechanisms):
            heads = sizes.heads[i % len(sizes.heads)]
            for dtype in ("bfloat16", "float32"):
                case = functools.partial(compare_kernel, name, mechanism, heads, dtype, sizes.exact_length)
                yield f"{name}, {mechanism}, {heads[0]}/{heads[1]} heads of {heads[2]}, {dtype}", case


def attention_cases(sizes: Sizes) -> Cases:
    """Speed and memory of attention in bfloat16, forward and with its gradients, beside the reference's."""
    heads = sizes.heads[0]

    def measure(name: str, lengths: list[int], window: int):
        inputs = draw_attention(heads, [lengths], sizes.length, sinks=False)
        options = {"scale": heads[2] ** -0.5, "softcap": 0.0}
        arrays = [x.astype(jnp.bfloat16) for x in (inputs.q, inputs.k, inputs.v)]
        backend, starts = open_backend(name), compute_visible_starts(inputs.segment_ids, window)
        forward = time_call(lambda *a: backend(*a, starts, None, 0, **options), *arrays, repeats=sizes.repeats)
        both = time_call(
            lambda *a: make_attention(backend, window, **options)(*a, None, inputs.segment_ids, inputs.weights),
            *arrays,
            repeats=sizes.repeats,
        )
        reach = np.minimum(np.concatenate([np.arange(1, n + 1) for n in lengths]), window or sizes.length)
        products = 2 * 2 * heads[0] * heads[2] * float(reach.sum())  # of forward; backward needs twice as many
        return {
            "forward_ms": forward["ms"],
            "both_ms": both["ms"],
            "forward_tflops": products / forward["ms"] / 1e9,
            "both_tflops": 3 * products / both["ms"] / 1e9,
            "temporaries_gib": both["temporaries_gib"],
            "compile_s": both["compile_s"],
        }

    layouts = {
        "one document": ([sizes.length], 0),
        "packed": (draw_lengths(sizes.length), 0),
        "window": ([sizes.length], sizes.length // 8),
    }
    for name in (*KERNELS[jax.default_backend()], "chunked"):
        for layout in sizes.layouts:
            yield f"{name}, {layout}", functools.partial(measure, name, *layouts[layout])


# The loss.


def loss_cases(sizes: Sizes) -> Cases:
    """The chunked loss with its gradients beside log_softmax over all logits: time, memory, and the same numbers."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    hidden, unembed = draw(sizes.tokens, sizes.embed), 0.05 * draw(sizes.vocab, sizes.embed)
    targets = jnp.asarray(rng.integers(0, sizes.vocab, sizes.tokens), jnp.int32)
    results: dict[str, Any] = {}

    def in_chunks(hidden, unembed, targets, weights):
        chunk = min(1024, sizes.tokens)
        return compute_weighted_nll(hidden, unembed, targets, weights, vocab_size=sizes.vocab, chunk=chunk)[0]

    def at_once(hidden, unembed, targets, weights):
        logits = jnp.dot(hidden, unembed.T, preferred_element_type=jnp.float32)
        return -(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0] * weights).sum()

    def measure(name: str, loss: Callable, share: float):
        weights = jnp.asarray(np.arange(sizes.tokens) < share * sizes.tokens, jnp.float32)
        run = jax.value_and_grad(loss, (0, 1))
        measured = time_call(run, hidden, unembed, targets, weights, repeats=sizes.repeats)
        value, grads = jax.jit(run)(hidden, unembed, targets, weights)
        results[name] = [np.asarray(x, np.float32) for x in (value, *grads)]
        return measured | {"loss": float(value) / float(weights.sum())}

    def compare():
        error = largest_difference(results["chunked"], results["at once"])
        return {"error": error, "ok": bool(error < 0.02)}  # some roundings of bfloat16

    yield "chunked", functools.partial(measure, "chunked", in_chunks, 1.0)
    yield "chunked, a quarter trained", functools.partial(measure, "quarter", in_chunks, 0.25)
    yield "at once", functools.partial(measure, "at once", at_once, 1.0)
    yield "difference", compare


# Training.


def write_config(folder: pathlib.Path, model: dict[str, int]) -> pathlib.Path:
    """A Qwen3 of these sizes as a folder with config.json alone."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | model))
    return folder


def training_config(sizes: Sizes, folder: pathlib.Path, **model):
    """Full fine-tuning unless ``model`` has adapters, at ``sizes.rows`` x ``sizes.length`` tokens an update."""
    data = {"train": "unread", "sequence_length": sizes.length, "batch_size": sizes.rows}
    values = {"model": {"path": str(folder), "remat": "dots"} | model, "data": data, "mesh": {"fsdp": -1}}
    return resolve(values | {"optimizer": {"learning_rate": 3e-4, "warmup_steps": 0}})


def make_rows(sizes: Sizes) -> dict[str, np.ndarray]:
    """Packed rows of ragged documents, int32 or float32 [B, T], half of the tokens trained."""
    lengths = [draw_lengths(sizes.length, seed) for seed in range(sizes.rows)]
    segment_ids, positions = (
        np.stack(arrays) for arrays in zip(*(make_row(x, sizes.length) for x in lengths), strict=True)
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, sizes.model["vocab_size"], (sizes.rows, sizes.length + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": (positions % 2).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": positions,
    }


def train_on(sizes: Sizes, folder: pathlib.Path, **model) -> dict[str, Any]:
    """The recipe's own train step on random parameters: speed, MFU, memory, and whether it learns the batch."""
    config = training_config(sizes, folder, **model)
    mesh = make_mesh(config.mesh)
    abstract = abstract_model(config, folder, mesh)
    program = make_program(config, abstract, mesh, 1000)
    start = time.perf_counter()
    compiled = program.train_step.lower(program.abstract_state, program.abstract_batch).compile()
    compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    state = init_train_state(
        fill(abstract.params), fill(abstract.frozen), program.optimizer, jax.random.key(0), mesh=mesh
    )
    arrays = make_rows(sizes)
    batch = jax.device_put(Batch(**arrays), jax.tree.map(lambda leaf: leaf.sharding, program.abstract_batch))
    losses = []

    def update():
        nonlocal state
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["train/loss"]))

    workloads.time_steps(update, 2)
    seconds = statistics.median(workloads.time_steps(update, sizes.updates))
    stats = count_batch(arrays, abstract.config)
    flops, peak = sum(count_flops(abstract.config, stats).values()), peak_flops(jax.devices())
    return {
        "parameters": num_params(abstract.params),
        "tokens_per_second": stats.tokens / seconds,
        "ms": 1e3 * seconds,
        "mfu": peak and flops / seconds / peak,
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "peak_gib": peak_memory_gib(),
        "compile_s": compile_seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "ok": bool(np.isfinite(losses).all() and losses[-1] < losses[0]),
    }


def fill(tree):
    """Random arrays where ``tree`` has shapes: small numbers, 1 for the scales of norms, whole numbers where packed."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)

    def start(path, leaf, key):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.randint(key, leaf.shape, 0, 100).astype(leaf.dtype)
        if "norm" in jax.tree_util.keystr(path) or leaf.ndim < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        scale = 1e-4 if jnp.issubdtype(leaf.dtype, jnp.floating) and "scale" in jax.tree_util.keystr(path) else 0.02
        return (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    make = lambda path, leaf, key: jax.jit(lambda key: start(path, leaf, key), out_shardings=leaf.sharding)(key)
    arrays = [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(treedef, arrays)


def sft_cases(sizes: Sizes) -> Cases:
    """The train step of recipes/sft.py at packed rows of ``sizes.length`` tokens."""
    folder = write_config(pathlib.Path(tempfile.mkdtemp()) / "model", sizes.model)
    for name in sizes.variants:
        yield name, functools.partial(train_on, sizes, folder, **VARIANTS[name])


# Generation.


def generate_cases(sizes: Sizes) -> Cases:
    """Generated tokens per second of a model in the compute dtype, by prompts answered together."""
    folder = write_config(pathlib.Path(tempfile.mkdtemp()) / "model", sizes.model)
    config = training_config(sizes, folder)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model_config = abstract_model(config, folder, mesh).config
    rng = np.random.default_rng(0)

    @functools.cache
    def make_params():
        dtype = model_config.compute_dtype
        params = jax.jit(lambda key: init_params(model_config, key))(jax.random.key(0))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def measure(rows: int, temperature: float):
        prompts = rng.integers(0, model_config.vocab_size, (rows, sizes.prompt)).tolist()
        sampling = SamplingParams(temperature=temperature, max_new_tokens=sizes.new_tokens)
        run = lambda: Engine(make_params(), model_config, slots=rows).generate(prompts, sampling)
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        seconds, found = [], []
        for _ in range(max(1, sizes.repeats // 5)):
            start = time.perf_counter()
            found = run()
            seconds.append(time.perf_counter() - start)
        tokens = sum(len(one.tokens) for one in found)
        return {
            "tokens_per_second": tokens / statistics.median(seconds),
            "ms_per_step": 1e3 * statistics.median(seconds) / sizes.new_tokens,
            "first_s": first,
            "peak_gib": peak_memory_gib(),
            "ok": tokens == rows * sizes.new_tokens,
        }

    for rows in sizes.batches:
        for word, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            yield f"{rows} prompts, {word}", functools.partial(measure, rows, temperature)


# The whole product.


def product_cases(sizes: Sizes) -> Cases:
    """`postrain train` on a small random model: rows, updates, evaluation, checkpoint, export, and answers of it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    import postrain
    from postrain.hf.config import read_config
    from postrain.hf.save import save_pretrained

    folder = pathlib.Path(tempfile.mkdtemp())
    small = SMALL.model | {"hidden_size": 128, "intermediate_size": 256}

    def write_model():
        source = write_config(folder / "source", small)
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        words = {word: i for i, word in enumerate([*special, *tokenizers.pre_tokenizers.ByteLevel.alphabet()])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        fast.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        fast.save_pretrained(source)
        config = read_config(source)
        params = init_params(config, jax.random.key(0))
        save_pretrained(folder / "model", params, config, source_folder=source, dtype="float32")
        return {"parameters": num_params(params)}

    def train():
        rows = ROOT / "configs" / "data" / "quickstart_train.jsonl"
        config = {
            "model": {"path": str(folder / "model")},
            "data": {"train": str(rows), "sequence_length": 512, "batch_size": 8},
            "optimizer": {"learning_rate": 3e-3},
            "train": {"steps": 40 if sizes is FULL else 8, "log_every": 1},
        }
        start = time.perf_counter()
        metrics = postrain.train(config, folder / "run")
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        return {
            "seconds": time.perf_counter() - start,
            "first_loss": losses[0],
            "last_loss": metrics["train/loss"],
            "ok": bool(losses[-1] < losses[0]) and (folder / "run" / "export" / "model.safetensors").exists(),
        }

    def answer():
        answers = postrain.generate(str(folder / "run" / "export"), ["a comedy"], max_new_tokens=8)
        return {"answers": len(answers), "ok": len(answers) == 1}

    yield "write the model", write_model
    yield "train", train
    yield "answer", answer


PARTS = {
    "device": device_cases,
    "kernels": kernel_cases,
    "sft": sft_cases,
    "loss": loss_cases,
    "attention": attention_cases,
    "generate": generate_cases,
    "product": product_cases,
}
