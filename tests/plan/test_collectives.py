"""Reading collectives off HLO text: loops, groups, the forms that each compiler writes. Small modules, by hand."""

import numpy as np
import pytest

from postrain.plan.collectives import Collective, read_collectives
from postrain.plan.roofline import received_from_other_nodes

LOOP = """HloModule step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p = (s32[], bf16[4,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,128]{1,0} get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %all-gather.1 = bf16[16,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %all-reduce.1 = (f32[10]{0}, f32[2,3]{1,0}) all-reduce(%y, %z), channel_id=2, replica_groups={}, to_apply=%add
  %y = f32[10]{0} constant({...})
  %z = f32[2,3]{1,0} constant({...})
  ROOT %out = (s32[], bf16[4,128]{1,0}) tuple(%next, %x)
}

%cond (q: (s32[], bf16[4,128])) -> pred[] {
  %q = (s32[], bf16[4,128]{1,0}) parameter(0)
  %limit = s32[] constant(12)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, LIMIT), direction=LT
}

%outer (r: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %r = (s32[], bf16[4,128]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[4,128]{1,0}) while(%r), condition=%cond, body=%innerANNOTATION
}

ENTRY %main (s: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %s = (s32[], bf16[4,128]{1,0}) parameter(0)
  ROOT %while.2 = (s32[], bf16[4,128]{1,0}) while(%s), condition=%c, body=%outer, known_trip_count":{"n":"3"}
}
"""


@pytest.mark.parametrize(
    ("step", "limit", "annotation", "trips", "unknown"),
    [
        (1, "%limit", "", 12, 0),  # as the TPU compiler writes it
        (5, "%limit", "", 3, 0),  # unrolled: the counter goes on by 5
        (1, "%limit", ', backend_config={"known_trip_count":{"n":"7"}}', 7, 0),  # as CPU and GPU compilers do
        (1, "%other", "", 1, 2),  # against something that the data decide
    ],
)
def test_loops_multiply(step, limit, annotation, trips, unknown):
    text = LOOP.replace("STEP", str(step)).replace("LIMIT", limit).replace("ANNOTATION", annotation)
    (gather, reduce), found_unknown = read_collectives(text, 8)
    assert (gather.kind, gather.payload, gather.times) == ("all-gather", 16 * 128 * 2, 3 * trips)
    assert gather.groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and gather.received == 3 * trips * 4096 * 3 / 4
    assert (reduce.kind, reduce.payload, reduce.group_size) == ("all-reduce", 4 * 16, 8)
    assert reduce.received == 3 * trips * 2 * 64 * 7 / 8
    assert found_unknown == unknown


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4,'b'=1] {'a':(1)2}", ((0, 2), (1, 3))),  # the larger half of an axis of four
        ("mesh['a'=4,'b'=1] {'a':(2)2}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3),)),
    ],
)
def test_every_form_of_groups_is_read(groups, expected):
    [one], _ = read_collectives(module(f"f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}"), 4)
    assert one.groups == expected


def module(*instructions):
    lines = "\n".join(f"  %r{i} = {instruction}" for i, instruction in enumerate(instructions))
    return f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{lines}\n}}\n"


def test_every_kind_counts_what_a_device_receives():
    text = module(
        "(f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}",
        "f32[32]{0} all-gather-done(%r0)",
        "f32[2]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add",
        "f32[8]{0} all-to-all(%x), replica_groups=[1,4]<=[4], dimensions={0}",
        "f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
        "f32[8]{0} all-reduce(%x), replica_groups=[4,1]<=[4], to_apply=%add",
        "f32[8]{0} add(%x, %x)",
    )
    found, unknown = read_collectives(text, 4)
    assert [(one.kind, one.received) for one in found] == [
        ("all-gather", 128 * 3 / 4),
        ("reduce-scatter", 32 * 3 / 4),
        ("all-to-all", 32 * 3 / 4),
        ("collective-permute", 32),
    ], "a start with its done is one, a group of one device sends nothing"
    assert unknown == 0


TPU = """HloModule m

%start (p: bf16[8]) -> bf16[32] {
  %p = bf16[8]{0} parameter(0)
  %all-gather.1 = bf16[32]{0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], chain_id="1"
  ROOT %call = bf16[32]{0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p.1: bf16[8]) -> bf16[32] {
  %p.1 = bf16[8]{0} parameter(0)
  ROOT %all-gather.2 = bf16[32]{0} all-gather(%p.1), channel_id=5, replica_groups=[1,4]<=[4], chain_id="1"
}

%all-reduce-scatter.1 (p.2: f32[8]) -> f32[2] {
  %p.2 = f32[8]{0} parameter(0)
  %all-reduce.1 = f32[8]{0} all-reduce(%p.2), channel_id=6, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[2]{0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={2}
}

ENTRY %main (x: bf16[8], y: f32[8]) -> f32[2] {
  %x = bf16[8]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %fusion.1 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%meanwhile
  ROOT %fusion.3 = f32[2]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_tpu_compilers_fusions_count_once_and_by_what_they_do():
    found, _ = read_collectives(TPU, 4)
    assert [(one.kind, one.payload) for one in found] == [("all-gather", 64), ("reduce-scatter", 32)]


def test_bytes_between_nodes_are_shared_by_a_nodes_adapters():
    node = np.repeat([0, 1], 4)  # two nodes of four
    everywhere, inside = (tuple(range(8)),), ((0, 1, 2, 3), (4, 5, 6, 7))
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    received = lambda kind, groups: received_from_other_nodes(Collective(kind, 800, groups, 10), node)
    assert received("all-gather", everywhere) == 10 * 800 / 2 / 4, "half of it, a quarter through each adapter"
    assert received("all-reduce", everywhere) == 2 * received("reduce-scatter", everywhere) == 10 * 800 / 4
    assert received("all-gather", pairs) == 10 * 800 / 2, "each device alone in its group"
    assert received("all-to-all", everywhere) == 10 * 800 / 2
    assert received("collective-permute", ((0, 1), (3, 4))) == 10 * 800
    assert received("all-gather", inside) == received("collective-permute", ((0, 1),)) == 0
