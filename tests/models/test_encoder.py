"""Encoders have as many parameters as the models they are named after."""

import jax
import numpy as np
import pytest
from flax import nnx

from stack.config import EncoderConfig
from stack.models.encoder import Encoder

LARGE = {"num_layers": 24, "embed_dim": 1024, "num_heads": 16}
ROBERTA = {"vocab_size": 50265, "first_position": 2, "num_types": 1}
UNILM = LARGE | {"vocab_size": 28996}


def parameters(**fields) -> int:
    """Without the rows that pad the vocabulary."""
    config = EncoderConfig.model_validate(
        {"vocab_size": 30522, "max_length": 512, "norm_placement": "post", "num_types": 2, "mlp": "gelu"}
        | {"vocab_multiple": 1}
        | fields
    )
    params = nnx.state(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


# Counted by transformers 5.24.0, of BertForMaskedLM and BertModel, RobertaForMaskedLM and RobertaModel.
@pytest.mark.parametrize(
    ("fields", "with_head", "with_pooler"),
    [
        ({}, 109_514_298, 109_482_240),
        (LARGE, 335_174_458, 335_141_888),
        (ROBERTA, 124_697_433, 124_645_632),
        (ROBERTA | LARGE, 355_412_057, 355_359_744),
        # UniLM is a BERT-large of the cased vocabulary; here with a type for each kind of attention.
        (UNILM, 333_610_308, 333_579_264),
        (UNILM | {"num_types": 4}, 333_612_356, 333_581_312),
    ],
    ids=["bert-base", "bert-large", "roberta-base", "roberta-large", "unilm-large", "unilm-large-4-types"],
)
def test_published_encoders_have_as_many_parameters_as_transformers_counts(fields, with_head, with_pooler):
    assert parameters(**fields) == with_head
    bare = {"head_transform": False, "head_bias": False, "pooler": True}
    assert parameters(**fields, **bare) == with_pooler
    # Both, as the checkpoint of the authors has them.
    width = fields.get("embed_dim", 768)
    assert parameters(**fields, pooler=True) == with_head + width * width + width
