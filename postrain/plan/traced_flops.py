"""Matrix products of a traced function, counted on its jaxpr: what is really asked of the devices, recomputation too.

XLA's own count (``cost_analysis``) takes the body of a loop once, however often it runs, and the GPU compiler gives
none. A jaxpr has the length of every ``scan``.
"""

import math

from jax.extend import core


def count_traced_flops(jaxpr: core.ClosedJaxpr) -> float:
    """Operations of the matrix products in ``jaxpr``, on all devices together, 2 per multiply-add.

    Left out, so a lower bound: loops whose length depends on the data, and kernels written by hand (Pallas). Of the
    branches of a ``cond`` the dearest counts. Inside ``shard_map`` shapes are of one device and count for each.
    """
    return float(sum(_count(equation, 1) for equation in jaxpr.jaxpr.eqns))


def _count(equation, expert_ways: int) -> float:
    """``expert_ways``: devices that share the experts; each is given all assignments and multiplies its own alone."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracting)
    if name.startswith("ragged_dot"):  # every row of the left side meets one group's matrix
        return 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1] / expert_ways
    if name in ("while", "pallas_call"):
        return 0.0
    ways = params["mesh"].shape.get("expert", 1) if name == "shard_map" else expert_ways
    bodies = [sum(_count(inner, ways) for inner in body.eqns) for body in _bodies(params)]
    if not bodies:
        return 0.0
    if name == "cond":
        return max(bodies)
    return sum(bodies) * _times(name, params)


def _times(name: str, params: dict) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _bodies(params: dict) -> list[core.Jaxpr]:
    values = [item for value in params.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    closed = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in closed if isinstance(value, core.Jaxpr)]
