"""What is read off small programs, written by hand, that hold what compilers write."""

import jax
import jax.numpy as jnp
import pytest

from vqgan_jax.hlo import Module, window_products

BYTES = """
%inner (p.0: bf16[8,16,4], p.1: f32[8,4]) -> f32[8,4] {
  %p.0 = bf16[8,16,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[8,4]{1,0:T(8,128)S(1)} parameter(1)
  %part = bf16[8,10,4]{2,1,0:T(8,128)(2,1)} slice(%p.0), slice={[0:8], [0:10], [0:4]}
  ROOT %sum = f32[8,4]{1,0:T(8,128)} add(%p.1, %part)
}

%fused (q.0: bf16[8,16,4], q.1: f32[8,4]) -> f32[8,4] {
  %q.0 = bf16[8,16,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = f32[8,4]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %in = f32[8,4]{1,0:T(8,128)} fusion(%q.0, %q.1), kind=kLoop, calls=%inner
}

ENTRY %main (a: bf16[8,16,4], b: f32[8,4], w: f32[8,1]) -> f32[8,4] {
  %a = bf16[8,16,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,4]{1,0:T(8,128)} parameter(1)
  %w = bf16[8,1,4]{2,1,0:T(8,128)} parameter(2)
  %at = s32[]{:T(128)S(6)} constant(3)
  %staged = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)
  %fast = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%staged)
  %new = bf16[8,16,4]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%a, %w, %at, %at, %at)
  ROOT %out = f32[8,4]{1,0:T(8,128)} fusion(%new, %fast), kind=kLoop, calls=%fused
}
"""

# Twelve rounds (from 0, by 2, below 24) that stack a row in place, gather, permute and multiply, and gather in two
# parts, as the TPU compiler spreads one over the fusions beside it; before them the gather of a round that it has taken
# out, and then one reduction.
LOOP = """
%stack (s.0: f32[24,8,128], s.1: f32[8,128], s.2: s32[]) -> f32[24,8,128] {
  %s.0 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %s.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %s.2 = s32[]{:T(128)S(6)} parameter(2)
  %row = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%s.1)
  %none = s32[]{:T(128)S(6)} constant(0)
  ROOT %put = f32[24,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%s.0, %row, %s.2, %none, %none)
}

%part (g.0: f32[8,128]) -> f32[32,128] {
  %g.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all.1 = f32[32,128]{1,0:T(8,128)} all-gather(%g.0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (arg: (s32[], f32[8,128], f32[24,8,128])) -> (s32[], f32[8,128], f32[24,8,128]) {
  %arg = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %rows = f32[24,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %two = s32[]{:T(128)S(6)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%i, %two)
  %w = f32[16,128]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %go = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %come = f32[8,128]{1,0:T(8,128)S(1)} collective-permute-done(%go)
  %y = f32[8,16]{1,0:T(8,128)S(1)} dot(%come, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %spread = f32[32,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kOutput, calls=%part
  %more = f32[32,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kOutput, calls=%part
  %kept = f32[24,8,128]{2,1,0:T(8,128)} fusion(%rows, %x, %i), kind=kLoop, calls=%stack, metadata={op_name="step/keep"}
  ROOT %result = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}, f32[24,8,128]{2,1,0:T(8,128)}) tuple(%next, %x, %kept)
}

%goes_on (arg.1: (s32[], f32[8,128], f32[24,8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)S(6)} constant(24)
  %at = s32[]{:T(128)S(6)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,128], rows.1: f32[24,8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %rows.1 = f32[24,8,128]{2,1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %begin = f32[32,128]{1,0:T(8,128)S(1)} fusion(%x.1), kind=kOutput, calls=%part
  %first = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}, f32[24,8,128]{2,1,0:T(8,128)}) tuple(%zero, %x.1, %rows.1)
  %loop = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}, f32[24,8,128]{2,1,0:T(8,128)}) while(%first), condition=%goes_on, body=%body
  %last = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%last), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""  # noqa: E501
ROW = 8 * 128 * 4


@pytest.fixture(scope="module")
def loop():
    return Module(LOOP)


def test_slices_staged_buffers_and_updates_in_place_count_once():
    staged, row, part, out = 8 * 4 * 4, 8 * 4 * 2, 8 * 10 * 4 * 2, 8 * 4 * 4
    # An update in place reads its row and writes it.
    assert Module(BYTES).counts().memory == staged + 2 * row + part + out


def test_an_operand_that_a_fusion_inside_only_reshapes_is_read():
    """As TPUs hand weights to a matrix product."""
    reshape = """
%shape (r.0: f32[8,4]) -> f32[8,4] {
  %r.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %same = f32[8,4]{1,0:T(8,128)} bitcast(%r.0)
}
"""
    add = "ROOT %sum = f32[8,4]{1,0:T(8,128)} add(%p.1, %part)"
    again = "%again = f32[8,4]{1,0:T(8,128)} fusion(%p.1), kind=kLoop, calls=%shape\n  "
    assert add in BYTES
    slow = BYTES.replace("fusion(%new, %fast)", "fusion(%new, %b)")  # from device memory
    direct = Module(slow).counts().memory
    assert Module(reshape + slow.replace(add, again + add.replace("%p.1", "%again"))).counts().memory == direct
    assert direct == Module(BYTES).counts().memory + 8 * 4 * 4


def test_a_copy_back_from_fast_memory_writes():
    back = "(f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%fast)"
    text = BYTES.replace("ROOT %out", f"%back = {back}\n  ROOT %out")
    assert Module(text).counts().memory - Module(BYTES).counts().memory == 8 * 4 * 4


def test_loops_count_as_often_as_their_counter_says(loop):
    counts = loop.counts()
    assert counts.unknown_loops == 0
    assert counts.flops == 12 * 2 * 8 * 16 * 128
    # A round: the gather, the permute and both fusions beside it read a row each; the stack reads a row and writes one.
    assert counts.memory == 12 * 6 * ROW + ROW + 2 * ROW


def test_collectives_by_kind_and_bytes_sent(loop):
    found = {channel: (c.kind, c.sent, c.times) for channel, c in loop.counts().collectives.items()}
    assert found == {
        "body/1": ("all-gather", ROW, 12),  # to the other one of two
        "body/2": ("collective-permute", ROW, 12),
        "body/7": ("all-gather", 3 * ROW, 12),  # one gather, though both parts of it name it
        "7": ("all-gather", 3 * ROW, 1),  # of the round before
        "3": ("all-reduce", 2 * 3 / 4 * ROW, 1),
    }


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,2},{1,3}}", 2),
        ("[32,8]<=[256]", 8),
        ("[8,32]<=[32,8]T(1,0)", 32),
        ("mesh['axis_0'=32,'axis_1'=8] {'axis_1'}", 8),
        ("mesh['a'=4,'b'=2,'c'=8] {'b','c'}", 16),
        ("mesh['a'=32,'b'=8], device_ids=([16,16]T(1,0)) {'b'}", 8),
        ("mesh['a'=32,'b'=8] {'a':(4)8}", 8),
    ],
)
def test_groups_of_a_collective_in_every_spelling(groups, size):
    text = LOOP.replace("mesh['a'=4,'b'=2] {'b'}", groups)
    assert Module(text).counts().collectives["body/1"].sent == (size - 1) * ROW


# What libtpu writes for sums, gathers and exchanges between two slices of four chips, and four of them.
BETWEEN = """
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %token = token[] after-all()
  %inside = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %send = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%inside, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %come = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true
  ROOT %sum = f32[8,128]{1,0:T(8,128)} get-tuple-element(%come), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "target, transfer, kind, sent",
    [
        ('"{1,2}x{0:3}"', "ALL_REDUCE", "all-reduce", ROW),
        ('"{1,2,3,4}x{0:3}"', "ALL_REDUCE", "all-reduce", 1.5 * ROW),
        ('"{1,2,3,4}x{0:3}"', "ALL_GATHER", "all-gather", 3 * ROW),
        ("{{100000,200000},{100001,200001}}", "ALL_TO_ALL", "all-to-all", ROW / 2),
        ("{{100000->200000},{200000->100000}}", "ONE_TO_ONE", "collective-permute", ROW),
    ],
)
def test_what_goes_between_slices_is_counted_apart(target, transfer, kind, sent):
    text = BETWEEN.replace('"{1,2}x{0:3}"', target).replace("ALL_REDUCE", transfer)
    counts = Module(text).counts()
    inside, between = sorted(counts.collectives.values(), key=lambda c: c.between_slices)
    assert (inside.kind, inside.sent, inside.between_slices) == ("all-reduce", 2 * 3 / 4 * ROW, False)
    assert (between.kind, between.sent, between.times, between.between_slices) == (kind, sent, 1, True)
    # The sum reads and writes; what is sent is read, and what is received written, with a word of its context.
    assert counts.memory == 2 * ROW + ROW + ROW + 4


def test_the_work_of_kernels_of_attention():
    heads = "bf16[2,3,16,4]{3,2,1,0}"
    calls = {"flash_attention.1": 2, "flash_mha_bwd_dkv_block_q_major_16.1": 4, "flash_mha_bwd_dq_block_q_16": 3}
    text = "\n".join(
        f'  %{name} = {heads} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"'
        for name in (*calls, "another", "estimated")
    )
    text += ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"7"}}}'
    keys = "bf16[2,3,8,4]{3,2,1,0}"
    text = f"  %q = {heads} parameter(0)\n  %k = {keys} parameter(1)\n{text}"
    counts = Module(f"ENTRY %main (q: bf16[2,3,16,4], k: bf16[2,3,8,4]) -> () {{\n{text}\n}}").counts()
    assert counts.flops == sum(calls.values()) * 2 * (2 * 3 * 16 * 8 * 4) + 1000


def test_a_fused_reduce_scatter_is_one(loop):
    text = LOOP.replace("%part", "%all-reduce-scatter.1").replace("all-gather(%g.0)", "all-reduce(%g.0)")
    found = Module(text).counts().collectives["7"]
    assert (found.kind, found.sent) == ("reduce-scatter", 3 / 4 * ROW)


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    counts = Module(LOOP.replace("direction=LT", "direction=NE")).counts()
    assert (counts.unknown_loops, counts.flops) == (1, 2 * 8 * 16 * 128)
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Module(text.replace("direction=LT", "direction=NE")).counts().flops == 5 * 2 * 8 * 16 * 128


def test_buffers_are_named_by_what_made_them(loop):
    kept = [buffer for buffer in loop.buffers() if buffer.made_by == "step/keep"]
    assert [(b.shape, b.size) for b in kept] == [("f32[24,8,128]", 24 * ROW)]


def test_products_with_padding_and_dilation_are_left_out():
    assert window_products(5, 3, 5, 1, 1, 1, 1) == 13  # "same": the two ends miss one each
    assert window_products(4, 3, 8, 1, 1, 2, 1) == 4 + 4 * 2 - 1  # upsampled by zeros
    assert window_products(16, 1, 4, 4, 0, 1, 1) == 4


def test_flops_of_compiled_programs_are_those_of_their_convolutions():
    def f(x, k, m):
        y = jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.scan(lambda c, _: (c @ m, None), y.reshape(2, -1), None, length=3)[0]

    args = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4)), jnp.ones((64, 64))
    counts = Module(jax.jit(f).lower(*args).compile().as_text()).counts()
    taps = window_products(8, 3, 4, 2, 0, 1, 1) ** 2
    assert counts.flops == 2 * 2 * 3 * 4 * taps + 3 * 2 * 2 * 64 * 64
    assert counts.collectives == {}
