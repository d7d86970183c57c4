"""Seconds of one training step, from shapes, a layout and a chip.

Every part is a physical estimate: matrix products at a share of the peak that grows with the width of
the weights, attention at a share of its own, elementwise work at the memory's bandwidth, collectives at
a share of the links, and a gap before every kernel. The shares are those of the chip's generation
(`Efficiency`); nothing here knows a model or a source by name.

Pipelines wait and send as `stack.planner.formula.stages` says. Ring collectives move (n - 1) / n of the data
over each link, an all-reduce twice that; over several nodes, all chips of a group in a node share the traffic
between nodes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

from stack.hardware.chip import Hardware, Precision
from stack.models import model_cost
from stack.models.cost import Axis, Layers, Product
from stack.models.flops import keys_per_token
from stack.parallel.int8 import LONGEST
from stack.parallel.rules import TABLE
from stack.planner.formula.links import ring_seconds
from stack.planner.formula.memory import elements_at_rest, optimizer_numbers
from stack.planner.formula.projects import alternate_products
from stack.planner.formula.result import Communication, Time
from stack.planner.formula.stages import Stages, elements, own_stages, published_stages
from stack.planner.formula.workload import Workload
from stack.step.muon import ITERATIONS

_BYTES = 2
"""Of an activation, and of a weight as it is used."""

_INT8_BYTES = 1 + 4 / LONGEST
"""Of a number in 8 bits between nodes, with its share of a scale."""

_KERNELS = 12
"""Kernels of a layer's forward pass: four products or five, attention, two norms, the rest fused."""

_LOGIT_BYTES = 16
"""Traffic per score in the loss: written in float32, read for the softmax, its gradient written and read."""

_TILE = 64
"""Columns that the tensor cores multiply at once, at least."""

_SCORE_BYTES = 16
"""The same per attention score, forward, where the kernel writes them all to memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds on one device, by what they are spent on, one after the other."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    launch: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matmul + self.attention + self.memory + self.launch

    def __add__(self, other: "Seconds") -> "Seconds":
        """One, then the other."""
        return Seconds(
            matmul=self.matmul + other.matmul,
            attention=self.attention + other.attention,
            memory=self.memory + other.memory,
            launch=self.launch + other.launch,
        )

    def __mul__(self, times: float) -> "Seconds":
        """Several times."""
        return Seconds(
            matmul=self.matmul * times,
            attention=self.attention * times,
            memory=self.memory * times,
            launch=self.launch * times,
        )


def step_time(work: Workload, chip: Hardware) -> Time:
    """The time of one optimizer step, by what it is spent on."""
    return _step(work, chip, own_stages(work, chip))


def published_time(work: Workload, chip: Hardware) -> Time:
    """The same where the pipeline is another project's."""
    work = work.as_run()
    return _step(work, chip, published_stages(work, chip))


def _step(work: Workload, chip: Hardware, stages: Stages) -> Time:
    base, added, head = _layer_forward(work, chip), _added(work, chip), _head(work, chip)
    forward = base + added
    recomputation, backward = _recomputation(work, forward), _backward(work, base) + added * 2
    layers, micro_batches = stages.layers, work.accumulation
    layer = forward + recomputation + backward
    # All stages run side by side; the last has the head as well and sets the pace.
    busy = (layer * layers + head) * micro_batches
    inside = {
        "tensor": _tensor(
            work, chip, passes=2 if work.remat == "none" else 2 + recomputation.matmul / forward.matmul
        ),
        "context": _context(work, chip, layer.attention),
    }
    per_micro_batch = layer.total * layers + sum(part.exposed for part in inside.values()) * layers
    communication = {name: part * (layers * micro_batches) for name, part in inside.items()}
    communication["stage"] = stages.communication
    communication["fsdp"] = _fsdp(
        work, chip, stages, forward.total, (recomputation + backward).total, head.total
    )
    communication["data"] = _data(work, chip, backward.total * stages.beside)
    communication["average"] = _average(work, chip)
    communication["host"] = _host_memory(work, chip, layer.total)
    return Time(
        matmul=busy.matmul,
        attention=busy.attention,
        memory_bound=busy.memory,
        communication={name: part for name, part in communication.items() if part.bytes},
        bubble=per_micro_batch * stages.idle,
        optimizer=_optimizer(work, chip) * (work.instances // work.slices),
        host=busy.launch,
    )


def _layer_forward(work: Workload, chip: Hardware) -> Seconds:
    """The mean layer, forward, one micro-batch, on one device; collectives left out."""
    stacks = model_cost(work.model).stacks
    number = sum(layers.number for layers in stacks)
    shares = [_forward(work, chip, layers) * (layers.number / number) for layers in stacks]
    return functools.reduce(Seconds.__add__, shares)


def _forward(work: Workload, chip: Hardware, layers: Layers) -> Seconds:
    """One layer of a stack."""
    tokens = work.micro_tokens
    matmul = sum(_product(work, product, work.precision, chip) for product in layers.products)
    # What is as wide as the residual stream every device does all of, under plain tensor parallelism.
    elements = sum(
        size / (work.tensor if _is_split(name) or work.sequence_parallel else 1)
        for name, size in layers.elementwise
    )
    traffic = elements * _BYTES
    if work.precision == "float8":  # Each operand is read in 16 bits and written in 8, both ways round.
        traffic += 4 * sum(_size(work, product.inner) for product in layers.products)
    part = layers.attention
    keys = keys_per_token(part, work.length, "causal")
    scores = tokens * part.heads / work.tensor * keys
    attention = 4 * scores * part.head_dim / (_peak(chip, "bfloat16") * chip.efficiency.attention)
    if not work.fused_attention:
        attention += scores * 2 * _SCORE_BYTES / _bandwidth(chip)  # No half of the mask is left out.
    elif work.blocked_attention:  # The blocks that are looked at are written too. Not measured.
        attention += scores * _SCORE_BYTES / _bandwidth(chip)
    return Seconds(
        matmul=matmul,
        attention=attention,
        memory=tokens * traffic / _bandwidth(chip),
        launch=_KERNELS * chip.efficiency.launch_seconds,
    )


def _added(work: Workload, chip: Hardware) -> Seconds:
    """What adapters add to a layer's forward pass: two narrow products each, and a sum.

    Few columns are a tile of the tensor cores all the same; most of the time goes into reading what is wide.
    """
    matmul = elements = 0.0
    added, rows = work.parameters.added, work.micro_tokens
    for part in added:
        rank = dict(part.axes)["rank"]
        wide = math.prod(_size(work, axis) for axis in part.axes) / rank
        flops = 2 * rows * max(rank, _TILE) * wide
        read = rows * (wide + rank) * _BYTES
        matmul += max(flops / (_peak(chip, work.precision) * chip.efficiency.matmul), read / _bandwidth(chip))
        elements += 2 * wide if part.axes[0][0] == "rank" else 0
    return Seconds(
        matmul=matmul,
        memory=rows * elements * _BYTES / _bandwidth(chip),
        launch=len(added) * chip.efficiency.launch_seconds,
    )


def _layers(work: Workload) -> Layers:
    """Any of the model's layers: their products are alike."""
    return model_cost(work.model).stacks[0]


def _is_split(name: str) -> bool:
    return "tensor" in TABLE[name]


def _size(work: Workload, axis: Axis) -> float:
    """Of an axis on one device."""
    name, size = axis
    return size / (work.tensor if _is_split(name) else 1)


def _product(work: Workload, product: Product, precision: Precision, chip: Hardware) -> float:
    """Seconds of one product of a micro-batch on one device."""
    inner, columns = _size(work, product.inner), _size(work, product.columns)
    tokens = work.scored_tokens if product.tokens == "masked" else work.micro_tokens
    return product_seconds(tokens, columns, inner, precision, chip)


def product_seconds(rows: float, columns: float, inner: float, precision: Precision, chip: Hardware) -> float:
    """A product [rows, inner] x [inner, columns] with a weight, in seconds.

    The share of the peak is that of the largest products over 1 + half (1 / columns + 1 / inner): what
    surrounds a product, prologues, partial waves and unfused neighbours, weighs more the narrower the
    weight. Few rows are bound by reading the weight.
    """
    share = chip.efficiency.matmul / (1 + chip.efficiency.matmul_half * (1 / columns + 1 / inner))
    read = (rows * inner + inner * columns + rows * columns) * _BYTES / _bandwidth(chip)
    return max(2 * rows * columns * inner / (_peak(chip, precision) * share), read)


def _peak(chip: Hardware, precision: Precision) -> float:
    if precision in chip.peak_flops:
        return chip.peak_flops[precision]
    # A TPU multiplies float32 in bfloat16, unless it is told to do it in several passes.
    others = ("float16", "float32", "bfloat16")
    return next(chip.peak_flops[name] for name in others if name in chip.peak_flops)


def _bandwidth(chip: Hardware) -> float:
    return chip.memory_bandwidth * chip.efficiency.memory


def _recomputation(work: Workload, forward: Seconds) -> Seconds:
    """What the backward pass computes again of a layer."""
    if work.remat == "none" or not work.parameters.reaches_layers:
        return Seconds()
    if work.remat == "full":
        return forward
    if work.remat == "attention_core":
        return Seconds(attention=forward.attention, launch=forward.launch / _KERNELS)
    if work.remat == "alternate_layers":
        return forward * 0.5
    products = _layers(work).products
    if work.remat == "alternate_products":
        share = sum(product.inner[1] * width for product, width in alternate_products(_layers(work)))
        share /= sum(product.size for product in products)
        return dataclasses.replace(forward, matmul=forward.matmul * (1 - share), attention=0.0)
    share = sum(product.size for product in products if work.remat == "dots" or product.name == "qkv_proj")
    share /= sum(product.size for product in products)
    return dataclasses.replace(forward, matmul=forward.matmul * (1 - share))


def _backward(work: Workload, forward: Seconds) -> Seconds:
    """Two products for each, attention's five for its two (arXiv 2307.08691), twice the traffic.

    One product for each weight that is not trained; none where no gradient goes.
    """
    parts = work.parameters
    if not parts.reaches_layers:
        return Seconds()
    attention = 2.5 if work.fused_attention else 2
    matrices = [part for part in parts.layers if part.is_matrix and "rank" not in dict(part.axes)]
    frozen = sum(part.size for part in matrices if not part.trained) / sum(part.size for part in matrices)
    return dataclasses.replace(
        forward * 2, matmul=forward.matmul * (2 - frozen), attention=forward.attention * attention
    )


def _head(work: Workload, chip: Hardware) -> Seconds:
    """Logits, loss and their gradients of one micro-batch; never in float8."""
    precision = "bfloat16" if work.precision == "float8" else work.precision
    head = model_cost(work.model).head
    # A square layer before the table gives no scores.
    columns = sum(_size(work, product.columns) for product in head if product.columns[0] == "vocab")
    scores = work.scored_tokens * columns
    return Seconds(
        matmul=(3 if work.parameters.scores.trained else 2)
        * sum(_product(work, product, precision, chip) for product in head),
        memory=scores * _LOGIT_BYTES / _bandwidth(chip),
    )


def _tensor(work: Workload, chip: Hardware, *, passes: float) -> Communication:
    """One layer, one micro-batch: two all-reduces each pass (arXiv 1909.08053), or as much in halves."""
    size = work.micro_tokens * work.model.embed_dim * _BYTES
    seconds = 2 * passes * 2 * ring_seconds(size, work.tensor, 1, chip)
    overlap = chip.efficiency.overlap if work.overlapped_tensor_parallel else 0.0
    volume = 2 * passes * 2 * size * (work.tensor - 1) / work.tensor
    return Communication(bytes=volume, seconds=seconds, exposed=seconds * (1 - overlap))


def _context(work: Workload, chip: Hardware, attention: float) -> Communication:
    """One layer, one micro-batch: keys and values go round, and their gradients come back."""
    heads = 2 * work.model.kv_heads * work.model.head_width / work.tensor
    size = 3 * work.micro_batch * work.length * heads * _BYTES
    seconds = ring_seconds(size, work.context, work.tensor, chip)
    return _beside(size * (work.context - 1) / work.context, seconds, attention, chip)


def _at_rest(work: Workload) -> float:
    """Elements of the matrices that are trained, split over `tensor` and the stages."""
    return elements(work, work.parameters, trained=True) / work.stage


def _fsdp(
    work: Workload, chip: Hardware, stages: Stages, forward: float, rest: float, head: float
) -> Communication:
    """A step's gathers of weights and scatters of gradients (arXiv 1910.02054), by ZeRO stage."""
    stride = work.tensor * work.context * work.expert * work.stage
    ways = work.fsdp
    share = (ways - 1) / ways
    layers, micro_batches, parts = stages.layers, work.accumulation, work.parameters
    layer, layer_trained = (
        elements(work, parts.layers, trained=only) / work.model.num_layers for only in (False, True)
    )
    ends, ends_trained = (elements(work, parts.ends, trained=only) for only in (False, True))
    reduced = (layer_trained * layers + ends_trained * stages.ends) * work.reduce_bytes
    if work.zero == 0:
        size = reduced
        seconds = 2 * ring_seconds(size, ways, stride, chip)
        return _beside(2 * size * share, seconds, rest * stages.beside, chip)
    if work.zero < 3:
        size, scatters = layer * layers + ends * stages.ends, micro_batches if work.zero == 2 else 1
        gather = ring_seconds(size * _BYTES, ways, stride, chip)
        scatter = ring_seconds(reduced, ways, stride, chip)
        one = _beside(size * _BYTES * share, gather, forward * stages.beside, chip)
        return _sum((one, _beside(reduced * share, scatter, rest * stages.beside, chip) * scatters))
    every = []
    once = 1 if work.holds_tables else micro_batches
    for size, trained, bytes_each, before, after, times in (
        (layer, layer_trained, 1 if work.float8_gathers else _BYTES, forward, rest, layers * micro_batches),
        (ends, ends_trained, _BYTES, 0.0, head, once),
    ):
        gather = ring_seconds(size * bytes_each, ways, stride, chip)
        scatter = ring_seconds(trained * work.reduce_bytes, ways, stride, chip)
        both = (size * bytes_each + trained * work.reduce_bytes) * share
        every.append(_beside(size * bytes_each * share, gather, before, chip) * times)
        every.append(_beside(both, gather + scatter, after, chip) * times)
    return _sum(every)


def _data(work: Workload, chip: Hardware, backward: float) -> Communication:
    """An all-reduce of what each device holds of the gradient, beside the last backward pass.

    With a second shard, a gather of weights before the first forward pass and a scatter of gradients, which
    of several micro-batches comes after the last of them.
    """
    ways = work.data // work.slices * work.expert
    stride = work.tensor * work.context * work.stage * work.fsdp
    if work.split_data > 1:
        parts = []
        for trained, dtype, bytes_each, beside in (
            (False, work.gather_dtype, _BYTES, 0.0),
            (True, work.scatter_dtype, work.reduce_bytes, backward if work.accumulation == 1 else 0.0),
        ):
            size = elements(work, work.parameters, trained=trained) / work.fsdp
            size *= _INT8_BYTES if dtype == "int8" else bytes_each
            seconds = ring_seconds(size, ways, stride, chip)
            parts.append(_beside(size * (ways - 1) / ways, seconds, beside, chip))
        return _sum(parts)
    size = _at_rest(work) * work.reduce_bytes / (work.fsdp if work.zero else 1)
    seconds = 2 * ring_seconds(size, ways, stride, chip)
    return _beside(2 * size * (ways - 1) / ways, seconds, backward, chip)


def _average(work: Workload, chip: Hardware) -> Communication:
    """A step's share of the all-reduce of parameters in float32 that ends a period; nothing is beside it."""
    stride = work.tensor * work.context * work.stage * work.fsdp * work.expert * (work.data // work.slices)
    size = 4 * elements_at_rest(work)
    seconds = 2 * ring_seconds(size, work.slices, stride, chip) / work.average_every
    volume = 2 * size * (work.slices - 1) / work.slices / work.average_every
    return Communication(bytes=volume, seconds=seconds, exposed=seconds)


def _host_memory(work: Workload, chip: Hardware, layer: float) -> Communication:
    """What goes to host memory and comes back: moments once a step, a layer's input every micro-batch."""
    none = Communication(bytes=0.0, seconds=0.0, exposed=0.0)
    parts = [none]
    if work.offload_optimizer:
        size = 2 * 4 * optimizer_numbers(work)
        seconds = size / chip.host_bandwidth
        parts.append(Communication(bytes=size, seconds=seconds, exposed=seconds))
    if work.offload_activations:
        ways = work.tensor if work.sequence_parallel else 1
        size = 2 * work.micro_tokens * work.model.embed_dim * _BYTES / ways
        one = _beside(size, size / chip.host_bandwidth, layer, chip)
        parts.append(one * (work.model.num_layers / work.stage * work.accumulation))
    return _sum(parts)


def _optimizer(work: Workload, chip: Hardware) -> float:
    """The update reads weight, gradient and moments in float32, and writes all but the gradient.

    The weight is written once more as it is used; of an average the old is read and the new written.
    """
    weights = _at_rest(work) / (work.fsdp * work.split_data if work.zero else 1)
    numbers = optimizer_numbers(dataclasses.replace(work, stage=1)) / work.stage + work.ema * weights
    update = (weights * (3 * 4 + _BYTES) + numbers * 2 * 4) / _bandwidth(chip)
    return update + (_muon(work, chip) if work.optimizer == "muon" else 0.0)


def _muon(work: Workload, chip: Hardware) -> float:
    """Every matrix made orthogonal, whole on one of the devices that share it, after its way there and back.

    An iteration is x x^T of the shorter side, its square, and the product with x; every replica that holds
    the same shards does the same. A stack that does not divide leaves some devices with nothing.
    """
    seconds = 0.0
    for part in work.parameters.layers + work.parameters.head:
        if part.role != "matrix" or not part.trained:
            continue
        sizes = [size for _, size in part.axes]
        rows = sizes[0] if part.axes[0][0] == "embed" else math.prod(sizes[:-1])
        short, long = sorted((rows, math.prod(sizes) // rows))
        precision = "bfloat16" if work.precision == "float8" else work.precision
        step = sum(
            product_seconds(short, columns, inner, precision, chip)
            for columns, inner in ((short, long), (short, short), (long, short))
        )
        fsdp = work.fsdp if work.zero else 1
        ways = {"tensor": part.shard() / part.shard(tensor=work.tensor)}
        second = part.shard(fsdp=fsdp, tensor=work.tensor)
        ways["fsdp"] = part.shard(tensor=work.tensor) / second
        ways["data"] = second / part.shard(fsdp=fsdp, data=work.split_data, tensor=work.tensor)
        matrices = math.ceil(part.copies / work.stage / math.prod(ways.values()))
        size = matrices * short * long * _BYTES
        stride = work.tensor * work.context * work.expert * work.stage
        moves = ring_seconds(size, round(ways["fsdp"]), stride, chip)
        moves += ring_seconds(size, round(ways["tensor"]), 1, chip)
        moves += ring_seconds(size, round(ways["data"]), stride * fsdp, chip)
        seconds += ITERATIONS * matrices * step + 2 * moves
    return seconds


def _beside(volume: float, seconds: float, arithmetic: float, chip: Hardware) -> Communication:
    """A collective that runs beside arithmetic: what goes on longer shows, and a share of what does not."""
    longer = max(0.0, seconds - arithmetic)
    exposed = longer + (seconds - longer) * (1 - chip.efficiency.overlap)
    return Communication(bytes=volume, seconds=seconds, exposed=exposed)


def _sum(parts: Iterable[Communication]) -> Communication:
    parts = tuple(parts)
    return Communication(
        bytes=sum(part.bytes for part in parts),
        seconds=sum(part.seconds for part in parts),
        exposed=sum(part.exposed for part in parts),
    )
