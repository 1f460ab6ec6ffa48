"""From a config to the model that a run trains: which parameters train, which do not, and where they lie."""

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from postrain.checkpoint.model_fingerprint import fingerprint_model
from postrain.config import Config, LoraSection, RouterSection
from postrain.errors import UserError
from postrain.hf.config import read_config
from postrain.hf.load import load_pretrained
from postrain.models.config import LoraConfig, ModelConfig, MoeConfig
from postrain.models.params import (
    adapter_specs,
    axes_of,
    frozen_specs,
    init_lora,
    lora_specs,
    name_broken,
    num_params,
    param_specs,
    shapes_of,
)
from postrain.sharding import named_shardings
from postrain.training.new_rows import find_new_tokens, find_rows, grow_config, start_rows, write_rows


@dataclasses.dataclass
class Model:
    """A model to train. ``params`` trains, ``frozen`` does not; ``merge_params`` makes one tree of both."""

    config: ModelConfig
    params: Any  # None once a train state has taken them over
    frozen: Any
    fingerprint: dict | None = None  # of the folder, adapters and new tokens; None: the model is abstract


def load_model(config: Config, folder: str | os.PathLike, mesh: Mesh) -> Model:
    """The model of ``folder`` with what ``config.model`` says about adapters and arithmetic, laid out over ``mesh``.

    Without adapters everything trains, from float32 masters. With them the base is frozen and kept in the compute
    dtype, or quantised, and the adapters start from ``train.seed``. Rows of new tokens train beside a frozen base, else
    in their table. Raises UserError as load_pretrained and find_new_tokens do, and where a weight is not finite.
    """
    frozen = freezes_base(config)
    source = read_config(folder)
    new = find_new_tokens(config, folder, source.vocab_size)
    model_config = configure(grow_config(source, new, frozen=frozen), config, mesh)
    _, base = load_pretrained(
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
    fingerprint = fingerprint_model(folder, model_config.lora, section.new_tokens, section.quantization)
    rows = find_rows(new, source.vocab_size) if new else None
    started = start_rows(base, new, rows, mesh) if new else {}
    if not frozen:
        return Model(model_config, write_rows(base, started, rows) if new else base, {}, fingerprint)
    if model_config.lora is None:
        return Model(model_config, started, base, fingerprint)
    specs = lora_specs(model_config)
    shardings = named_shardings(axes_of(specs), mesh, shapes_of(specs))
    start = jax.jit(lambda rng, base: init_lora(model_config, rng, base), out_shardings=shardings)
    return Model(model_config, start(jax.random.key(config.train.seed), base) | started, base, fingerprint)


def freezes_base(config: Config) -> bool:
    """Whether only adapters, or the rows of new tokens, train."""
    return bool(config.model.lora.rank) or config.model.new_tokens.train_alone


def abstract_model(config: Config, folder: str | os.PathLike, mesh: Mesh) -> Model:
    """What ``load_model`` would give, as ``jax.ShapeDtypeStruct`` with shardings: config.json is read, and the
    tokenizer where new tokens are added to it; no weights.

    The devices of ``mesh`` need not exist.
    """
    source, frozen = read_config(folder), freezes_base(config)
    new = find_new_tokens(config, folder, source.vocab_size)
    model_config = configure(grow_config(source, new, frozen=frozen), config, mesh)

    def describe(specs, dtype):
        shapes = shapes_of(specs, dtype)
        place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        return jax.tree.map(place, shapes, named_shardings(axes_of(specs), mesh, shapes))

    if not frozen:
        return Model(model_config, describe(param_specs(model_config), jnp.float32), {})
    adapters = describe(adapter_specs(model_config), jnp.float32)
    return Model(model_config, adapters, describe(frozen_specs(model_config), model_config.compute_dtype))


def find_vocab_size(config: Config, folder: str | os.PathLike) -> int:
    """Ids that the model of ``folder`` has rows for, those of the config's new tokens included."""
    source = read_config(folder)
    new = find_new_tokens(config, folder, source.vocab_size)
    return grow_config(source, new, frozen=freezes_base(config)).vocab_size


def count_params(model: Model) -> tuple[int, int]:
    """How many parameters train, and how many do not; a quantised one counts as one."""
    base = num_params(shapes_of(param_specs(model.config)))
    return (num_params(model.params), base) if model.frozen else (base, 0)


def make_lora_config(section: LoraSection) -> LoraConfig | None:
    """The adapters that a config asks for, None without."""
    if not section.rank:
        return None
    own = dataclasses.asdict(section.ranks)
    ranks = tuple((target, own[target]) for target in own if own[target] not in (0, section.rank))
    return LoraConfig(section.rank, section.alpha, section.targets, ranks, section.dora)


def configure(model_config: ModelConfig, config: Config, mesh: Mesh) -> ModelConfig:
    """The model of a folder, computed as ``config.model`` says, with its adapters."""
    section, lora = config.model, make_lora_config(config.model.lora)
    if lora and lora.dora and model_config.moe and (experts := {"gate", "up", "down"} & set(lora.targets)):
        raise UserError(
            f"config key 'model.lora.dora': experts have no magnitudes, found targets {', '.join(sorted(experts))}: "
            "leave them out of 'model.lora.targets', or set dora to False"
        )
    if section.quantization == "nf4" and model_config.embed_size % 2:
        raise UserError(
            f"config key 'model.quantization' = 'nf4' packs two numbers in a byte, but the model's hidden size is "
            f"{model_config.embed_size}: use 'int8'"
        )
    ways, heads, num_kv = mesh.shape["tensor"], model_config.num_heads, model_config.num_kv_heads
    if heads % math.lcm(num_kv, ways):  # key heads are repeated until they divide
        raise UserError(
            f"config key 'mesh.tensor' = {ways}: {heads} heads over {num_kv} key heads do not divide over it: give it "
            f"a divisor of {heads}"
        )
    return dataclasses.replace(
        model_config,
        compute_dtype=choose_compute_dtype(section.compute_dtype, mesh),
        fp8=section.fp8,
        remat=section.remat,
        attention=section.attention,
        attention_chunk=section.attention_chunk,
        lora=lora,
        quantization=section.quantization,
        moe=_configure_routers(model_config.moe, section.router),
    )


def _configure_routers(moe: MoeConfig | None, section: RouterSection) -> MoeConfig | None:
    if moe is not None:
        return dataclasses.replace(moe, **dataclasses.asdict(section))
    asked = [name for name in ("load_balance_coef", "z_coef") if getattr(section, name)]
    if asked:
        raise UserError(f"config key 'model.router.{asked[0]}': the model has no experts, so no router: leave it at 0")
    return None


def choose_compute_dtype(name: str, mesh: Mesh | None = None) -> str:
    """ "auto" is bfloat16 on accelerators; on a CPU it gains nothing. Without a mesh: on what this process has."""
    if name != "auto":
        return name
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "float32" if platform == "cpu" else "bfloat16"
