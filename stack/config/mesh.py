"""How the run is laid out over devices: changes speed and memory, never the numbers, but for what is int8."""

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from stack.config.condition import Condition
from stack.config.section import Section

AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")
"""The mesh axes, from the slowest network to the fastest."""


def _or_auto(schema: dict[str, Any]) -> None:
    """The JSON schema of the mesh admits the bare word `auto`, as the reader does."""
    fields = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"const": "auto"}, fields]


class MeshConfig(Section):
    """Sizes of the named mesh axes; their product is the number of devices, one may be -1.

    `mesh: auto` leaves them all to the planner.
    """

    model_config = ConfigDict(json_schema_extra=_or_auto)

    conditions = (
        Condition(
            fields=(
                *(*AXES, "schedule", "virtual_stages", "zero", "sequence_parallel", "tables_once"),
                *("second_shard", "gather_dtype", "scatter_dtype"),
            ),
            other="auto",
            values=(False,),
        ),
        Condition(fields=("schedule", "virtual_stages"), other="stage", unless=1),
        Condition(fields=("virtual_stages",), other="schedule", values=("interleaved",)),
        Condition(fields=("tables_once", "second_shard"), other="zero", values=(3,)),
        Condition(fields=("gather_dtype", "scatter_dtype"), other="second_shard", values=(True,)),
        # Tables are gathered across the network once a step already.
        Condition(fields=("tables_once",), other="second_shard", values=(False,)),
        Condition(fields=("sequence_parallel",), other="tensor", unless=1),
    )

    auto: bool = False
    """The planner chooses the fastest layout that fits when the run starts, and the run's config holds
    what it chose; every other field of the mesh must then be left out."""
    data: int = Field(default=1, ge=-1)
    """Replicas of the model over the slow network; only gradients cross it."""
    fsdp: int = Field(default=-1, ge=-1)
    """Ways the parameters, gradients and optimizer state are split (see zero); -1: what is left."""
    stage: int = Field(default=1, ge=-1)
    """Pipeline stages: each runs a part of the layers, for one micro-batch of train.accumulation after the
    other; with zero 1."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """In which order stages take up micro-batches (arXiv 1811.06965, 2006.09503, 2104.04473, 2401.10241)."""
    virtual_stages: int = Field(default=1, ge=1)
    """Parts of the model on each stage, which divide the bubble; of interleaved."""
    context: int = Field(default=1, ge=-1)
    """Ways a sequence is split; more than 1 is refused, not built yet."""
    expert: int = Field(default=1, ge=-1)
    """Ways experts are split; more than 1 is refused, not built yet."""
    tensor: int = Field(default=1, ge=-1)
    """Ways heads, MLP and vocabulary are split (arXiv 1909.08053); within one node."""
    zero: Literal[0, 1, 2, 3] = 3
    """What `fsdp` shards (arXiv 1910.02054). 0: nothing; 1: parameters and optimizer state, weights
    gathered once a step, gradients scattered once; 2: gradients scattered every micro-batch; 3:
    weights gathered layer by layer. 3 needs the least memory and is as fast inside a node."""
    tables_once: bool = False
    """Stage 3: word and position tables are gathered, and their gradients scattered, once a step instead
    of every micro-batch. They are then whole on every device, in the compute dtype and in float32."""
    second_shard: bool = False
    """Stage 3: parameters, gradients and optimizer state are split over `data` too. Weights cross `data` once
    a step into a second shard in the compute dtype, split over `fsdp` alone, from which layers are gathered
    forward and backward (hpZ of ZeRO++, arXiv 2306.10209): nothing else but gradients crosses."""
    gather_dtype: Literal["compute", "int8"] = "compute"
    """What weights cross `data` in. int8: with a float32 scale for up to 256 numbers (qwZ of ZeRO++); the
    step then computes with the rounded weights, evaluation with the exact ones."""
    scatter_dtype: Literal["reduce", "int8"] = "reduce"
    """What gradients cross `data` in, once a step. reduce: train.grad_reduce_dtype; int8: the sum of each
    place on `data` is rounded, once, as weights are, and added up in float32 (after qgZ of ZeRO++)."""
    sequence_parallel: bool = False
    """Norms and residuals are split over `tensor` along the sequence (arXiv 2205.05198)."""

    @model_validator(mode="before")
    @classmethod
    def _read_auto(cls, value: Any) -> Any:
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.auto:
            return self
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size == 0:
                raise ValueError(f"{axis}=0: a mesh axis has at least 1 device, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            free = [axis for axis, size in sizes.items() if size == -1]
            raise ValueError(f"only one mesh axis may be -1, not {' and '.join(free)}")
        for axis in ("context", "expert"):
            if sizes[axis] != 1:
                raise ValueError(f"{axis}={sizes[axis]}: this axis is not built yet; set {axis}=1")
        return self
