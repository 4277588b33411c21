"""The text of a compiled program, read: loops, exchanges, cycles. By hand, in XLA's own form."""
# ruff: noqa: E501

import pytest

from pangu_tiny.planning.collectives import Placed
from pangu_tiny.planning.estimate import collectives_table, estimate, run_cost, seconds_by_part
from pangu_tiny.planning.hlo import Array, arrays_of, parse
from pangu_tiny.planning.loops import trip_count, unknown
from pangu_tiny.planning.schedule import read_schedule
from pangu_tiny.topology.slices import parse_slice

TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %gather-start = (bf16[8,8]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}
  %product = bf16[8,128]{1,0} fusion(%x), kind=kOutput, calls=%called, metadata={op_name="jit(step)/Decoder/blocks/ffn/dot_general"}, backend_config={"estimated_cycles":"30"}
  %gather-done = bf16[8,128]{1,0} all-gather-done(%gather-start)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%next, %product)
}

%condition (given: (s32[], bf16[8,128])) -> pred[] {
  %given = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%given), index=0
  %end = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

%called (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %copy = bf16[8,128]{1,0} copy(%p)
}

ENTRY %main (a: bf16[8,128], b: f32[1024]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[1024]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0}) tuple(%zero, %a)
  %reduced = f32[1024]{0} all-reduce(%b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%called
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %kernel = bf16[8,128]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call"
  ROOT %result = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""
V5E = parse_slice("v5e:4x4")


def placed(where):
    return Placed(where, 1e9, where.coordinates)


@pytest.fixture(scope="module")
def program():
    return parse(TEXT)


def test_text_is_read(program):
    main = program.computations[program.entry]
    assert program.entry == "main"
    assert list(program.computations) == ["body", "condition", "called", "main"]
    assert main.instructions["start"].operands == ("zero", "a")
    assert main.instructions["kernel"].target == "tpu_custom_call"
    assert main.root == "result" and main.instructions["loop"].called("body") == "body"
    product = program.computations["body"].instructions["product"]
    assert product.op_name.endswith("ffn/dot_general")
    assert product.integer("estimated_cycles") == 30
    assert arrays_of("(bf16[8,128]{1,0:T(8,128)(2,1)}, pred[])") == [
        Array("bf16", (8, 128)),
        Array("pred", ()),
    ]
    assert Array("f32", (3, 5)).bytes == 60 and Array("s4", (6,)).bytes == 3


def test_turns_of_a_loop_are_counted(program):
    """From 0 by 2 up to 8. A counter that begins at what is not known has none."""
    main = program.computations["main"]
    loop = main.instructions["loop"]
    assert trip_count(program, loop, main, unknown) == 4
    lost = parse(TEXT.replace("%zero = s32[] constant(0)", "%zero = s32[] parameter(2)"))
    entry = lost.computations["main"]
    assert trip_count(lost, entry.instructions["loop"], entry, unknown) is None
    assert read_schedule(lost, placed(V5E)).unknown_loops == ["loop"]
    stuck = parse(TEXT.replace("%two = s32[] constant(2)", "%two = s32[] constant(0)"))
    entry = stuck.computations["main"]
    assert trip_count(stuck, entry.instructions["loop"], entry, unknown) is None


def test_cycles_exchanges_and_what_has_no_estimate(program):
    schedule = read_schedule(program, placed(V5E))
    assert schedule.cycles == 4 * 30 and schedule.unknown_loops == []
    assert [(kernel.bytes, kernel.times) for kernel in schedule.kernels] == [
        (2048 + 4096 + 2048, 1)
    ]
    gather, reduce = sorted(schedule.collectives, key=lambda found: found.kind)
    rate = 2 * 45e9
    assert (gather.times, gather.chips, gather.bytes) == (4, 16, 2048 * 15 / 16)
    hidden = 30 / 1.5e9
    assert gather.exposed == pytest.approx(max(0.0, gather.bytes / rate - hidden))
    assert not gather.synchronous and gather.dtype == "bf16"
    assert (reduce.chips, reduce.bytes) == (4, 2 * 4096 * 3 / 4)
    assert reduce.synchronous and reduce.exposed == pytest.approx(reduce.bytes / 45e9)  # in a row
    step = estimate(schedule, V5E, {})
    assert step.passes == pytest.approx(120 / 1.5e9) and step.products == 0
    multiplied = parse(TEXT.replace("ROOT %copy = bf16[8,128]{1,0} copy(%p)",
                                    "ROOT %copy = bf16[8,128]{1,0} convolution(%p, %p)"))  # fmt: skip
    step = estimate(read_schedule(multiplied, placed(V5E)), V5E, {})
    assert step.products == pytest.approx(120 / 1.5e9) and step.passes == 0
    exposed = reduce.exposed + 4 * gather.exposed
    assert step.exposed_ici == pytest.approx(exposed) and step.exposed_dcn == 0
    assert step.at_least == pytest.approx(8192 / 0.819e12) and step.kernels == 0
    counted = estimate(schedule, V5E, {"kernel": 3000})
    assert counted.kernels == pytest.approx(3000 / 1.5e9) and counted.at_least == 0
    assert estimate(schedule, parse_slice("v5p-8"), {"kernel": 3000}).kernels == pytest.approx(
        3000 / 2 / 1.75e9
    )
    assert seconds_by_part(schedule, V5E) == {"feed-forward": pytest.approx(120 / 1.5e9)}
    table = collectives_table(schedule)
    assert sum(row["exposed"] for row in table) == pytest.approx(exposed)


def test_what_sparse_cores_gather_is_counted():
    """From when they have what they are to gather."""
    calls = """\
%offloaded (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,8]{1,0} parameter(0)
  ROOT %gather = bf16[8,128]{1,0} all-gather(%q), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}
}, execution_thread="sparsecore"

%async (r: bf16[8,8]) -> bf16[8,128] {
  %r = bf16[8,8]{1,0} parameter(0)
  ROOT %call = bf16[8,128]{1,0} custom-call(%r), custom_call_target="offload", called_computations={%offloaded}
}, execution_thread="sparsecore"

"""
    started = """\
  %set-up = ((), (), (s32[8192]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %gather-start = ((bf16[8,8]{1,0}), bf16[8,128]{1,0}, (s32[8192]{0})) async-update(%set-up, %x)
"""
    lines = TEXT.splitlines(keepends=True)
    (place,) = (index for index, line in enumerate(lines) if "%gather-start = " in line)
    text = "".join([*lines[:place], started, *lines[place + 1 :]])
    text = text.replace("all-gather-done(", "async-done(").replace("%body (", f"{calls}%body (", 1)
    found = read_schedule(parse(text), placed(V5E))
    assert found.collectives == read_schedule(parse(TEXT), placed(V5E)).collectives
    assert found.uncosted == []


@pytest.mark.parametrize(
    ("groups", "chips", "rate"),
    [
        ("replica_groups={{0,1},{2,3}}", 2, 45e9),
        ("replica_groups={{0,2},{1,3}}", 2, 22.5e9),
        ("replica_groups={{0,1,4,5},{2,3,6,7}}", 4, 90e9),
        ("replica_groups={{0,16},{1,17}}", 2, 1e9),
        ("replica_groups=[16,2]<=[2,16]T(1,0)", 2, 1e9),
        ("replica_groups=[2,16]<=[32]", 16, 90e9),
        ("replica_groups=mesh['data'=2,'fsdp'=16] {'fsdp'}", 16, 90e9),
        ("replica_groups=mesh['data'=2,'fsdp'=16] {'data'}", 2, 1e9),
        ("replica_groups=mesh['axis_0'=32] {'axis_0'}", 32, 1e9),
    ],
)
def test_groups_within_and_across_slices(groups, chips, rate):
    """Devices 0 to 15 lie in the first slice of 4 × 4, 16 to 31 in the second."""
    text = TEXT.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", groups)
    schedule = read_schedule(parse(text), placed(parse_slice("2 × v5e:4x4")))
    (found,) = (item for item in schedule.collectives if item.kind == "all-reduce")
    assert (found.chips, found.network) == (chips, "DCN" if rate == 1e9 else "ICI")
    assert found.seconds == pytest.approx(found.bytes / rate)


def test_the_cost_of_a_run():
    """A step at the peak of all chips has an MFU of 1."""
    flops, tokens = 6e9, 2**21
    seconds = flops * tokens / (16 * 197e12)
    cost = run_cost(seconds, tokens, int(flops) * tokens, 197e12, 16, 10 * tokens)
    assert cost["mfu"] == pytest.approx(1) and cost["steps"] == 10
    assert cost["days"] == pytest.approx(10 * seconds / 86400)
    assert cost["chip_hours"] == pytest.approx(cost["days"] * 24 * 16)
    endless = run_cost(seconds, tokens, int(flops) * tokens, 197e12, 16, None)
    assert endless == {name: cost[name] for name in ("tokens_per_second", "mfu")}


BETWEEN = """\
HloModule jit_step, is_scheduled=true, num_partitions=32

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %token = token[] after-all()
  %send = (f32[1000]{0}, u32[], token[]) send(%a, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="psum_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %b = f32[1000]{0} negate(%a), backend_config={"estimated_cycles":"300"}
  %recv = (f32[1000]{0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="psum_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  %both = (f32[1000]{0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %sum = f32[1000]{0} get-tuple-element(%both), index=0
}
"""


@pytest.mark.parametrize(
    ("kind", "received"),
    [("ALL_REDUCE", 4000), ("ALL_GATHER", 4000), ("REDUCE_SCATTER", 2000), ("OTHER", 2000)],
)
def test_what_slices_exchange_goes_over_the_data_centre_network(kind, received):
    """From the send on, to the end of the recv; 300 cycles at 1.5 GHz hide 200 ns of it."""
    two = parse_slice("2 × v5e:4x4")
    schedule = read_schedule(parse(BETWEEN.replace("ALL_REDUCE", kind)), placed(two))
    (found,) = schedule.collectives
    assert (found.kind, found.network) == (kind.lower().replace("_", "-"), "DCN")
    assert (found.bytes, found.chips, found.synchronous) == (received, 2, False)
    assert found.exposed == pytest.approx(received / 1e9 - 200e-9)
    assert schedule.uncosted == []
    assert estimate(schedule, two, {}).exposed_dcn == found.exposed
