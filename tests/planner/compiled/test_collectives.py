"""Reading collectives from compiled programs: sizes, groups in all notations, loops."""

from pathlib import Path

import pytest

import stack
from stack.planner.compiled.collectives import collectives, kernels, sources

MESH = {"data": 2, "fsdp": 4, "tensor": 2}
ASYNCHRONOUS = "((bf16[2,8]{1,0}, bf16[4]{0}), (bf16[8,8]{1,0}, bf16[16]{0}))"
HLO = f"""\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %gather.1 = {ASYNCHRONOUS} all-gather-start(%a, %b), GROUPS, metadata={{op_name="jit(step)/gather"}}
}}

%idle (p: f32[]) -> f32[] {{
  %all-reduce.9 = f32[99]{{0}} all-reduce(%p), replica_groups={{{{0,1}}}}, to_apply=%add
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %w = (s32[]) while(%t), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"12"}}}}
  %s = (f32[3,5]{{1,0}}, f32[7]{{0}}) reduce-scatter(%y, %z), replica_groups=[4,4]<=[2,4,2]T(0,2,1)
}}
"""
NOTATIONS = {
    "replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}": ("fsdp",),
    "replica_groups=[4,4]<=[2,4,2]T(0,2,1)": ("fsdp",),
    "replica_groups=[2,8]<=[16]": ("fsdp", "tensor"),
    "replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}": ("tensor",),
    "replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','fsdp'}": ("data", "fsdp"),
}


@pytest.mark.parametrize(("groups", "axes"), NOTATIONS.items())
def test_every_notation_of_groups_gives_mesh_axes(groups, axes):
    gather = collectives(HLO.replace("GROUPS", groups), MESH)[0]
    assert gather.axes == axes


def test_loops_multiply_and_what_is_never_called_does_not_count():
    gather, scatter = collectives(HLO.replace("GROUPS", "replica_groups=[2,8]<=[16]"), MESH)
    assert (gather.kind, gather.times, scatter.kind, scatter.times) == ("all-gather", 12, "reduce-scatter", 1)


def test_sizes_are_of_the_larger_side():
    gather, scatter = collectives(HLO.replace("GROUPS", "replica_groups=[2,8]<=[16]"), MESH)
    assert (gather.elements, gather.bytes) == (64 + 16, 2 * 80)
    assert (scatter.elements, scatter.bytes) == (4 * 22, 4 * 4 * 22)
    assert gather.name == "jit(step)/gather"


LENGTHLESS = """\
%body (p: (s32[])) -> (s32[]) {
  %r = f32[4]{0} all-reduce(%x), replica_groups=[2,8]<=[16], to_apply=%add
}

%cond (p: (s32[], s32[])) -> pred[] {
  %bound = s32[] constant(9)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(TEST), direction=LT
}

ENTRY %main (x: f32[8], n: s32[]) -> f32[8] {
  %n = s32[] parameter(1)
  %two = s32[] constant(2)
  %copy.1 = s32[] copy(%two)
  %six = s32[] constant(6)
  %t = (s32[], s32[], s32[]) tuple(%copy.1, %six, %n)
  %w = (s32[], s32[], s32[]) while(%t), condition=%cond, body=%body, backend_config={}
}
"""


@pytest.mark.parametrize(("test", "times"), [("%i, %bound", 7), ("%p#0, %p#1", 4)])
def test_a_loop_whose_length_the_compiler_does_not_tell_is_counted_by_its_bounds(test, times):
    lost = LENGTHLESS if "bound" in test else LENGTHLESS.replace("  %bound = s32[] constant(9)\n", "")
    assert collectives(lost.replace("TEST", test), MESH)[0].times == times


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="loop of unknown length"):
        collectives(LENGTHLESS.replace("constant(9)", "parameter(1)").replace("TEST", "%i, %p#2"), MESH)


PACKAGE = Path(stack.__file__).parent
FRAMES = f"""\
HloModule jit_step

FileNames
1 "/home/user/train.py"
2 "{PACKAGE}/layers/linear.py"
3 "/opt/lib/python3.12/site-packages/optax/_src/update.py"

FunctionNames
1 "f"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=14 end_line=14 column=8 end_column=8}}
2 {{file_name_id=2 function_name_id=1 line=37 end_line=37 column=8 end_column=8}}
3 {{file_name_id=3 function_name_id=1 line=5 end_line=5 column=8 end_column=8}}

StackFrames
1 {{file_location_id=1 PARENT1}}
2 {{file_location_id=2 parent_frame_id=PARENT2}}
3 {{file_location_id=3 parent_frame_id=PARENT2}}


%body (p: f32[]) -> f32[] {{
  %r = f32[4]{{0}} all-reduce(%p), replica_groups=[2,8]<=[16], metadata={{op_name="f" stack_frame_id=2}}
}}
"""


@pytest.mark.parametrize(("root", "parent"), [("", "1"), ("parent_frame_id=1", "2")])
def test_an_operation_is_of_the_innermost_line_outside_of_libraries(root, parent):
    """Some versions of XLA print the number of a frame's parent one too high."""
    text = FRAMES.replace("PARENT1", root).replace("PARENT2", parent)
    assert sources(text) == {
        1: "/home/user/train.py:14",
        2: "stack/layers/linear.py:37",
        3: "/home/user/train.py:14",
    }
    text = text.replace("%body", "ENTRY %body")
    assert [c.source for c in collectives(text, MESH)] == ["stack/layers/linear.py:37"]


KERNELS = """\
%body (p: (s32[])) -> (s32[]) {
  %a = (f32[4]{0}, s8[0]{0}) custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %f = ((f32[4]{0}), f32[4]{0}) fusion-start(%x), calls=%c, backend_config={"kind":"__triton_collective"}
  %d = f32[4]{0} fusion-done(%f), backend_config={"kind":"__triton_collective"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %b = f32[4]{0} custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
"""


def test_kernels_are_counted_with_the_trips_of_their_loops():
    assert kernels(KERNELS) == {"__cublas$lt$matmul": 13, "__triton_collective": 12}


def test_a_loop_as_long_as_data_say_runs_as_often_as_its_name_says():
    known = 'backend_config={"known_trip_count":{"n":"12"}}'
    named = 'metadata={op_name="jit(step)/about_3_times/while" stack_frame_id=26}'
    assert kernels(KERNELS.replace(known, named))["__triton_collective"] == 3
    unnamed = KERNELS.replace(known, 'metadata={op_name="jit(step)/about_3_times/scan/while"}')
    with pytest.raises(ValueError, match="a loop of unknown length"):
        kernels(unnamed.replace("condition=%cond, ", ""))
