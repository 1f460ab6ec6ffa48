"""The shortest time that a step can take on a target, from published peaks: an upper bound for MFU.

Williams et al. 2009 (doi:10.1145/1498765.1498785), with communication as a third roof. Every term is a lower bound on
its own, and the three are taken to overlap wholly, so no run is faster; a real one is slower.
"""

from collections.abc import Sequence

from jax.sharding import Mesh

from postrain.plan.collectives import Collective
from postrain.plan.targets import Target


def bound_step(
    target: Target, mesh: Mesh, flops: dict, memory: dict, collectives: Sequence[Collective], tokens: int
) -> dict:
    """Seconds of each roof, which one is the lowest, and what MFU and tokens per second it leaves."""
    chip, peak = target.chip, target.peak_flops * mesh.size
    # The state is read and written, what does not change is read, what is made on the way is written and read.
    twice = ("parameters_trained", "optimizer", "average", "gradients", "activations")
    moved = 2 * sum(memory[kind] for kind in twice) + memory["parameters_frozen"] + memory["batch"]
    links = sum(one.received for one in collectives) / chip.link_bandwidth
    network = 0.0
    if chip.network_bandwidth:
        node = [device.process_index for device in mesh.devices.flat]
        network = sum(received_from_other_nodes(one, node) for one in collectives) / chip.network_bandwidth
    seconds = {
        "compute": flops["executed"] / peak,
        "memory": moved / chip.memory_bandwidth,
        "interconnect": max(links, network),
    }
    step = max(seconds.values())
    return {
        "seconds": seconds,
        "memory_bytes_moved": moved,
        "network_seconds": network,
        "step_seconds": step,
        "limited_by": max(seconds, key=seconds.get),
        "mfu": flops["model"] / (step * peak),
        "tokens_per_second": tokens / step,
    }


def received_from_other_nodes(one: Collective, node: Sequence[int]) -> float:
    """Bytes that each device's network adapter has to take in, when a node's devices share out what the node needs."""
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
