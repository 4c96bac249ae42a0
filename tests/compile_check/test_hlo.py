"""Texts are cut from what libtpu 0.0.42 compiled for v5e, and JAX 0.10.2 for an H100, without
metadata."""

import pytest

from jaxlm.compile_check.hlo import Collective, num_bytes, parse, replica_group, totals

LOOP = """
HloModule jit_inside, is_scheduled=true, num_partitions=16

%body.sunk (wide.param: (s32[], bf16[32,256])) -> (s32[], bf16[32,256]) {
  %wide.param = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %convert = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param), index=1
  %all-gather.249 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%convert), channel_id=9, replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0'}, dimensions={0}, use_global_device_ids=true
  ROOT %tuple = (s32[]{:T(128)}, bf16[32,256]{1,0}) tuple(%convert, %convert)
}

%condition (wide.param.1: (s32[], bf16[32,256])) -> pred[] {
  %constant.1193 = s32[]{:T(128)} constant(4)
  %wide.param.1 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.3488 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.133 = pred[]{:T(512)} compare(%get-tuple-element.3488, %constant.1193), direction=LT
}

ENTRY %main.1 (param: (s32[], bf16[32,256])) -> bf16[32,256] {
  %param = (s32[], bf16[32,256]{1,0}) parameter(0)
  %while.125 = (s32[]{:T(128)}, /*index=1*/bf16[32,256]{1,0}) while(%param), condition=%condition, body=%body.sunk
  ROOT %gte = bf16[32,256]{1,0} get-tuple-element(%while.125), index=1
}
"""  # noqa: E501
GATHERED = Collective(
    "all-gather", 32 * 256 * 2, tuple(range(0, 8)), count=4, overlaps=False, over_slices=False
)


def test_what_a_loop_sends_counts_as_often_as_it_runs():
    assert parse(LOOP) == ((GATHERED,), 0)
    # Controls: another bound; what the compiler says itself; and a bound that cannot be read.
    assert parse(LOOP.replace("constant(4)", "constant(12)")).collectives[0].count == 12
    known = 'body=%body.sunk, backend_config={"known_trip_count":{"n":"7"}}'
    assert parse(LOOP.replace("body=%body.sunk", known)).collectives[0].count == 7
    unread = parse(LOOP.replace("constant(4)", "copy(%elsewhere)"))
    assert (unread.collectives[0].count, unread.num_unknown_loops) == (1, 1)


def test_loops_inside_loops_multiply():
    outer = LOOP.replace("%main.1 (param", "%inner (param").replace("ENTRY ", "")
    text = (
        outer
        + """
ENTRY %main (x: (s32[], bf16[32,256])) -> (s32[], bf16[32,256]) {
  %x = (s32[], bf16[32,256]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[32,256]{1,0}) while(%x), condition=%condition, body=%inner
}
"""
    )
    assert [each.count for each in parse(text).collectives] == [16]


SCATTER = """
HloModule jit_inside

%all-reduce-scatter.clone.1 (input.19: f32[256,256]) -> f32[32,256] {
  %input.19 = f32[256,256]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.111 = f32[256,256]{1,0:T(8,128)} all-reduce(%input.19), channel_id=31, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, use_global_device_ids=true, to_apply=%add.1.clone, frontend_attributes={from-cross-replica-sharding="true"}
  %multiply.311 = u32[]{:T(128)} multiply(%bitcast.764, %constant.3407)
  ROOT %dynamic-slice.564 = f32[32,256]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.111, %multiply.311, %constant.3408), dynamic_slice_sizes={32,256}
}

ENTRY %main (a: f32[256,256], b: f32[1,1024]) -> f32[32,256] {
  %a = f32[256,256]{1,0} parameter(0)
  %b = f32[1,1024]{1,0} parameter(1)
  %all-reduce.113 = (f32[1,1024]{1,0:T(1,128)S(1)}, f32[256,256]{1,0}) all-reduce(%b, %a), channel_id=47, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %fusion.746 = f32[32,256]{1,0:T(8,128)S(1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.clone.1
}
"""  # noqa: E501


def test_a_fused_reduce_scatter_is_told_from_an_all_reduce():
    kinds = {kind: own for kind, own in totals(parse(SCATTER).collectives)}
    assert kinds.keys() == {"reduce-scatter", "all-reduce"}
    assert kinds["reduce-scatter"][0].operand_bytes == 256 * 256 * 4
    assert kinds["reduce-scatter"][0].group == tuple(range(8))
    assert kinds["all-reduce"][0].operand_bytes == 4 * (1024 + 256 * 256)
    # The control: elsewhere the same instruction is an all-reduce.
    plain = SCATTER.replace("all-reduce-scatter.clone.1", "fused_computation.1")
    assert [kind for kind, _ in totals(parse(plain).collectives)] == ["all-reduce"]


ASYNCHRONOUS = """
HloModule jit_inside

%fused_computation.1132 (param_0.4085: bf16[1,1024,32]) -> (bf16[1,1024,32], bf16[1,1024,256]) {
  %param_0.4085 = bf16[1,1024,32]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.136 = bf16[1,1024,256]{1,2,0:T(8,128)(2,1)} all-gather(%param_0.4085), channel_id=113, replica_groups={{0,1},{2,3}}, dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="4"}
  ROOT %custom-call.70 = (bf16[1,1024,32]{1,2,0}, bf16[1,1024,256]{1,2,0}) custom-call(%all-gather.136), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.792 (param_0.4089: bf16[1,1024,32], param_1: bf16[1,1024,256]) -> (bf16[1,1024,32], bf16[1,1024,256]) {
  %param_0.4089 = bf16[1,1024,32]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.138 = bf16[1,1024,256]{1,2,0:T(8,128)(2,1)S(1)} all-gather(%param_0.4089), channel_id=113, replica_groups={{0,1},{2,3}}, dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="4"}
  ROOT %tuple.350 = (bf16[1,1024,32]{1,2,0}, bf16[1,1024,256]{1,2,0}) tuple(%param_0.4089, %all-gather.138)
}

%fused_computation.1134 (param_0.4095: bf16[1,1024,32], param_1.5232: bf16[1,1024,256]) -> bf16[1,1024,256] {
  %param_0.4095 = bf16[1,1024,32]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.140 = bf16[1,1024,256]{1,2,0:T(8,128)(2,1)} all-gather(%param_0.4095), channel_id=113, replica_groups={{0,1},{2,3}}, dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="4"}
  ROOT %custom-call.72 = bf16[1,1024,256]{1,2,0} custom-call(%param_0.4095, %param_1.5232, %all-gather.140), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[1,1024,32]) -> bf16[1,1024,256] {
  %x = bf16[1,1024,32]{1,2,0} parameter(0)
  %async-collective-start = (bf16[1,1024,32]{1,2,0}, bf16[1,1024,256]{1,2,0}) fusion(%x), kind=kCustom, calls=%fused_computation.1132
  %fusion.758 = (bf16[1,1024,32]{1,2,0}, bf16[1,1024,256]{1,2,0}) fusion(%x, %x), kind=kOutput, calls=%async_collective_fusion.792
  ROOT %async-collective-done = bf16[1,1024,256]{1,2,0} fusion(%x, %x), kind=kCustom, calls=%fused_computation.1134
}
"""  # noqa: E501


def test_what_runs_beside_computation_counts_once():
    (found,) = parse(ASYNCHRONOUS).collectives
    assert found == Collective("all-gather", 1024 * 32 * 2, (0, 1), 1, True, False)
    # The control: it stands there three times.
    assert len(parse(ASYNCHRONOUS.replace("chain_id", "other")).collectives) == 3


MORE = """
HloModule jit_inside

ENTRY %main (x: u32[2,1], y: f32[1,1,128]) -> u32[2,1] {
  %x = u32[2,1]{1,0:T(2,128)} parameter(0)
  %y = f32[1,1,128]{2,1,0:T(1,128)} parameter(1)
  %after-all.3 = token[] after-all()
  %send = (u32[2,1]{1,0:T(2,128)}, u32[], token[]) send(%x, %after-all.3), channel_id=10, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="collective-permute.17_0",_xla_megascale_target={{100001->200000}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %recv = (u32[2,1]{1,0:T(2,128)}, u32[], token[]) recv(%after-all.3), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ONE_TO_ONE"}
  %send-done = token[] send-done(%send), channel_id=10, is_host_transfer=true
  %send.3 = (f32[1,1,128]{2,1,0:T(1,128)}, u32[], token[]) send(%y, %after-all.3), channel_id=14, is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %collective-permute-start = (u32[2,1]{0,1:T(1,128)S(1)}, u32[2,1]{0,1:T(1,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=53, source_target_pairs={{0,1},{1,0}}
  ROOT %collective-permute-done = u32[2,1]{0,1:T(1,128)S(1)} collective-permute-done(%collective-permute-start)
}
"""  # noqa: E501


def test_what_goes_to_other_slices_and_permutes():
    assert parse(MORE).collectives == (
        Collective("collective-permute", 8, (), 1, True, True),
        Collective("all-reduce", 512, (), 1, True, True),
        Collective("collective-permute", 8, (0, 1), 1, True, False),
    )


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, use_global", (0, 2)),
        ("replica_groups=[8,2]<=[16], x", (0, 1)),
        ("replica_groups=[4,4]<=[4,2,2]T(2,1,0), x", (0, 4, 8, 12)),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}, x", (0, 2, 4, 6, 8, 10, 12, 14)),
        ("replica_groups=mesh['a'=16,'b'=1,'c'=1] {'a','b'}, x", tuple(range(16))),
        (
            "replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'c'}, x={1}",
            (0, 8),
        ),
        ("no groups", ()),
    ],
)
def test_groups_in_every_notation(text, group):
    assert replica_group(text) == group


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[1,2,3]{2,1,0:T(8,128)}", 24),
        ("(bf16[8]{0:T(256)(128)(2,1)S(1)}, pred[3], u32[]{:S(2)}, token[])", 23),
        ("s4[8]", 4),
        ("f8e4m3fn[8]", 8),
    ],
)
def test_bytes(shape, size):
    assert num_bytes(shape) == size


GPU = """
ENTRY %main (a: f32[16384]) -> f32[16384] {
  %a = f32[16384]{0} parameter(0)
  %all-reduce-start = f32[16384]{0} all-reduce-start(%a), channel_id=15, replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_2'}, use_global_device_ids=true, to_apply=%add.1.clone, backend_config={"operation_queue_id":"0","collective_backend_config":{"is_sync":false,"backend":"DEFAULT"}}
  ROOT %all-reduce-done = f32[16384]{0} all-reduce-done(%all-reduce-start)
}
"""  # noqa: E501


@pytest.mark.parametrize("waits", [False, True])
def test_on_gpus_what_is_started_may_still_be_waited_for(waits):
    text = GPU.replace("false", str(waits).lower())
    expected = Collective("all-reduce", 65_536, (0, 8), 1, not waits, over_slices=False)
    assert parse(text).collectives == (expected,)
