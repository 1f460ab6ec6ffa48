"""The shortest time that a step can take on a target, from published peaks: an upper bound for MFU.

Williams et al. 2009 (doi:10.1145/1498765.1498785), with communication as a third roof. Every term is a lower bound on
its own, and the three are taken to overlap wholly, so no run is faster; a real one is slower.
"""

import math
from collections.abc import Sequence

from jax.extend import core
from jax.sharding import Mesh

from postrain.plan.collectives import Collective
from postrain.plan.report import Bound, Flops, Memory
from postrain.plan.targets import Target


def bound_step(
    target: Target, mesh: Mesh, flops: Flops, memory: Memory, collectives: Sequence[Collective], tokens: int
) -> Bound:
    """The bound of a step of ``tokens`` on ``target``, whose chip must be one with published figures."""
    chip, peak = target.chip, target.peak_flops
    assert chip is not None and peak is not None
    # The state is read and written, frozen parameters are read, temporaries are written and read.
    twice = memory.parameters_trained + memory.optimizer + memory.average + memory.gradients + memory.activations
    moved = 2 * twice + memory.parameters_frozen + memory.batch
    links = sum(one.received for one in collectives) / chip.link_bandwidth
    network = 0.0
    if chip.network_bandwidth:
        node = [device.process_index for device in mesh.devices.flat]
        network = sum(received_from_other_nodes(one, node) for one in collectives) / chip.network_bandwidth
    seconds = {
        "compute": flops.executed / (peak * mesh.size),
        "memory": moved / chip.memory_bandwidth,
        "interconnect": max(links, network),
    }
    limit = max(seconds, key=lambda roof: seconds[roof])
    step = seconds[limit]
    mfu = flops.model / (step * peak * mesh.size)
    return Bound(seconds, moved, network, step, limit, mfu, tokens / step)


def received_from_other_nodes(one: Collective, node: Sequence[int]) -> float:
    """Bytes that each device's network adapter receives, when a node's devices share out what the node needs.

    ``node``: of each device of the mesh.
    """
    worst = 0.0
    for group in one.groups:
        nodes = {node[device] for device in group}
        if len(nodes) > 1:
            members = len(group) / len(nodes)
            if one.kind == "collective-permute":
                worst = max(worst, 1.0)
            elif one.kind == "all-to-all":  # each device's own share, from the devices of other nodes
                worst = max(worst, (len(group) - members) / len(group))
            else:
                passes = 2 if one.kind == "all-reduce" else 1
                worst = max(worst, passes * (len(nodes) - 1) / len(nodes) / members)
    return worst * one.payload * one.times


# Operations, counted on the jaxpr of the step.


def count_traced_flops(jaxpr: core.ClosedJaxpr) -> float:
    """Operations of the matrix products in ``jaxpr``, on all devices together, 2 per multiply-add.

    XLA's own count (``cost_analysis``) takes the body of a loop once, however often it runs, and the GPU compiler
    gives none. A jaxpr has the length of every ``scan``, and recomputation is in it.

    A lower bound: loops whose length depends on the data, and kernels written by hand (Pallas), are left out. A
    ``cond`` counts as its most expensive branch. Inside ``shard_map`` shapes are of one device and count for each.
    """
    return float(sum(_count_flops(equation, 1) for equation in jaxpr.jaxpr.eqns))


def _count_flops(equation: core.JaxprEqn, expert_ways: int) -> float:
    """``expert_ways``: devices that share the experts; each gets all assignments and multiplies only its own."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracting)
    if name.startswith("ragged_dot"):  # every row of the left side meets one group's matrix
        return 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1] / expert_ways
    if name in ("while", "pallas_call"):
        return 0.0
    times, ways = 1, expert_ways
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        ways = params["mesh"].shape.get("expert", 1)
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    # The jaxprs among the parameters, alone or in a tuple: the body of a loop, the branches of a cond.
    counts = []
    for value in params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            body = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body
            if isinstance(body, core.Jaxpr):
                counts.append(sum(_count_flops(inner, ways) for inner in body.eqns))
    return max(counts, default=0.0) if name == "cond" else times * sum(counts)
