"""Bytes of HBM read off a small program by hand."""

from benchmarks.program_bytes import hbm_bytes

PROGRAM = """
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


def test_slices_staged_buffers_and_updates_in_place_count_once():
    staged, row, part, out = 8 * 4 * 4, 8 * 4 * 2, 8 * 10 * 4 * 2, 8 * 4 * 4
    assert hbm_bytes(PROGRAM) == staged + row + part + out
