"""The bytes of kernels in a program's text: what is sliced or updated counts as that part alone."""

from stack.hardware import chip as chips

HLO = """HloModule step, is_scheduled=true

FileNames
1 "{root}/stack/layers/norm.py"

FunctionNames
1 "f"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}

%fused_norm (p0: bf16[4,8], p1: f32[3,8]) -> bf16[4,8] {{
  %p0 = bf16[4,8]{{1,0}} parameter(0)
  %p1 = f32[3,8]{{1,0}} parameter(1)
  %flat = f32[24]{{0}} bitcast(%p1)
  %row = f32[8]{{0}} slice(%flat), slice={{[0:8]}}
  %square = bf16[4,8]{{1,0}} multiply(%p0, %p0), metadata={{op_name="f" stack_frame_id=1}}
  ROOT %scaled = bf16[4,8]{{1,0}} custom(%square, %row)
}}

%fused_update (p2: f32[3,8], p3: f32[1,8], p4: s32[]) -> f32[3,8] {{
  %p2 = f32[3,8]{{1,0}} parameter(0)
  %p3 = f32[1,8]{{1,0}} parameter(1)
  %p4 = s32[] parameter(2)
  %twice = f32[1,8]{{1,0}} add(%p3, %p3)
  ROOT %updated = f32[3,8]{{1,0}} dynamic-update-slice(%p2, %twice, %p4, %p4)
}}

ENTRY %main (a: bf16[4,8], b: f32[3,8], c: f32[1,8], d: s32[]) -> f32[3,8] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  %b = f32[3,8]{{1,0}} parameter(1)
  %c = f32[1,8]{{1,0}} parameter(2)
  %d = s32[] parameter(3)
  %norm = bf16[4,8]{{1,0}} fusion(%a, %b), kind=kLoop, calls=%fused_norm
  %product = (bf16[4,4]{{1,0}}, s8[9]{{0}}) custom-call(%norm, %a), custom_call_target="__cublas$lt$matmul"
  %whole = f32[3,8]{{1,0}} copy(%b)
  ROOT %update = f32[3,8]{{1,0}} fusion(%whole, %c, %d), kind=kLoop, calls=%fused_update
}}
"""


def test_kernels_and_their_bytes(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    import fusions

    root = fusions.Path(chips.__file__).parents[2]
    found = [(each.part, each.moved, each.times) for each in fusions.kernels(HLO.format(root=root))]
    assert found == [
        ("norm", 2 * 64 + 32, 1),  # Reads and writes [4, 8], reads one row.
        ("product", 64 + 64 + 32, 1),  # Without its workspace.
        ("copies and zeros", 2 * 96, 1),
        ("other", 2 * 32 + 4, 1),  # Reads a row and a place, writes a row.
    ]
