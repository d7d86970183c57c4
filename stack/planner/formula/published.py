"""Memory and traffic by published formula: the records a planner is held to.

They describe mixed-precision Adam as published, 16-bit weights and gradients beside float32 master
weights and moments. Stack's own step keeps other things; `stack.planner.formula.memory` counts those.
"""

from typing import Literal

Recompute = Literal["none", "selective", "full"]


def zero_bytes_per_parameter(stage: int, ways: int) -> float:
    """Bytes of model state per parameter and device (arXiv 1910.02054, section 5 and figure 1).

    2 each of weight and gradient in 16 bits, 12 of float32 weight, momentum and variance.

    Args:
        stage: of ZeRO: 0 splits nothing, 1 the optimizer's 12, 2 the gradient too, 3 all.
        ways: data-parallel degree N.
    """
    split = {0: 0, 1: 12, 2: 14, 3: 16}[stage]
    return 16 - split + split / ways


def zero_elements_sent(parameters: float, stage: int) -> float:
    """Elements each rank sends per step (arXiv 1910.02054, section 7): 2P, and 3P at stage 3.

    A reduce-scatter of gradients and an all-gather of weights, which at stage 3 is done twice.

    Args:
        parameters: P.
        stage: of ZeRO.
    """
    return (3 if stage == 3 else 2) * parameters


def activation_bytes_per_layer(
    length: int,
    micro_batch: int,
    hidden: int,
    heads: int,
    *,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> float:
    """Bytes of activations of one transformer layer on one device (arXiv 2205.05198, table 2).

    Args:
        length: s, tokens.
        micro_batch: b, rows.
        hidden: h.
        heads: a.
        tensor: t, ways of tensor parallelism.
        sequence_parallel: norms and dropout split over `tensor` too.
        recompute: `selective` leaves out the attention's scores, `full` all but the layer's input,
            whose 2sbh are given whole, as published.
    """
    per_layer = length * micro_batch * hidden
    if recompute == "full":
        return 2 * per_layer
    stream = 10 / (tensor if sequence_parallel else 1)
    scores = 0 if recompute == "selective" else 5 * heads * length / (hidden * tensor)
    return per_layer * (stream + 24 / tensor + scores)


def interleaving_factor(stages: int, virtual_stages: int) -> float:
    """How many times more activations an interleaved pipeline holds (arXiv 2205.05198, section 4.2.3).

    Args:
        stages: p.
        virtual_stages: m, parts of the model on each stage.
    """
    return 1 + (stages - 1) / (stages * virtual_stages)


def gpt_parameters(layers: int, hidden: int, vocabulary: int, length: int) -> float:
    """Parameters of a GPT with tied embeddings and biases (arXiv 2104.04473, equation 2).

    12 l h^2 (1 + 13 / 12h + (V + s) / 12lh); the final norm's 2h are left out, as published.

    Args:
        layers: l.
        hidden: h.
        vocabulary: V, padding included.
        length: s, rows of the position table.
    """
    vectors = 13 / (12 * hidden)
    tables = (vocabulary + length) / (12 * layers * hidden)
    return 12 * layers * hidden**2 * (1 + vectors + tables)
