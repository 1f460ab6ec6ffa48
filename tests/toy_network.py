"""A small network with the shape of the real thing: embedding, stacked layers under ``lax.scan``, tied head."""

import jax
import jax.numpy as jnp
import numpy as np

from postrain.types import LossSums, WeightedSum

VOCABULARY, EMBED, HIDDEN, LAYERS = 32, 16, 24, 2
LOGICAL_AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "layers": {
        "mlp_norm": {"scale": ("layers", None)},
        "mlp": {
            "up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
            "down": {"kernel": ("layers", "mlp", "embed")},
        },
    },
}


def make_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)

    return {
        "embed": {"embedding": normal(VOCABULARY, EMBED)},
        "layers": {
            "mlp_norm": {"scale": jnp.ones((LAYERS, EMBED), jnp.float32)},
            "mlp": {
                "up": {"kernel": normal(LAYERS, EMBED, HIDDEN), "bias": normal(LAYERS, HIDDEN)},
                "down": {"kernel": normal(LAYERS, HIDDEN, EMBED)},
            },
        },
    }


def make_batch(seed: int = 0, rows: int = 16, length: int = 6) -> dict:
    """Ragged on purpose: rows have from no trained token at all to all of them."""
    rng = np.random.default_rng(seed)
    trained = rng.integers(0, length + 1, size=rows)
    return {
        "tokens": rng.integers(0, VOCABULARY, size=(rows, length), dtype=np.int32),
        "targets": rng.integers(0, VOCABULARY, size=(rows, length), dtype=np.int32),
        "loss_mask": (np.arange(length)[None] < trained[:, None]).astype(np.float32),
    }


def compute_logits(params, tokens):
    """float32 [B, T, VOCABULARY]."""

    def layer(x, p):
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["mlp_norm"]["scale"]
        hidden = jax.nn.silu(normed @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
        return x + hidden @ p["mlp"]["down"]["kernel"], None

    table = params["embed"]["embedding"]
    x, _ = jax.lax.scan(layer, table[tokens], params["layers"])
    return x @ table.T


def compute_loss(params, batch, rng):
    """One loss, cross-entropy over trained tokens, and the share of right guesses."""
    logits = compute_logits(params, batch["tokens"])
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    mask = batch["loss_mask"]
    right = (logits.argmax(-1) == batch["targets"]) * mask
    weight = mask.sum()
    return LossSums(
        {"nll": WeightedSum(-(logprobs * mask).sum(), weight)}, {"accuracy": WeightedSum(right.sum(), weight)}
    )


# Of rows: all in one of four micro-batches, and all on the first device of eight.
ROW_WEIGHTS = np.zeros(16, np.float32)
ROW_WEIGHTS[[1, 5]] = 0.5, 3.0
COEFS = {"z": 0.1, "none": 5.0}


def compute_losses(params, batch, rng):
    """Three losses with weights of their own: "nll" of trained tokens, "z" of rows and "none", whose weight is 0."""
    losses, metrics = compute_loss(params, batch, rng)
    z_B = jax.nn.logsumexp(compute_logits(params, batch["tokens"]), -1).mean(1) ** 2
    weights_B = batch["row_weights"]
    z = WeightedSum((z_B * weights_B).sum(), weights_B.sum())
    none = WeightedSum((z_B * 0).sum(), jnp.zeros(()))
    trained_B = batch["loss_mask"].max(1)
    rows = WeightedSum((z_B * trained_B).sum(), trained_B.sum())
    return LossSums(losses | {"z": z, "none": none}, metrics | {"rows": rows})


def compute_mean_loss(params, batch):
    """The loss of an update with ``compute_losses`` and ``COEFS``, over a whole batch at once."""
    losses, _ = compute_losses(params, batch, None)
    means = {name: term.total / jnp.maximum(term.weight, 1e-9) for name, term in losses.items()}
    return sum(COEFS.get(name, 1.0) * mean for name, mean in means.items()), means


def total_of(sums: LossSums):
    """The total of the only loss."""
    (term,) = sums.losses.values()
    return term.total


def scale_loss(sums: LossSums, factor) -> LossSums:
    """``sums`` with the only loss times ``factor``."""
    ((name, term),) = sums.losses.items()
    return sums._replace(losses={name: term._replace(total=term.total * factor)})


def torch_loss(params, batch):
    """The mean of ``compute_loss`` over trained tokens, written again with torch; ``params``: torch tensors."""
    import torch

    table = params["embed"]["embedding"]
    x = table[torch.from_numpy(batch["tokens"]).long()]
    for i in range(LAYERS):
        p = params["layers"]
        normed = torch.nn.functional.rms_norm(x, (EMBED,), p["mlp_norm"]["scale"][i], 1e-6)
        hidden = torch.nn.functional.silu(normed @ p["mlp"]["up"]["kernel"][i] + p["mlp"]["up"]["bias"][i])
        x = x + hidden @ p["mlp"]["down"]["kernel"][i]
    targets = torch.from_numpy(batch["targets"]).long()
    losses = torch.nn.functional.cross_entropy((x @ table.T).flatten(0, 1), targets.flatten(), reduction="none")
    mask = torch.from_numpy(batch["loss_mask"]).flatten()
    return (losses * mask).sum() / mask.sum()
