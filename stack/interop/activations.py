"""Names of activations, here and in transformers."""

FROM_HF = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
TO_HF = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
