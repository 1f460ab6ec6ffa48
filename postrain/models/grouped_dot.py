"""Grouped matrix products: rows sorted by group, each group's rows times that group's matrix.

Two back ends (``select_backend`` says which one runs):

- "ragged_dot": ``jax.lax.ragged_dot``, which TPUs have a kernel for. Only there: XLA for CPU and GPU expands it to a
  dense product with every group's matrix, G times the work and (on GPU) the memory. For the matrices' gradient XLA
  does so on TPU too; that one is the Pallas kernel ``tgmm`` that comes with jax (MegaBlocks, arXiv:2211.15841).
- "blocks": a loop over blocks of consecutive rows of one group, each a plain matrix product. Where a block reaches
  into the next group's rows, the blocks of that group come later and overwrite it: no row is moved or padded.

Legend: M rows, G groups, I and O the sizes in and out.
"""

import functools

import jax
import jax.numpy as jnp

from postrain.models.config import accumulation_dtype
from postrain.models.quantized import dequantize, is_quantized, shape_of
from postrain.sharding import current_platform

BACKENDS = ("ragged_dot", "blocks")


def select_backend(name: str) -> str:
    """The back end that a config asks for; "auto" goes by the platform of the devices that the program is for.

    Raises ValueError for an unknown name.
    """
    if name == "auto":
        return "ragged_dot" if current_platform() == "tpu" else "blocks"
    if name not in BACKENDS:
        raise ValueError(f"grouped_dot back end {name!r}: expected one of auto, {', '.join(BACKENDS)}")
    return name


def grouped_dot(x_MI, w_GIO, group_sizes_G, backend: str):
    """Rows of group g times ``w_GIO[g]``, [M, O] in x's dtype; sums in its ``accumulation_dtype``.

    The first ``group_sizes_G[0]`` rows are group 0's and so on (int32, 0 allowed). Rows past the last group give 0
    and cost next to nothing. ``backend``: of BACKENDS. ``w_GIO`` may be quantised, and then has no gradient: blocks
    dequantise one group's matrix at a time, "ragged_dot" all of them.
    """
    product = _quantized_grouped_dot if is_quantized(w_GIO) else _grouped_dot
    return product(x_MI, w_GIO, group_sizes_G, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_dot(x_MI, w_GIO, group_sizes_G, backend):
    return _rows_times_groups(x_MI, w_GIO, group_sizes_G, backend, transpose=False)


def _grouped_dot_forward(x_MI, w_GIO, group_sizes_G, backend):
    return _grouped_dot(x_MI, w_GIO, group_sizes_G, backend), (x_MI, w_GIO, group_sizes_G)


def _grouped_dot_backward(backend, residuals, grad_MO):
    x_MI, w_GIO, group_sizes_G = residuals
    grad_x = _rows_times_groups(grad_MO, w_GIO, group_sizes_G, backend, transpose=True)
    product = _kernel_gradient if backend == "ragged_dot" else _blocks_gradient
    return grad_x, product(x_MI, grad_MO, group_sizes_G, w_GIO.dtype), None


_grouped_dot.defvjp(_grouped_dot_forward, _grouped_dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantized_grouped_dot(x_MI, w_GIO, group_sizes_G, backend):
    return _rows_times_groups(x_MI, w_GIO, group_sizes_G, backend, transpose=False)


def _quantized_grouped_dot_forward(x_MI, w_GIO, group_sizes_G, backend):
    return _quantized_grouped_dot(x_MI, w_GIO, group_sizes_G, backend), (w_GIO, group_sizes_G)


def _quantized_grouped_dot_backward(backend, residuals, grad_MO):
    return _rows_times_groups(grad_MO, *residuals, backend, transpose=True), None, None


_quantized_grouped_dot.defvjp(_quantized_grouped_dot_forward, _quantized_grouped_dot_backward)


def _rows_times_groups(x_MI, w_GIO, group_sizes_G, backend, *, transpose: bool):
    """Group g's rows times w[g], or times its transpose (then x is [M, O] and the result [M, I])."""
    if backend == "blocks":
        out = _blocks_times_groups(x_MI, w_GIO, group_sizes_G, transpose)
    else:
        w = dequantize(w_GIO, x_MI.dtype) if is_quantized(w_GIO) else w_GIO
        w = w.swapaxes(1, 2) if transpose else w
        out = jax.lax.ragged_dot(x_MI, w, group_sizes_G, preferred_element_type=accumulation_dtype(x_MI.dtype)).astype(
            x_MI.dtype
        )
    return jnp.where(jnp.arange(x_MI.shape[0])[:, None] < group_sizes_G.sum(), out, 0)


def _block_size(num_rows: int, num_groups: int) -> int:
    """Rows of a block, a power of two: at most half of an average group, so that little of a block is of another."""
    # On CPU more than 128 rows gain nothing; an accelerator is to have fewer and larger products to start.
    smallest, largest = 8, 128 if current_platform() == "cpu" else 512
    half = num_rows // (2 * num_groups)
    return min(largest, max(smallest, 1 << max(half.bit_length() - 1, 0)))


def _blocks_times_groups(x_MI, w_GIO, group_sizes_G, transpose: bool):
    shape, num_rows = shape_of(w_GIO), x_MI.shape[0]
    block = _block_size(num_rows, shape[0])
    # Group and first row of every block, in order, and how many blocks there are (the rest is filling).
    blocks_G = -(-group_sizes_G // block)
    ends_G, starts_G = jnp.cumsum(blocks_G), jnp.cumsum(group_sizes_G) - group_sizes_G
    index = jnp.arange(num_rows // block + group_sizes_G.size, dtype=jnp.int32)  # as many as there can be
    group = jnp.minimum(jnp.searchsorted(ends_G, index, side="right"), group_sizes_G.size - 1)
    start, count = starts_G[group] + (index - (ends_G - blocks_G)[group]) * block, ends_G[-1]
    x = jnp.pad(x_MI, ((0, block), (0, 0)))  # the last blocks may reach past the end
    contract = ((1,), (1 if transpose else 0,)), ((), ())

    def step(i, out):
        w = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group[i], keepdims=False), w_GIO)
        w = dequantize(w, x.dtype) if is_quantized(w) else w
        rows = jax.lax.dynamic_slice_in_dim(x, start[i], block)
        product = jax.lax.dot_general(rows, w, contract, preferred_element_type=accumulation_dtype(x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start[i], 0)

    out = jnp.zeros((num_rows + block, shape[1 if transpose else 2]), x_MI.dtype)
    return jax.lax.fori_loop(0, count, step, out)[:num_rows]


def _blocks_gradient(x_MI, grad_MO, group_sizes_G, dtype):
    """x_g^T grad_g of every group g, [G, I, O]."""
    block = _block_size(x_MI.shape[0], group_sizes_G.size)
    x, grad = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_MI, grad_MO))
    starts_G = jnp.cumsum(group_sizes_G) - group_sizes_G
    offsets = jnp.arange(block, dtype=jnp.int32)[:, None]
    contract, wide = (((0,), (0,)), ((), ())), accumulation_dtype(x.dtype)

    def group(operands):
        start, size = operands

        def step(j, total):
            rows, grads = (jax.lax.dynamic_slice_in_dim(y, start + j * block, block) for y in (x, grad))
            rows = jnp.where(j * block + offsets < size, rows, 0)
            return total + jax.lax.dot_general(rows, grads, contract, preferred_element_type=wide)

        zeros = jnp.zeros((x.shape[1], grad.shape[1]), wide)
        return jax.lax.fori_loop(0, -(-size // block), step, zeros).astype(dtype)

    return jax.lax.map(group, (starts_G, group_sizes_G))


def _kernel_gradient(x_MI, grad_MO, group_sizes_G, dtype):
    """x_g^T grad_g of every group g, [G, I, O]: the Pallas kernel where the program is for TPUs."""

    def dense(x_MI, grad_MO, group_sizes_G):
        dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        wide = accumulation_dtype(x_MI.dtype)
        out = jax.lax.ragged_dot_general(x_MI, grad_MO, group_sizes_G, dims, preferred_element_type=wide)
        return out.astype(dtype)

    kernel = functools.partial(_pallas_gradient, dtype=dtype)
    return jax.lax.platform_dependent(x_MI, grad_MO, group_sizes_G, tpu=kernel, default=dense)


def _pallas_gradient(x_MI, grad_MO, group_sizes_G, dtype, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # only where it is needed: Pallas imports slowly

    tile = lambda size, largest: min(largest, -(-size // 128) * 128)
    rows, largest = tile(x_MI.shape[0], 512), 2048 // x_MI.dtype.itemsize  # what fits on chip, twice, beside the sum
    x, grad = (jnp.pad(y, ((0, -y.shape[0] % rows), (0, 0))) for y in (x_MI, grad_MO))
    tiling = rows, tile(x.shape[1], largest), tile(grad.shape[1], largest)
    return tgmm(x.swapaxes(0, 1), grad, group_sizes_G, dtype, tiling, interpret=interpret)
