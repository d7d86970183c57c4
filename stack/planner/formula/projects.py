"""Memory of a step as other projects lay it out: Megatron-LM, NeMo, nanotron, torchtitan.

Bytes per element are those of mixed precision as published; what is computed again is named by what it
does, since projects mean different things by one word (`stack.planner.formula.workload.Remat`).
"""

import math

from stack.models import model_cost
from stack.models.cost import Layers, Product
from stack.parallel.rules import TABLE
from stack.planner.formula.memory import MOMENTS
from stack.planner.formula.result import Memory
from stack.planner.formula.shapes import parameters
from stack.planner.formula.workload import Remat, Workload

WEIGHT, MASTER, GRADIENT = 2, 4, 4
"""Bytes: weights in bfloat16; master weights, each moment and summed gradients in float32."""

PENDING_GRADIENT = 1
"""Of a parameter: its bfloat16 gradient until it is added to the float32 sum, half of them at a time."""

LOGIT = 2 + 4 + 4
"""Of a score of the vocabulary: in bfloat16 from the matmul, in float32 for the loss, its gradient."""

FRAGMENTATION = 0.04
"""Of what is allocated: what a caching allocator holds besides; 2 to 10 % is usual."""

RUNTIME = 1.5e9
"""Bytes of context, workspaces and the network's buffers on every device; 1 to 3 GB is usual."""

_ACTIVATION = 2
"""Bytes, in 16 bits."""


def published_memory(workload: Workload) -> Memory:
    """Bytes per device under the usual layout of other frameworks, on the stage that holds most.

    Bfloat16 weights; float32 master weights and moments, split over fsdp x context from ZeRO stage 1;
    float32 sums of gradients, split from stage 2; at stage 3 only float32 shards at rest. Nothing of the
    logits is chunked. Stages of a pipeline are balanced by their matrix products, the head's included.

    Args:
        workload: the step.
    """
    work = workload.as_run()
    return max((_of_stage(work, rank) for rank in range(work.stage)), key=lambda memory: memory.total)


def layers_in_flight(workload: Workload, rank: int) -> float:
    """Layers whose activations a pipeline stage holds at once, each of one micro-batch.

    1F1B holds `stage - rank` micro-batches; interleaving (stage - rank - 1) x 2 + (v - 1) x stage + 1
    of the v times smaller parts, which on the first stage is 1 + (stage - 1) / (stage v) times as much
    (arXiv 2205.05198, section 4.2.3); GPipe all of them.
    """
    w, v = workload, workload.virtual_stages
    parts = w.stage - rank
    if w.schedule == "interleaved" and v > 1:
        parts = 2 * (w.stage - rank - 1) + (v - 1) * w.stage + 1
    if w.schedule == "gpipe":
        parts = v * w.accumulation
    return min(parts, v * w.accumulation) * w.model.num_layers / (w.stage * v)


def alternate_products(layers: Layers) -> list[tuple[Product, int]]:
    """The first, third, fifth product of a layer and so on, each with its own columns."""
    every = [(product, width) for product in layers.products for width in product.widths]
    return every[::2]


def _of_stage(w: Workload, rank: int) -> Memory:
    layers = _balance(w)[rank]
    parts = parameters(w.model)
    layer = sum(p.shard(tensor=w.tensor) for p in parts.layers) / w.model.num_layers
    table = parts.words.shard(tensor=w.tensor)
    first, last = rank == 0, rank == w.stage - 1
    elements = layers * layer
    if first:
        elements += sum(p.shard(tensor=w.tensor) for p in parts.embedding)
    if last and not (first and w.model.tied_embeddings):
        elements += table
    ways = w.fsdp * w.context
    alone = w.data * w.expert * ways == 1
    weights = elements * (MASTER / ways if w.zero == 3 else WEIGHT)
    states = MOMENTS[w.optimizer] * MASTER + (0 if w.zero == 3 else MASTER)
    optimizer = elements * states / (ways if w.zero else 1)
    gradients = elements * GRADIENT / (ways if w.zero >= 2 else 1)
    pending = elements * PENDING_GRADIENT if w.zero < 3 and not alone else 0.0
    in_flight = 0.0
    if w.zero == 3:
        # Two layers with their gradients; what is in no layer stays gathered from its first use to its last.
        in_flight = 2 * (WEIGHT + GRADIENT) * layer + WEIGHT * (elements - layers * layer)
    per_layer = w.micro_tokens * activations_per_token(w, w.remat)
    activations = per_layer * layers_in_flight(w, rank) * layers * w.stage / w.model.num_layers
    # Of one layer that is computed again, which may be every second one only.
    again = "full" if w.remat == "alternate_layers" else w.remat
    temporaries = activations_per_token(w, "none") - activations_per_token(w, again)
    temporaries *= w.micro_tokens
    logits = w.micro_tokens * w.model.padded_vocab_size / w.tensor * LOGIT if last else 0.0
    everything = weights + optimizer + gradients + pending + in_flight + activations + temporaries + logits
    host = optimizer if w.offload_optimizer else 0.0
    return Memory(
        parameters=weights,
        gradients=gradients + pending,
        optimizer=optimizer - host,
        activations=activations,
        logits=logits,
        temporaries=temporaries,
        collectives=in_flight,
        reserve=RUNTIME + FRAGMENTATION * (everything - host),
        host=host,
    )


def _balance(w: Workload) -> list[int]:
    """Layers of each stage, such that none does much more than its share of the matrix products."""
    count = w.model.num_layers
    head = w.model.padded_vocab_size * w.model.embed_dim
    layer = sum(p.size for p in parameters(w.model).layers if p.is_matrix) / count
    if w.virtual_stages > 1:
        # Parts of equal size, as many on each stage.
        return [math.ceil(count / w.stage)] * w.stage
    share = (count + head / layer) / w.stage
    bounds = [min(count, math.ceil(share * (rank + 1))) for rank in range(w.stage)]
    return [end - start for start, end in zip([0, *bounds[:-1]], [*bounds[:-1], count], strict=True)]


def activations_per_token(w: Workload, remat: Remat) -> float:
    """Bytes per token that one layer, or the mean of two, keeps for its backward pass on one device.

    Per token of width h: the inputs of two norms and their results, 8h; queries, keys and values, twice
    for what the rotation writes, and the attention's result; the MLP's projections, its activation and
    their product. Without a fused kernel five bytes per score besides, for softmax, dropout and its mask
    (arXiv 2205.05198), unless attention is computed again. Tensor parallelism splits all but the 8h,
    sequence parallelism those too.

    Args:
      w: gives the model and the ways it is split.
      remat: what is computed again.
    """
    if remat == "alternate_layers":
        return (activations_per_token(w, "none") + activations_per_token(w, "full")) / 2
    model, tensor = w.model, w.tensor
    queries, keys = model.num_heads * model.head_width, model.kv_heads * model.head_width
    stream = _ACTIVATION * model.embed_dim / (tensor if w.sequence_parallel else 1)
    projections = _ACTIVATION * (queries + 2 * keys) / tensor
    attention = _ACTIVATION * queries / tensor
    if remat == "full":
        return stream
    if remat == "save_qkv_proj":
        return stream + projections
    if remat == "alternate_products":
        return stream + attention + sum(_result(w, *one) for one in alternate_products(_layers(w)))
    mlp = _ACTIVATION * (4 if model.gated else 2) * model.mlp_width / tensor
    if remat == "dots":
        return stream + projections + _ACTIVATION * model.embed_dim + mlp / 2
    rotation = _ACTIVATION * (queries + keys) / tensor if model.position == "rotary" else 0.0
    scores = 5 * model.num_heads * w.length / tensor
    if w.fused_attention or remat == "attention_core":
        scores = 0.0
    return 4 * stream + projections + rotation + attention + mlp + scores


def _layers(w: Workload) -> Layers:
    """Any of the model's layers: their products are alike."""
    return model_cost(w.model).stacks[0]


def _result(w: Workload, product: Product, width: int) -> float:
    """Bytes per token of a product's result on one device."""
    split = "tensor" in TABLE[product.columns[0]] or w.sequence_parallel
    return _ACTIVATION * width / (w.tensor if split else 1)
