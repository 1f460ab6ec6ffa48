"""The weights that the engine runs, by version: the trainer's arrays, or on CPU a copy in which layers are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.models.cache import init_cache
from postrain.models.config import ModelConfig
from postrain.models.lora import ADAPTER_LEAVES
from postrain.models.transformer import compute_hidden, compute_hidden_cached, compute_logits, split_layers
from postrain.sharding import find_mesh, num_row_shards, to_host

PROBE_LENGTH = 16
# Mean difference of a token's log-probability between two programs over the same weights: rounding, and in bfloat16 the
# experts that rounding chooses. Another model's logprobs differ by a nat or more.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
TOLERANCE_OF_LOW_PRECISION = 0.25


class Weights:
    """``tree`` is what ``compute_hidden_cached`` takes; it shares the arrays of ``params`` but for layers on CPU."""

    def __init__(self, params: dict, config: ModelConfig, version: int):
        self.config, self.version = config, version
        self.is_split = jax.default_backend() == "cpu"
        self.tree = split_layers(params, config) if self.is_split else params

    def update(self, params: dict, version: int, *, base_changed: bool) -> float:
        """Takes ``params`` over; on CPU one pass over what has changed: all of it, or what trains beside a base.

        Returns what ``check`` does; where that raises, the old weights and their version stay.
        """
        old = self.tree, self.version
        if not self.is_split:
            self.tree = params
        elif base_changed or not (self.config.lora or self.config.new_rows):
            self.tree = split_layers(params, self.config)
        else:
            self.tree = split_layers(_pick_trained(params), self.config, old=self.tree)
        self.version = version
        try:
            return self.check(params)
        except Exception:
            self.tree, self.version = old
            raise

    def check(self, params: dict) -> float:
        """Mean difference of a probe's log-probabilities here and by the forward that trains on ``params``, in nats.

        Raises UserError where it is more than rounding explains.
        """
        rows = num_row_shards(mesh) if (mesh := find_mesh(params)) else 1
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, (rows, PROBE_LENGTH + 1), np.int32)
        difference = float(to_host(_compare(self.tree, params, tokens, config=self.config, split=self.is_split)))
        limit = TOLERANCE.get(self.config.compute_dtype, TOLERANCE_OF_LOW_PRECISION)
        if not difference <= limit:
            raise UserError(
                f"after the update to version {self.version} the engine's log-probabilities of a probe differ from the "
                f"trainer's by {difference:.2g} on average (expected at most {limit}): its weights are not those that "
                "were given; where the base of adapters has changed too, say so (base_changed)"
            )
        return difference


def _pick_trained(params: dict) -> dict:
    """Of the tree only adapters and the rows of new tokens."""
    picked = {
        key: _pick_trained(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if isinstance(value, dict) or key in (*ADAPTER_LEAVES, "new_rows")
    }
    return {key: value for key, value in picked.items() if not isinstance(value, dict) or value}


@functools.partial(jax.jit, static_argnames=("config", "split"))
def _compare(tree, params, tokens, *, config, split):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(PROBE_LENGTH), inputs.shape)
    cache = init_cache(config, inputs.shape[0], PROBE_LENGTH, split=split)

    def score(params, hidden):
        logprobs = jax.nn.log_softmax(compute_logits(params, config, hidden), axis=-1)
        return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)

    ours = score(tree, compute_hidden_cached(tree, config, inputs, positions, cache)[0])
    theirs = score(params, compute_hidden(params, config, inputs, jnp.ones_like(inputs), positions))
    return jnp.abs(ours - theirs).mean()
