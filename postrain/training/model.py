"""Loads the model that a run trains: its trainable and frozen parameters, placed on the mesh."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from postrain.checkpoint.record import fingerprint_model
from postrain.config import Config, LoraSection
from postrain.data.rendering.tokenizer import NewTokens, load_run_tokenizer
from postrain.errors import UserError, shorten
from postrain.hf.classifier import HEAD_NAME, load_trunk, read_trunk
from postrain.hf.config import read_config
from postrain.hf.load import load_pretrained
from postrain.models.config import LoraConfig, ModelConfig, NewRows
from postrain.models.heads import HeadConfig, apply_head, apply_heads, head_specs, init_heads
from postrain.models.lora import adapter_specs, init_lora, lora_specs
from postrain.models.params import (
    PARTS,
    ParamSpec,
    axes_of,
    frozen_specs,
    name_broken,
    num_params,
    param_specs,
    shapes_of,
)
from postrain.models.quantized import as_array, shape_of
from postrain.models.transformer import compute_hidden_and_terms, embed, unembedding
from postrain.objectives.logprobs import TokenLogprobs, compute_token_logprobs, compute_weighted_nll, map_logits
from postrain.sharding import named_shardings
from postrain.types import Batch, RowTerms

VALUE_NAME = "value"  # of the head that expects rewards, and of its loss
TEACHER = "teacher"  # the key of another, frozen model in ``frozen``, which the loss reads beside the one that trains


@dataclasses.dataclass
class Model:
    """A model to train. ``params`` trains, ``frozen`` does not; ``merge_params`` makes one tree of both."""

    config: ModelConfig
    params: Any  # None once a train state owns them
    frozen: Any
    heads: tuple[HeadConfig, ...] = ()
    fingerprint: dict | None = None  # of the folder, adapters and new tokens; None: the model is abstract
    teacher: ModelConfig | None = None  # of the tree in ``frozen[TEACHER]``, where there is one
    projects: bool = True  # onto the vocabulary; False: a classifier, whose heads are in place of that


def load_model(config: Config, folder: str | os.PathLike, mesh: Mesh) -> Model:
    """The model of ``folder`` with what ``config.model`` says about adapters and arithmetic, laid out over ``mesh``.

    Without adapters everything trains, from float32 masters. With them the base is frozen and kept in the compute
    dtype, or quantised, and the adapters start from ``train.seed``. Rows of new tokens train beside a frozen base, else
    in their table. Heads (``make_heads``) train in any case; they are those of the folder where it is a classifier's.
    Raises UserError as load_pretrained and find_new_tokens do, and where a weight is not finite.
    """
    frozen, heads, projects = freezes_base(config), make_heads(config), not is_classifier(config)
    model_config, new, rows = configure(config, folder, mesh)
    load = load_pretrained if projects else load_trunk
    _, base = load(
        folder,
        mesh=mesh,
        dtype=model_config.compute_dtype if frozen else "float32",
        vocab_size=model_config.vocab_size,
        quantization=model_config.quantization,
    )
    if broken := name_broken(base):
        raise UserError(
            f"{folder}: {broken} holds numbers that are not finite: download the model again, or train anew"
        )
    section = config.model
    fingerprint = fingerprint_model(folder, model_config.lora, section.new_tokens, section.quantization, heads)
    started = start_rows(base, new, rows, mesh) if new and rows else {}
    trained, key = {}, jax.random.key(config.train.seed)
    if heads:
        own = base.pop("heads", None)
        trained["heads"] = _start_heads(heads, model_config, jax.random.fold_in(key, 1), mesh) if own is None else own
    if not frozen:
        base = write_rows(base, started, rows) if rows else base
        return Model(model_config, base | trained, {}, heads, fingerprint, projects=projects)
    if model_config.lora is not None:
        specs = lora_specs(model_config)
        shardings = named_shardings(axes_of(specs), mesh, shapes_of(specs))
        start = jax.jit(lambda rng, base: init_lora(model_config, rng, base), out_shardings=shardings)
        trained |= start(key, base)
    return Model(model_config, trained | started, base, heads, fingerprint, projects=projects)


def make_heads(config: Config) -> tuple[HeadConfig, ...]:
    """The heads of a config's model, at every position: a classifier's, or a language model's own for values, if any.

    A head of values starts at 0, what rewards are on average (``data/reward_weights.py`` subtracts their mean).
    """
    if is_classifier(config):
        return (HeadConfig(HEAD_NAME, outputs=len(name_classes(config)) or 1, position="every"),)
    if config.sft.weights.baseline == "head":
        return (HeadConfig(VALUE_NAME, position="every", bias=True, zeros=True),)
    return ()


def is_classifier(config: Config) -> bool:
    """Whether the config's model has heads in place of the projection onto the vocabulary."""
    return config.recipe == "reward"


def name_classes(config: Config) -> tuple[str, ...]:
    """Of a classifier, in the order of its outputs; () for a model of one output."""
    return (config.data.label_names or ("false", "true")) if config.reward.loss == "cross_entropy" else ()


def _start_heads(heads: tuple[HeadConfig, ...], config: ModelConfig, key: jax.Array, mesh: Mesh) -> dict:
    specs = head_specs(heads, config.embed_size)
    shardings = named_shardings(axes_of(specs), mesh, shapes_of(specs))
    return jax.jit(lambda key: init_heads(heads, config, key), out_shardings=shardings)(key)["heads"]


def freezes_base(config: Config) -> bool:
    """Whether only adapters, or the rows of new tokens, train."""
    return bool(config.model.lora.rank) or config.model.new_tokens.train_alone


def abstract_model(config: Config, folder: str | os.PathLike, mesh: Mesh) -> Model:
    """The result of ``load_model`` as ``jax.ShapeDtypeStruct`` with shardings: config.json is read, and the
    tokenizer where new tokens are added to it; no weights.

    The devices of ``mesh`` need not exist.
    """
    model_config, _, _ = configure(config, folder, mesh)
    heads, projects = make_heads(config), not is_classifier(config)
    trained = head_specs(heads, model_config.embed_size) if heads else {}
    if not freezes_base(config):
        params = place_abstract(param_specs(model_config) | trained, jnp.float32, mesh)
        return Model(model_config, params, {}, heads, projects=projects)
    trained |= adapter_specs(model_config)
    frozen = place_abstract(frozen_specs(model_config), model_config.compute_dtype, mesh)
    return Model(model_config, place_abstract(trained, jnp.float32, mesh), frozen, heads, projects=projects)


def place_abstract(specs: dict, dtype, mesh: Mesh) -> dict:
    """ParamSpec tree -> tree of ``jax.ShapeDtypeStruct`` with shardings."""
    shapes = shapes_of(specs, dtype)
    with_sharding = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    return jax.tree.map(with_sharding, shapes, named_shardings(axes_of(specs), mesh, shapes))


def read_source(config: Config, folder: str | os.PathLike) -> ModelConfig:
    """The model in ``folder`` as far as it is loaded: of a classifier, its trunk.

    Raises UserError as read_config does, and for a classifier with other classes than those of ``config``.
    """
    if not is_classifier(config):
        return read_config(folder)
    heads = make_heads(config)
    trunk, classes = read_trunk(folder), name_classes(config)
    if len(trunk.labels) not in (0, heads[0].outputs):
        raise UserError(
            f"{folder}: is a classifier of {len(trunk.labels)} outputs, {shorten(trunk.labels, 8)}, and "
            f"'reward.loss' = {config.reward.loss!r} trains {heads[0].outputs}: "
            + ("list its names as 'data.label_names'" if classes else "use another loss or model")
        )
    known = [name for i, name in enumerate(trunk.labels) if name != f"LABEL_{i}"]
    if classes and known and trunk.labels != classes:
        raise UserError(
            f"{folder}: is a classifier whose outputs are {shorten(trunk.labels, 8)}, in this order; the labels are "
            f"{shorten(classes, 8)}: list the same names as 'data.label_names'"
        )
    return trunk.config


def find_vocab_size(config: Config, folder: str | os.PathLike) -> int:
    """The vocabulary size of the model of ``folder``, rows of the config's new tokens included."""
    vocab_size = read_source(config, folder).vocab_size
    new = find_new_tokens(config, folder, vocab_size)
    return max(vocab_size, new.stop) if new else vocab_size


def count_params(model: Model) -> tuple[int, int]:
    """(trained, frozen) numbers of parameters, those of a teacher too; a quantised parameter counts as one."""
    count = lambda config: num_params(shapes_of(param_specs(config)))
    base = count(model.config) if model.frozen.keys() - {TEACHER} else 0
    return num_params(model.params), base + (count(model.teacher) if model.teacher else 0)


def make_lora_config(section: LoraSection) -> LoraConfig | None:
    """The adapters of a config; None where it has none."""
    if not section.rank:
        return None
    every = dataclasses.asdict(section.ranks)
    ranks = tuple((target, rank) for target, rank in every.items() if rank not in (0, section.rank))
    return LoraConfig(section.rank, section.alpha, section.targets, ranks, section.dora)


def configure(
    config: Config, folder: str | os.PathLike, mesh: Mesh
) -> tuple[ModelConfig, NewTokens | None, NewRows | None]:
    """The model of ``folder`` with the arithmetic, attention, adapters, routers and new tokens of ``config.model``.

    Also the new tokens and their rows, None without any. Raises UserError where config and model do not fit.
    """
    source, section, lora = read_source(config, folder), config.model, make_lora_config(config.model.lora)
    new, rows = find_new_tokens(config, folder, source.vocab_size), None
    if new is not None:
        # Ids before them for which the model has no row get one too: no row may be zero, which would be a likelier
        # token than most.
        first = min(new.first, source.vocab_size)
        rows = NewRows(first, new.stop - first)

    if lora and lora.dora and source.moe and (experts := {"gate", "up", "down"} & set(lora.targets)):
        raise UserError(
            f"config key 'model.lora.dora': experts have no magnitudes, found targets {', '.join(sorted(experts))}: "
            "leave them out of 'model.lora.targets', or set dora to False"
        )
    if section.quantization == "nf4" and source.embed_size % 2:
        raise UserError(
            f"config key 'model.quantization' = 'nf4' packs two numbers in a byte, but the model's hidden size is "
            f"{source.embed_size}: use 'int8'"
        )
    if lora:
        _check_ranks(source, lora)
    ways, heads, num_kv = mesh.shape["tensor"], source.num_heads, source.num_kv_heads
    if heads % math.lcm(num_kv, ways):  # key heads are repeated until they divide
        raise UserError(
            f"config key 'mesh.tensor' = {ways}: {heads} heads over {num_kv} key heads do not divide over it: give it "
            f"a divisor of {heads}"
        )
    router = dataclasses.asdict(section.router)
    if source.moe is None and (losses := [name for name in ("load_balance_coef", "z_coef") if router[name]]):
        raise UserError(f"config key 'model.router.{losses[0]}': the model has no experts, so no router: leave it at 0")
    model_config = dataclasses.replace(
        source,
        vocab_size=max(source.vocab_size, new.stop) if new else source.vocab_size,
        new_rows=rows if freezes_base(config) else None,  # which train beside a frozen table, else in it
        compute_dtype=choose_compute_dtype(section.compute_dtype, mesh),
        fp8=section.fp8,
        remat=section.remat,
        attention=section.attention,
        attention_chunk=section.attention_chunk,
        lora=lora,
        quantization=section.quantization,
        moe=source.moe and dataclasses.replace(source.moe, **router),
    )
    return model_config, new, rows


def _check_ranks(config: ModelConfig, lora: LoraConfig) -> None:
    """Refuses adapters that could only be larger than the matrices they adapt, and not express more."""
    layers = param_specs(config)["layers"]
    linears = {name: linear for part in PARTS for name, linear in layers.get(part, {}).items() if name in lora.targets}
    limits = {name: min(linear["kernel"].shape[-2:]) for name, linear in linears.items()}
    if limits and all(lora.rank_of(name) > limit for name, limit in limits.items()):
        found = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        raise UserError(
            f"config key 'model.lora.rank' = {lora.rank} is above the smaller dimension of every target ({found}): "
            "lower it, or set it to 0 to train the matrices themselves"
        )


def choose_compute_dtype(name: str, mesh: Mesh | None = None) -> str:
    """ "auto" is bfloat16 on accelerators; on a CPU it gains nothing. Without a mesh: on what this process has."""
    if name != "auto":
        return name
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "float32" if platform == "cpu" else "bfloat16"


# --- the model as functions of its parameters, from which objectives compute their losses ---
# Legend: B rows, T positions, S documents of a row at most, K outputs of a head.


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model as functions of ``(params, batch)``; ``params`` is the whole tree, adapters beside their kernels.

    Each also returns the ``RowTerms`` of the routers, None without experts.

    Attributes:
      model_config: of the model.
      chunk: tokens projected onto the vocabulary at a time.
    """

    model_config: ModelConfig
    chunk: int

    def nll(self, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array, RowTerms | None]:
        """Sums weighted by ``batch.loss_mask``: -log p(target), and the targets that are the likeliest token.

        Both float32 []; only the first has a gradient, at three quarters of the cost of ``logprobs``.
        """
        hidden, terms = self._compute_hidden(params, batch)
        table = unembedding(params, self.model_config)
        nll_sum, correct_sum = compute_weighted_nll(hidden, table, batch.targets, batch.loss_mask, **self._projection)
        return nll_sum, correct_sum, terms

    def logprobs(self, params: dict, batch: Batch) -> tuple[TokenLogprobs, RowTerms | None]:
        """Of the target at every position where ``batch.loss_mask`` is not 0, float32 [B, T] each; 0 elsewhere."""
        return self._project(params, batch, *self._compute_hidden(params, batch))

    def noisy_logprobs(
        self, params: dict, batch: Batch, rng: jax.Array, alpha: float
    ) -> tuple[TokenLogprobs, RowTerms | None]:
        """``logprobs`` with uniform noise of at most ``alpha`` / sqrt(L D) in the embeddings of a document of L tokens.

        NEFTune (Jain et al. 2023, arXiv:2310.05914), for training alone; L is the document's, not the packed row's.
        """
        embedded = self._embed(params, batch, rng, alpha)
        return self._project(params, batch, *self._compute_hidden(params, batch, embedded))

    def logprobs_and_outputs(
        self, params: dict, batch: Batch, rng: jax.Array, head: HeadConfig, alpha: float = 0.0
    ) -> tuple[TokenLogprobs, jax.Array, RowTerms | None]:
        """``noisy_logprobs`` and the ``outputs`` of a head, float32 [B, T, K], of the same hidden states."""
        hidden, terms = self._compute_hidden(params, batch, self._embed(params, batch, rng, alpha) if alpha else None)
        found, _ = self._project(params, batch, hidden, terms)
        return found, apply_head(params, head, hidden).astype(jnp.float32), terms

    def _embed(self, params: dict, batch: Batch, rng: jax.Array, alpha: float) -> jax.Array:
        """The embeddings [B, T, D] of ``noisy_logprobs``."""
        assert batch.tokens is not None  # text
        embedded = embed(params, self.model_config, batch.tokens)
        count = lambda ids: jax.ops.segment_sum(jnp.ones_like(ids), ids, num_segments=ids.shape[0] + 1)[ids]
        lengths_BT = jax.vmap(count)(batch.segment_ids)
        scale_BT = jnp.where(batch.segment_ids > 0, alpha / jnp.sqrt(lengths_BT * embedded.shape[-1]), 0)
        noise = scale_BT[..., None] * jax.random.uniform(rng, embedded.shape, minval=-1.0)
        return embedded + noise.astype(embedded.dtype)

    def heads(
        self, params: dict, batch: Batch, heads: Sequence[HeadConfig]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], RowTerms | None]:
        """Outputs of ``heads`` by name, float32 [B, T, K] or [B, S, K], and where they are: bool [B, T] or [B, S].

        S is that of the targets of the heads at position "last", ``batch.fields[name]`` [B, S].
        """
        hidden, terms = self._compute_hidden(params, batch)
        documents = max((batch.fields[head.name].shape[1] for head in heads if head.position == "last"), default=1)
        outputs, present = apply_heads(params, heads, hidden, batch.segment_ids, documents)
        return outputs, present, terms

    def outputs(self, params: dict, batch: Batch, head: HeadConfig) -> tuple[jax.Array, RowTerms | None]:
        """Of a head at every position, float32 [B, T, K]; padding has some, too."""
        hidden, terms = self._compute_hidden(params, batch)
        return apply_head(params, head, hidden).astype(jnp.float32), terms

    def map_logits(
        self, params: dict, batch: Batch, values: Callable, rows: Any = (), shared: Any = ()
    ) -> tuple[Any, RowTerms | None]:
        """``objectives.logprobs.map_logits`` of the positions where ``batch.loss_mask`` is not 0."""
        hidden, terms = self._compute_hidden(params, batch)
        table = unembedding(params, self.model_config)
        return map_logits(values, hidden, table, batch.loss_mask, rows, shared, **self._projection), terms

    def project_inputs(self, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What logits are made of: hidden states [B, T, D], and the projection onto the vocabulary [V', D] in their
        dtype."""
        hidden, _ = self._compute_hidden(params, batch)
        return hidden, unembedding(params, self.model_config).astype(hidden.dtype)

    def _compute_hidden(self, params: dict, batch: Batch, embedded_BTD=None) -> tuple[jax.Array, RowTerms | None]:
        arrays = batch.tokens, batch.segment_ids, batch.positions
        further = {"prefix": batch.prefix, "embedded_BTD": embedded_BTD}
        return compute_hidden_and_terms(params, self.model_config, *arrays, **further)

    def _project(self, params: dict, batch: Batch, hidden, terms) -> tuple[TokenLogprobs, RowTerms | None]:
        table = unembedding(params, self.model_config)
        found = compute_token_logprobs(hidden, table, batch.targets, batch.loss_mask, **self._projection)
        return found, terms

    @property
    def _projection(self) -> dict:
        """How hidden states become logits, for both objectives."""
        config = self.model_config
        return {"vocab_size": config.vocab_size, "chunk": self.chunk, "softcap": config.logits_softcap}


# --- rows of new tokens: how many, and what they start as ---


def find_new_tokens(config: Config, folder: str | os.PathLike, vocab_size: int) -> NewTokens | None:
    """The tokens that a run adds to the model in ``folder``; None where it adds none.

    Raises UserError as load_run_tokenizer does, and where a row is to start as that of a token which the model, of
    ``vocab_size`` rows, has no row for.
    """
    section = config.model.new_tokens
    if not (section.tokens or section.file):
        return None
    new = load_run_tokenizer(config, folder).new_tokens
    assert new is not None  # the section names some
    for text, ids in zip(new.texts, new.start_ids, strict=True):
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"new tokens: {text!r} is to start as the mean of tokens {list(ids)}, but the model has rows up to "
                f"{vocab_size - 1}: give it another text"
            )
    return new


def start_rows(base: dict, new: NewTokens, rows: NewRows, mesh: Mesh) -> dict:
    """float32 rows [count, D] for each table of ``base``, as ``adapter_specs`` has them: means of old rows."""
    spec = {"": ParamSpec((rows.count, shape_of(base["embed"]["embedding"])[1]), (None, "embed"))}
    sharding = named_shardings(axes_of(spec), mesh, shapes_of(spec))[""]
    skipped = new.first - rows.first  # rows before those of the tokens
    pairs = [(i + skipped, old) for i, ids in enumerate(new.start_ids) for old in ids]
    index, ids = np.asarray(pairs, np.int32).reshape(-1, 2).T
    start = jax.jit(functools.partial(_mean_rows, rows=rows), out_shardings=sharding)
    tables = [name for name in ("embed", "unembed") if name in base]
    return {name: {"new_rows": start(base[name]["embedding"], index, ids)} for name in tables}


def _mean_rows(table_VD, index, ids, *, rows: NewRows):
    """Row i is the mean of the rows ``ids[index == i]``, or of all before ``rows.first`` where there are none."""
    table_VD = as_array(table_VD, jnp.float32)
    mean = table_VD[: rows.first].mean(0)
    sums = jnp.zeros((rows.count, table_VD.shape[1])).at[index].add(table_VD[ids])
    counts = jnp.zeros((rows.count, 1)).at[index].add(1)
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), mean)


def write_rows(base: dict, started: dict, rows: NewRows) -> dict:
    """``base`` with the rows in its tables, each table in its own memory: ``base`` is used up."""

    def write(table, new):
        put = lambda table, new: jax.lax.dynamic_update_slice_in_dim(table, new.astype(table.dtype), rows.first, axis=0)
        return jax.jit(put, donate_argnums=0, out_shardings=table.sharding)(table, new)

    written = {name: {"embedding": write(base[name]["embedding"], p["new_rows"])} for name, p in started.items()}
    return base | written
