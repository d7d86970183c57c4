"""Bytes per device of a training step, by category, by formula.

`memory` is of Stack's own compiled step, which is followed through its phases: the loss, the backward
pass of a layer, the scattering of gradients, the update. What is always held is added to the worst of
them. `stack.planner.formula.projects` has the usual layout of other frameworks.
"""

import dataclasses
from collections.abc import Iterable
from typing import cast, get_args

from stack.kernels.attention.xla_chunked import BLOCKS
from stack.models.stack import Remat
from stack.planner.formula.residuals import LayerResiduals, trace_residuals
from stack.planner.formula.result import Memory
from stack.planner.formula.shapes import Parameter
from stack.planner.formula.workload import Workload

MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1, "adafactor": 1, "muon": 2}
"""Float32 numbers that an optimizer keeps per parameter; adafactor only of what it does not factor, muon one
of each matrix."""

FACTORED = 128
"""Adafactor keeps rows and columns of what has two axes as long as this (Optax's default), whose own
size rounds to nothing."""

RESERVE = 1.5 * 2**30
"""The runtime's context, its libraries' workspaces and the network's buffers."""

# These three were read off the buffers of compiled steps. `benchmarks/plan_memory.py --fit` fits them to the
# 372 compiled cells of `benchmarks/results/plan_memory.csv`: it prints the values with which the mean of
# |log(formula / compiled)| is smallest, and those as good to 0.01 %.

STREAMS = 8
"""Arrays as wide as the model, and as many as wide as the heads, that are alive in attention's backward pass
where no fused kernel runs: inputs, norms, results and their gradients."""

AHEAD = 0.1
"""The share of what a layer's backward pass works on with which the next layer's has begun by then. That is
at stage 3, where no barrier keeps the two apart and the next has something to begin with: what was saved, or
a gather along the sequence."""

SPLITS = 1.25 * 2**20
"""Sums in float32 of the parts of a gradient's product, whose long side, the tokens, is divided for a device
to have something to do everywhere."""


def memory(workload: Workload) -> Memory:
    """Bytes per device of Stack's compiled step.

    Args:
        workload: the step.
    """
    if workload.stage > 1:
        from stack.planner.formula.pipeline import pipeline_memory  # It is made of what is here.

        return _with_averages(workload, pipeline_memory(workload))
    return _with_averages(workload, _of_one_stage(workload))


def _with_averages(w: Workload, one: Memory) -> Memory:
    """With the last average and its momentum, and the state of those that take turns with an instance."""
    if not w.apart:
        return one
    shard = 4 * elements_at_rest(w)
    others = w.instances // w.slices - 1
    return dataclasses.replace(
        one,
        parameters=one.parameters + (1 + others) * shard,
        optimizer=one.optimizer + w.outer_momentum * shard + others * 4 * optimizer_numbers(w),
    )


def elements_at_rest(w: Workload) -> float:
    """Numbers of the parameters on one device, as they lie between steps."""
    fsdp = w.fsdp if w.zero else 1
    return sum(p.shard(fsdp=fsdp, stage=w.stage, tensor=w.tensor) for p in w.parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes on one device of what the step is made of."""

    shard: float
    """All parameters, as they lie at rest."""
    trained: float
    """Those that are trained, in float32, in shards."""
    layers_trained: float
    """Those of the layers."""
    second: float
    """Second shards, in the compute dtype; 0 where there are none."""
    summed: float
    """Gradients of what is trained, in float32, as they are summed over micro-batches: in shards, in second
    shards where there are some."""
    layers_summed: float
    copied: float
    """Matrices in the compute dtype, whole over `fsdp`, but those that lie so at rest."""
    trained_whole: float
    """Those that are trained in the compute dtype, whole over `fsdp`."""
    layers_trained_whole: float
    layer: float
    """One layer's matrices in the compute dtype, whole over `fsdp`."""
    layer_copied: float
    """Those but what lies so at rest."""
    layer_trained: float
    table: float
    """The head's table in float32, whole over `fsdp`; 0 where there is no head, or it is not trained."""
    tables: float
    """Word tables in the compute dtype, whole over `fsdp`."""
    tables_trained: float
    matrices: tuple[float, ...]
    """Numbers of each trained matrix, of all layers together, whole over `fsdp`; the smallest first."""
    compute: int


def _of_one_stage(w: Workload) -> Memory:
    sizes, optimizer = _sizes(w), 4 * optimizer_numbers(w)
    activations, stack_bytes = _activation_bytes(w)
    always = {
        "parameters": sizes.shard + _compute_copies(w, sizes),
        "optimizer": (0.0 if w.offload_optimizer else optimizer) + w.ema * sizes.trained,
        "reserve": RESERVE,
        "host": (optimizer if w.offload_optimizer else 0.0) + (stack_bytes if w.offload_activations else 0.0),
    }
    always |= dict.fromkeys(_CATEGORIES, 0.0)
    phases = [always | phase for phase in _phases(w, sizes, activations)]
    return Memory(**max(phases, key=lambda phase: sum(phase.values())))


def optimizer_numbers(workload: Workload) -> float:
    """Float32 numbers of the optimizer's state on one device."""
    w, fsdp = workload, workload.fsdp if workload.zero else 1
    parts = [p for p in w.parameters if p.trained and not (w.optimizer == "adafactor" and _is_factored(p))]
    return sum(
        _kept(w, p) * p.shard(fsdp=fsdp, data=w.split_data, stage=w.stage, tensor=w.tensor) for p in parts
    )


def _kept(w: Workload, part: Parameter) -> int:
    return 1 if w.optimizer == "muon" and part.role == "matrix" else MOMENTS[w.optimizer]


def _is_factored(part: Parameter) -> bool:
    return sum(size >= FACTORED for _, size in part.axes) >= 2


def _sizes(w: Workload) -> _Sizes:
    layers, ends, compute = w.parameters.layers, w.parameters.ends, 4 if w.model.dtype == "float32" else 2
    fsdp = w.fsdp if w.zero else 1

    def trained(parts: Iterable[Parameter]) -> tuple[Parameter, ...]:
        return tuple(p for p in parts if p.trained)

    def shard(parts: Iterable[Parameter], data: int = w.split_data) -> float:
        return sum(p.itemsize * p.shard(fsdp=fsdp, data=data, tensor=w.tensor) for p in parts)

    def second(parts: Iterable[Parameter]) -> float:
        if w.split_data == 1:
            return 0.0
        return compute * sum(p.shard(fsdp=fsdp, tensor=w.tensor) for p in parts if p.is_matrix)

    def whole(parts: Iterable[Parameter]) -> float:
        return compute * sum(p.shard(tensor=w.tensor) for p in parts if p.is_matrix)

    def copied(parts: Iterable[Parameter]) -> float:
        return whole(p for p in parts if fsdp > 1 or p.itemsize != compute)

    some, some_ends = trained(layers), trained(ends)
    matrices = (p.shard(tensor=w.tensor) for p in (*some, *some_ends) if p.is_matrix)
    scores = w.parameters.scores
    # Of one micro-batch, layers add up over all replicas at once.
    data = 1 if w.accumulation > 1 else w.split_data
    return _Sizes(
        shard=shard(layers) + shard(ends),
        trained=shard(some) + shard(some_ends),
        layers_trained=shard(some),
        second=second(layers) + second(ends),
        summed=shard(some, data) + shard(some_ends, data),
        layers_summed=shard(some, data),
        copied=copied(layers) + copied(ends),
        trained_whole=whole(some) + whole(some_ends),
        layers_trained_whole=whole(some),
        layer=whole(layers) / w.model.num_layers,
        layer_copied=copied(layers) / w.model.num_layers,
        layer_trained=whole(some) / w.model.num_layers,
        table=4 * scores.shard(tensor=w.tensor) if scores.trained else 0.0,
        tables=whole(ends),
        tables_trained=whole(some_ends),
        matrices=tuple(sorted(matrices)),
        compute=compute,
    )


_CATEGORIES = ("gradients", "activations", "logits", "temporaries", "collectives")


def _phases(w: Workload, s: _Sizes, activation_bytes: float) -> Iterable[dict[str, float]]:
    """What is held besides parameters and moments, in each phase of a step that can be the worst."""
    several = w.accumulation > 1
    whole_sums = s.trained_whole * w.reduce_bytes / s.compute
    # The sums over micro-batches.
    sums = 0.0
    if several:
        sums = whole_sums if w.zero < 2 else s.summed
        if w.holds_tables:
            sums = s.layers_trained + s.tables_trained * w.reduce_bytes / s.compute
    activations = {"activations": activation_bytes}
    ahead = 0.0
    if w.zero == 3 and (w.remat != "full" or w.sequence_parallel):
        # No layer below waits for the gradients of adapters, which are summed over devices all at once.
        ahead = 1.0 if w.adapter is not None and w.fsdp > 1 else AHEAD
    layer = layer_temporaries(w) * (1 + ahead)
    score_copies, input_copies = _layout_copies(w)
    yield activations | {
        "gradients": sums,
        "logits": s.table,
        "temporaries": score_copies + input_copies,
    }
    yield activations | {
        "gradients": sums,
        "logits": 2 * s.table + logits(w),
        "temporaries": w.scored_tokens * w.model.embed_dim * s.compute,
        "collectives": s.tables if w.zero == 3 and not w.holds_tables else 0.0,
    }
    stack = s.layers_summed if w.zero == 3 else s.layers_trained_whole
    in_flight = 0.0
    if w.zero == 3:
        # Weights of two layers, one of them the next, and gradients of one that are being summed. What is
        # neither gathered nor rounded is there once, cut out of its stack.
        in_flight = s.layer + s.layer_copied + w.reduce_bytes / s.compute * s.layer_trained
    yield activations | {
        "gradients": sums + stack,
        "logits": s.table,
        "temporaries": layer + SPLITS + input_copies + _rounded(w),
        "collectives": in_flight,
    }
    if w.zero == 2 or (w.zero == 1 and not several):
        yield from _scattering(w, s, sums)
    # The update, which needs no copies of the weights.
    yield {
        "parameters": s.shard,
        "gradients": s.trained + (sums if w.zero == 1 and w.fsdp > 1 else 0.0),
    }


def _scattering(w: Workload, s: _Sizes, sums: float) -> Iterable[dict[str, float]]:
    """What is held while each matrix is scattered, laid out for it in what is summed in, the others waiting.

    Beside the weights, if another micro-batch wants them.
    """
    weights = {} if w.accumulation > 1 else {"parameters": s.shard}
    waiting, scattered = sum(s.matrices), 0.0
    for matrix in s.matrices:
        # Shards are added to the sums over micro-batches; of one micro-batch they are all there is.
        gradients = waiting * s.compute + (sums or scattered)
        yield weights | {"gradients": gradients, "collectives": matrix * w.reduce_bytes}
        waiting -= matrix
        scattered += 4 * matrix / w.fsdp


def _compute_copies(w: Workload, s: _Sizes) -> float:
    """Copies of the weights in the compute dtype that live as long as the step.

    Layers in one piece of code have each other's gradients in their place.
    """
    if w.holds_tables:
        return s.tables
    if w.split_data > 1:
        return s.second
    if w.zero == 3 or _is_unrolled(w):
        return 0.0
    return s.copied


def _activation_bytes(w: Workload) -> tuple[float, float]:
    """Saved activations on the device, and what of them offloading moves to the host."""
    layer = layer_residuals(w)
    rows = w.micro_batch / w.context
    stack_bytes = rows * w.model.num_layers * layer.per_layer(w.tensor)
    rest = rows * layer.once
    if w.offload_activations:
        # Two layers are on their way at a time.
        return rest + 2 * rows * layer.per_layer(w.tensor), stack_bytes
    return rest + stack_bytes, stack_bytes


def layer_temporaries(w: Workload) -> float:
    """What one layer's backward pass works on.

    As much as the layer keeps when nothing is computed again, whether it was saved or is computed again, and
    what it makes beside that. Under sequence parallelism the gradients of what was gathered besides, until
    they are scattered. A kernel that stores no scores is told of segments anew with each layer; without one
    there are the scores' gradient, or what their backward pass alone works on.
    """
    if _is_unrolled(w):
        return 0.0
    model, bytes_each = w.model, 4 if w.model.dtype == "float32" else 2
    rows = w.micro_batch / w.context
    gathers = 2 * w.micro_tokens * model.embed_dim * bytes_each if w.sequence_parallel else 0.0
    everything = rows * _trace(w, "none").per_layer(w.tensor) + gathers + _made_beside(w)
    if w.fused_attention:
        mask = rows * (_trace(w, "none").once - _trace(w, policy(w)).once)
        return everything + mask + (_block_scores(w) if w.blocked_attention else 0.0)
    scores = w.length * model.num_heads / w.tensor
    # Softmax and its gradient in float32, both in the compute dtype too, and what dropout kept.
    per_score = 2 * 4 + 2 * bytes_each + (1 if model.attention_dropout else 0)
    stream = STREAMS * model.embed_dim / (w.tensor if w.sequence_parallel else 1)
    heads = STREAMS * model.num_heads * model.head_width / w.tensor
    attention = w.micro_tokens * (scores * per_score + bytes_each * (stream + heads))
    return max(attention, everything + bytes_each * w.micro_tokens * scores)


def _rounded(w: Workload) -> float:
    """The input and the gradient of an MLP's product in 8 bits, each with its axes in both orders.

    The tensor cores want the axis that is summed over innermost, and the gradients' sums have other axes.
    """
    if w.precision != "float8":
        return 0.0
    return 2 * w.micro_tokens * (w.model.embed_dim + w.model.mlp_width / w.tensor)


def _block_scores(w: Workload) -> float:
    """Of attention in plain operations: the weights of the blocks at work, their gradient and the scores'."""
    sizes = BLOCKS["gpu"]
    pairs = w.micro_batch / w.context * w.model.num_heads / w.tensor * min(w.length, sizes.longest) ** 2
    return 3 * 4 * min(pairs, sizes.scores)


def _made_beside(w: Workload) -> float:
    """What a layer's backward pass makes at its most beside what it would have kept.

    Of the MLP the gradient of what enters its last product, and of one without a gate the slope of its
    activation. Where the layer is computed again in one piece of code, also the gradients of the MLP's result
    and of its input, of a gated one one for each of its two products, and under tensor parallelism their sum.
    """
    model, bytes_each = w.model, 4 if w.model.dtype == "float32" else 2
    widths = (2 if model.gated else 3) * model.mlp_width / w.tensor
    if w.remat in ("full", "save_qkv_proj"):
        widths += ((4 if w.tensor > 1 else 3) if model.gated else 1) * model.embed_dim
    return w.micro_tokens * bytes_each * widths


def _layout_copies(w: Workload) -> tuple[float, float]:
    """Copies of saved activations that the backward pass wants with their axes in another order.

    Without recomputation, of float32 scores, whose first version is then freed; and under sequence
    parallelism of what was gathered along the sequence, which puts the sequence before the rows; at
    stage 3, whose matmuls stand each by itself, of half of that.
    """
    if w.remat != "none" or _is_unrolled(w):
        return 0.0, 0.0
    rows, layers = w.micro_batch / w.context, w.model.num_layers
    scores = 0.0 if w.fused_attention else 4 * w.length**2 * w.model.num_heads / w.tensor
    gathers = _trace(w, "none").whole if w.sequence_parallel and w.micro_batch > 1 else 0.0
    gathers *= 0.5 if w.zero == 3 else 1
    return rows * layers * scores, rows * layers * gathers


def logits(w: Workload) -> float:
    """Scores of a chunk in float32 and their gradient in the compute dtype."""
    vocab = w.model.padded_vocab_size / w.tensor
    chunk = w.loss_chunk
    return chunk * vocab * (4 + (4 if w.model.dtype == "float32" else 2))


def _is_unrolled(w: Workload) -> bool:
    return w.remat == "none" and w.model.scan_unroll >= w.model.num_layers


def layer_residuals(w: Workload) -> LayerResiduals:
    """What a layer keeps for its backward pass."""
    if not _is_unrolled(w):
        return _trace(w, policy(w))
    # In one piece of code the compiler keeps the activation, and the slope of one without a gate.
    layer, kept = _trace(w, "none"), 2 if w.model.gated else 3
    width = w.model.mlp_width * w.length * (4 if w.model.dtype == "float32" else 2)
    return dataclasses.replace(layer, split=layer.split + kept * width)


def policy(w: Workload) -> Remat:
    """What is computed again, as Stack has it."""
    # Other projects' are not run here.
    return cast("Remat", w.remat) if w.remat in get_args(Remat) else "none"


def _trace(w: Workload, remat: Remat) -> LayerResiduals:
    return trace_residuals(
        w.model,
        length=w.length,
        remat=remat,
        tensor=w.tensor,
        sequence_parallel=w.sequence_parallel,
        fused_attention=w.fused_attention,
        blocked_attention=w.blocked_attention,
        adapter=w.adapter,
        frozen=w.frozen,
    )
