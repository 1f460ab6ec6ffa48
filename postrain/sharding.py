"""Which device holds what: the mesh, and one table from logical axis names to mesh axes.

Every parameter has a tuple of logical names beside it (``postrain.models.params.logical_axes``), every
activation that is worth pinning is named by ``constrain``. To change how a model is laid out, edit the
tables; nothing else in the library knows about devices. All axes are ``AxisType.Auto``: XLA's partitioner
(GSPMD, Xu et al. 2021, arXiv:2105.04663) places the communication.
"""

import contextlib
import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from postrain.config import MeshConfig
from postrain.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")
# Rows of a batch are split over all of these: fsdp is data parallelism with split weights, and so is expert outside the
# layers that have experts (as in GShard, arXiv:2006.16668): its devices would else all compute the same.
BATCH_AXES = ("data", "fsdp", "expert")

PARAM_RULES = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",  # the N*H columns of a projection onto the query heads
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "norm": None,
}
ACTIVATION_RULES = {
    "batch": BATCH_AXES,
    "sequence": "sequence",
    "embed_act": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over ``devices`` (default: all of them) with the axes of ``MESH_AXES``.

    At most one axis of ``config`` may be -1: the devices that the others leave. Axes that the config
    does not have are 1. Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: int(getattr(config, axis, 1)) for axis in MESH_AXES}
    layout = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh: every axis must be at least 1 and one at most may be -1, found {layout}: set mesh.*")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        if free:
            layout = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
            advice = f"sizes whose product divides it (mesh.{free[0]} = -1 takes what is left)"
        else:
            advice = "one axis to -1, or sizes whose product is that number"
        raise UserError(f"mesh: {layout} does not divide into {len(devices)} devices: set {advice}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def format_mesh(mesh: Mesh) -> str:
    """``"8 devices (cpu): fsdp=4 x tensor=2"``."""
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return f"{mesh.size} device{'s' * (mesh.size > 1)} ({mesh.devices.flat[0].device_kind}): {sizes}"


def _is_names(leaf) -> bool:
    return leaf is None or isinstance(leaf, tuple)


def _partition(names, rules: dict, mesh_shape, shape=None) -> tuple[PartitionSpec, list[int]]:
    """Mesh axes of each dimension, and the dimensions left whole because the axes do not divide them."""
    spec, left_whole, used = [], [], set()
    for i, name in enumerate(names or ()):
        axes = rules[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else (axes or ())
        axes = tuple(axis for axis in axes if axis not in used)  # an array dimension each, the first one wins
        if shape is not None and shape[i] % math.prod(mesh_shape[axis] for axis in axes):
            left_whole.append(i)
            axes = ()
        used.update(axes)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    while spec and spec[-1] is None:
        spec.pop()  # P("fsdp", None) and P("fsdp") mean the same and do not compare equal
    return PartitionSpec(*spec), left_whole


def named_shardings(logical_axes_tree, mesh: Mesh, shapes_tree=None):
    """Logical axis names of every parameter -> the NamedSharding of each.

    ``logical_axes_tree``: nested dict whose leaves are a tuple of logical names (None: not split), or None
    for a replicated leaf. ``shapes_tree``: the same tree of arrays or ``jax.ShapeDtypeStruct``; with it, a
    dimension that its mesh axis does not divide is replicated (``undivided_dimensions`` says which).
    """

    def sharding(names, array=None):
        spec, _ = _partition(names, PARAM_RULES, mesh.shape, None if array is None else array.shape)
        return NamedSharding(mesh, spec)

    trees = (logical_axes_tree,) if shapes_tree is None else (logical_axes_tree, shapes_tree)
    return jax.tree.map(sharding, *trees, is_leaf=_is_names)


def undivided_dimensions(logical_axes_tree, mesh: Mesh, shapes_tree) -> list[str]:
    """One line for each parameter dimension that stays whole because its mesh axis does not divide it."""
    lines = []

    def visit(path, names, array):
        for i in _partition(names, PARAM_RULES, mesh.shape, array.shape)[1]:
            axis, where = PARAM_RULES[names[i]], jax.tree_util.keystr(path, simple=True, separator=".")
            lines.append(f"{where}: {names[i]}={array.shape[i]} is not a multiple of {axis}={mesh.shape[axis]}, whole")

    jax.tree_util.tree_map_with_path(visit, logical_axes_tree, shapes_tree, is_leaf=_is_names)
    return lines


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over ``BATCH_AXES``, everything else whole; rows come after ``leading`` other dimensions.

    Positions are whole on all devices of ``sequence``: a few bytes each, of which the model takes each device's part.
    """
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def num_row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into: the batch size must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def data_process(mesh: Mesh) -> tuple[int, int]:
    """``(process_index, process_count)`` for the data pipeline of this host.

    Hosts that hold the same rows (a tensor axis that spans hosts) get the same index, so that each loads
    exactly the rows its own devices need. Raises UserError when a host's rows are not one even block.
    """
    shards = num_row_shards(mesh)
    index_map = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    blocks = sorted({index[0].indices(shards)[0] for index in index_map.values()})
    count, index = shards // len(blocks), blocks[0] // len(blocks)
    if blocks != list(range(index * len(blocks), (index + 1) * len(blocks))):
        raise UserError(f"mesh: host {jax.process_index()} holds row blocks {blocks}: put `data` across hosts")
    return index, count


def make_global_batch(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows ``[B_local, ...]`` -> global arrays ``[B, ...]``, rows over ``BATCH_AXES``.

    The hosts' rows are put one after another in the order of ``data_process``. Raises UserError when the
    rows do not divide over this host's devices.
    """
    sharding, (_, count) = batch_sharding(mesh), data_process(mesh)
    local_shards = num_row_shards(mesh) // count
    for name, array in arrays.items():
        if array.shape[0] % local_shards:
            needed = f"data.batch_size must be a multiple of {' x '.join(BATCH_AXES)} = {num_row_shards(mesh)}"
            raise UserError(f"{needed}: found {array.shape[0]} rows of {name} for {local_shards} parts on this host")
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (array.shape[0] * count, *array.shape[1:]))
        for name, array in arrays.items()
    }


def to_host(array) -> np.ndarray:
    """The whole of ``array`` as a numpy array in every process, wherever its parts are.

    The only way from a ``jax.Array`` to Python in this library (tests/test_to_host.py): ``np.asarray`` and ``float``
    raise on an array whose parts lie on devices of other processes. Such an array is gathered, so every process must
    call this at the same point. Other values, numpy arrays and numbers, are returned as ``np.asarray`` returns them.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def mesh_context(mesh: Mesh | None):
    """Inside a jitted function: what ``constrain`` and the layers that are mapped by hand see as the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def find_mesh(params) -> Mesh | None:
    """The mesh that the parameters are spread over, None for one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def current_platform() -> str:
    """ "cpu", "gpu" or "tpu": what is being traced for, which need not be what this process runs on (`postrain plan`).

    The mesh that the train step (or ``jax.set_mesh``) sets knows its devices; without one, the default back end.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gpu_capability() -> float:
    """NVIDIA's compute capability of this process's GPUs; 0 for other vendors', infinite where there are none here."""
    if jax.default_backend() != "gpu":
        return math.inf  # what is compiled for GPUs elsewhere is for new ones
    stated = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(stated) if stated.replace(".", "", 1).isdigit() else 0.0


def splits_positions() -> bool:
    """Whether the mesh that is traced for splits the positions of a row."""
    return jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Pin an activation by logical names, one for each dimension, e.g. ``("batch", "sequence", "mlp")``.

    Under the mesh that the train step (or ``jax.set_mesh``) sets; without a mesh, or on a single device,
    ``x`` itself. A dimension that its mesh axes do not divide is left to the partitioner.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"constrain: {len(names)} names {names} for an array of shape {x.shape}")
    spec, left_whole = _partition(names, ACTIVATION_RULES, mesh.shape, x.shape)
    axes = (*spec, *(None,) * (x.ndim - len(spec)))
    free = [PartitionSpec.UNCONSTRAINED if i in left_whole else axes[i] for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))
