"""Seconds to compile a train step of few and of many layers, in turns; the loss's temporaries at a large vocabulary.

python tests/benchmarks/compile.py --rounds 3 [--write]
"""

import dataclasses
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import workloads
from runner import Bar, make_parser, show

from postrain.config import OptimizerConfig
from postrain.models.config import ModelConfig, RopeConfig
from postrain.models.params import abstract_params
from postrain.objectives.logprobs import compute_weighted_nll
from postrain.objectives.sft import make_sft_loss
from postrain.training.model import Forward
from postrain.training.optimizer import make_optimizer
from postrain.training.step import abstract_train_state, make_train_step
from postrain.types import Batch

CONFIG = ModelConfig(
    vocab_size=32768,
    embed_size=256,
    mlp_size=768,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    qk_norm="head",
)
PERIOD = (512, 512, 512, 512, 512, 0)  # windows, as Gemma 3's
DEPTHS = (4, 32)  # of a model whose layers are all alike
PATTERN_DEPTHS = (6, 48)  # one period, and eight
KINDS = (False, DEPTHS), (True, PATTERN_DEPTHS)
ROWS, LENGTH = 8, 1024


def make_config(num_layers: int, pattern: bool) -> ModelConfig:
    if not pattern:
        return dataclasses.replace(CONFIG, num_layers=num_layers)
    windows = PERIOD * (num_layers // len(PERIOD))
    mechanisms = {"post_norms": True, "norm_plus_one": True, "local_rope": RopeConfig(theta=1e4)}
    return dataclasses.replace(CONFIG, num_layers=num_layers, layer_windows=windows, **mechanisms)


def compile_step(config: ModelConfig) -> tuple[float, int]:
    """Seconds, and instructions of the program."""
    loss_fn = make_sft_loss(Forward(config, chunk=1024).nll)
    optimizer, _ = make_optimizer(OptimizerConfig(), 10)
    state = abstract_train_state(abstract_params(config), {}, optimizer)
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows, rows)
    step = make_train_step(loss_fn, optimizer)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    return time.perf_counter() - start, compiled.as_text().count(" = ")


def loss_temporaries() -> tuple[int, int]:
    """Bytes of temporaries of the loss and its gradients, chunked and naive: 4,096 tokens, V = 151,936, D = 512."""
    tokens, vocab, embed = 4096, 151_936, 512
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arguments = floats(tokens, embed), floats(vocab, embed), jax.ShapeDtypeStruct((tokens,), jnp.int32), floats(tokens)

    def chunked(hidden, unembed, targets, mask):
        return compute_weighted_nll(hidden, unembed, targets, mask, vocab_size=vocab, chunk=256)[0]

    def naive(hidden, unembed, targets, mask):
        log_p = jax.nn.log_softmax(hidden @ unembed.T)
        return -(jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0] * mask).sum()

    size = lambda fn: jax.jit(jax.grad(fn, (0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    return size(chunked), size(naive)


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    load = workloads.Load()
    programs = {
        (depth, pattern): [] for pattern, depths in ((False, DEPTHS), (True, PATTERN_DEPTHS)) for depth in depths
    }
    compile_step(make_config(DEPTHS[0], False))  # what is loaded on the first compilation counts for none
    for _ in range(arguments.rounds):
        for (depth, pattern), found in programs.items():
            found.append(compile_step(make_config(depth, pattern)))
    text, bars = summarize(programs, *loss_temporaries(), load.share())
    show("compile", text, bars, arguments.write)


def summarize(programs: dict, chunked: int, naive: int, others: float) -> tuple[str, list[Bar]]:
    """Seconds and instructions by depth and pattern, one a turn; bytes of the two losses; what others took."""
    lines, bars = ["| layers | compiled in | instructions | over the fewest layers |", "|---|---|---|---|"], []
    for pattern, depths in KINDS:
        kind = f"in a pattern of {len(PERIOD)}" if pattern else "alike"
        base = None
        for depth in depths:
            seconds = statistics.median(seconds for seconds, _ in programs[depth, pattern])
            size = programs[depth, pattern][0][1]
            base = base or (seconds, size)
            lines.append(f"| {depth}, {kind} | {seconds:.2f} s | {size:,} | {seconds / base[0]:.2f}x |")
        bars.append(
            Bar(f"compilation of {depth} layers {kind} over {depths[0]}", seconds / base[0], "<=", 1.3, "{:.2f}x")
        )
        bars.append(Bar("their instructions", size / base[1], "<=", 1.3, "{:.2f}x"))
    text = "\n".join(
        [
            workloads.describe_machine(),
            "",
            *lines,
            "",
            f"Medians of {len(programs[DEPTHS[0], False])} turns, jax {jax.__version__}; other processes took "
            f"{others:.1%} of the CPU.",
            "",
            f"Temporaries of the loss with its gradients at 4,096 tokens, V = 151,936, D = 512: {chunked / 2**30:.2f} "
            f"GiB against {naive / 2**30:.2f} GiB of the naive one: **{chunked / naive:.3f}x** (`memory_analysis()`).",
        ]
    )
    bars.append(Bar("temporaries of the loss over the naive one", chunked / naive, "<=", 0.1, "{:.3f}x"))
    return text, bars


if __name__ == "__main__":
    main()
