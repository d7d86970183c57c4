"""A process that serves PyTorch's contestants of one case: `PYTHON torch_child.py REQUEST`.

It runs under any Python that has PyTorch, from 3.11 and 2.6 on, and of Stack it reads only what needs nothing
but NumPy.
"""

import inspect
import json
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

if "stack" not in sys.modules:  # Of the interpreter's own packages none may be hidden by those beside Stack.
    stack = types.ModuleType("stack")
    stack.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["stack"] = stack

from stack.bench import data
from stack.bench.peers import torch_loss, torch_step
from stack.bench.serve import Ready, UnableError, serve

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LIMITS = {"bfloat16": 0.02, "float32": 1e-4}
_CHECKED = 256
"""Queries, or tokens, that are compared with the formula in float32."""
_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_AUTOTUNED = "max-autotune-no-cudagraphs"

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries, keys and values [batch, heads, length, head_dim] -> the same shape as queries."""


def main(request: dict[str, Any]) -> None:
    """Serves a case."""
    spec = request["spec"]
    on_gpu = spec["platform"] == "gpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    suites = {
        "matmul": _products,
        "attention": _attentions,
        "cross_entropy": _losses,
        "step": torch_step.makers,
    }
    makers = suites[request["suite"]](spec, device)
    serve({f"torch {name}": make for name, make in makers.items()}, block_seconds=request["block_seconds"])


def queued(function: Callable[..., Any], *operands: Any) -> Callable[[int], None]:
    """Runs a function so many times; the device is waited for at the end."""

    def run(iterations: int) -> None:
        for _ in range(iterations):
            function(*operands)
        synchronise()

    return run


def synchronise() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _products(spec: dict[str, Any], device: torch.device) -> dict[str, Callable[[], Ready]]:
    return {name: partial(_product, name, product, device) for name, product in spec["products"].items()}


def _product(name: str, product: dict[str, Any], device: torch.device) -> Ready:
    rows, inner, columns = product["shape"]
    precision = product["precision"]
    left, right = (
        torch.from_numpy(data.normal(seed, *shape)).to(device)
        for seed, shape in enumerate(((rows, inner), (inner, columns)))
    )
    if precision == "float8":
        # The right operand lies column by column, as cuBLAS wants it.
        left, right = (x.to(torch.float8_e4m3fn) for x in (left, right.t().contiguous()))
        one = torch.ones((), device=device)
        multiply = partial(
            torch._scaled_mm, left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
        exact = left[:_CHECKED].float() @ right.t().float()
    else:
        left, right = left.to(_DTYPES[precision]), right.to(_DTYPES[precision])
        multiply = partial(torch.matmul, left, right)
        exact = left[:_CHECKED].float() @ right.float()
    error = _error(multiply()[:_CHECKED], exact)
    limit = 1e-3 if precision == "float32" else 1e-2
    facts = {"ok": error <= limit, "error": error, "limit": limit, "precision": precision, "group": name}
    return Ready(queued(multiply), facts | {"flops_full": 2 * rows * inner * columns})


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over that of what is right."""
    return float(torch.linalg.norm(result.float() - exact) / torch.linalg.norm(exact))


def _attentions(spec: dict[str, Any], device: torch.device) -> dict[str, Callable[[], Ready]]:
    """On a GPU whole rows by FlashAttention and cuDNN, packed ones by FlexAttention and FlashAttention."""
    if device.type == "cpu":
        kinds = ["masked"] if spec["packed"] else ["sdpa"]
    else:
        kinds = ["flex", "varlen"] if spec["packed"] else [*_BACKENDS]
    passes = {"forward": 1.0, "with gradients": 3.5}
    return {
        f"{kind}, {which}": partial(_prepare_attention, kind, which, times, spec, device)
        for kind in kinds
        for which, times in passes.items()
    }


def _prepare_attention(
    kind: str, which: str, times: float, spec: dict[str, Any], device: torch.device
) -> Ready:
    rows, length, width, dtype = spec["rows"], spec["length"], spec["head_dim"], spec["dtype"]
    shapes = [(rows, length, spec[heads], width) for heads in ("heads", "kv_heads", "kv_heads", "heads")]
    query, key, value, cotangent = (
        torch.from_numpy(data.normal(seed, *shape)).to(device, _DTYPES[dtype]).transpose(1, 2)
        for seed, shape in enumerate(shapes)
    )
    segments = torch.from_numpy(data.segments(rows, length, packed=spec["packed"])).to(device)
    operands = [x.requires_grad_() for x in (query, key, value)]
    attend = attention(kind, segments, grouped=spec["heads"] != spec["kv_heads"])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attend(*operands)

    def with_gradients() -> tuple[torch.Tensor, ...]:
        result = attend(*operands)
        return (result, *torch.autograd.grad(result, operands, cotangent))

    try:
        results = (forward(),) if which == "forward" else with_gradients()
    except RuntimeError as error:
        if "No available kernel" in str(error) or "Expected" in str(error):
            raise UnableError(str(error)) from error
        raise
    exact = _exact_attention(query.detach(), key.detach(), value.detach(), cotangent, segments)
    names = ("result", "query")
    errors = {
        name: _error(result[:1, :, -_CHECKED:], right)
        for name, result, right in zip(names, results, exact, strict=False)
    }
    worst = max(errors, key=lambda name: errors[name])
    facts = {
        "ok": all(error <= _LIMITS[dtype] for error in errors.values()),
        "error": errors[worst],
        "error_of": worst,
        "limit": _LIMITS[dtype],
        "precision": dtype,
        "flops_causal": spec["flops_causal"] * times,
        "flops_full": spec["flops_full"] * times,
        "group": which,
    }
    return Ready(queued(forward if which == "forward" else with_gradients), facts)


def attention(kind: str, segments: torch.Tensor, *, grouped: bool) -> Attention:
    """Causal attention within documents.

    Args:
        kind: `flash` or `cudnn`, of whole rows; `flex` or `varlen`, of documents; `sdpa` and `masked`, the
            same two on a CPU.
        segments: [batch, length], number of each token's document.
        grouped: whether several queries share a key.

    Raises:
        UnableError: this PyTorch has no such attention.
    """
    call = partial(functional.scaled_dot_product_attention, enable_gqa=grouped)
    if kind in ("sdpa", "flash", "cudnn"):
        backends = _BACKENDS.get(kind)

        def whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if backends is None:
                return call(query, key, value, is_causal=True)
            with sdpa_kernel(backends):
                return call(query, key, value, is_causal=True)

        return whole
    if kind == "masked":
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        return lambda query, key, value: call(query, key, value, attn_mask=mask)
    if kind == "flex":
        return flex(segments, grouped=grouped)
    return _varlen(segments, grouped=grouped)


def flex(segments: torch.Tensor, *, grouped: bool) -> Attention:
    """FlexAttention, compiled, which leaves out blocks of keys that no query of a block sees."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, mode=_AUTOTUNED)
    mask = torch_step.block_mask(segments)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=grouped)


def _varlen(segments: torch.Tensor, *, grouped: bool) -> Attention:
    """FlashAttention over documents one after the other, without rows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UnableError("this PyTorch has no torch.nn.attention.varlen") from error
    rows, length = segments.shape
    numbers = segments + torch.arange(rows, device=segments.device)[:, None] * (length + 1)
    sizes = torch.unique_consecutive(numbers.flatten(), return_counts=True)[1]
    ends = functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(sizes.max())
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        mixed = varlen_attn(*flat, ends, ends, longest, longest, **options)
        return mixed.unflatten(0, (rows, length)).transpose(1, 2)

    return attend


def _exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cotangent: torch.Tensor,
    segments: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of the first row's last queries by the formula in float32, and their gradient."""
    length, shared = key.shape[2], query.shape[1] // key.shape[1]
    last = query[:1, :, -_CHECKED:].float().requires_grad_()
    keys, values = (x[:1].float().repeat_interleave(shared, dim=1) for x in (key, value))
    places = torch.arange(length, device=query.device)
    seen = places[-_CHECKED:, None] >= places
    seen &= segments[0, -_CHECKED:, None] == segments[0]
    scores = last @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    result = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
    return result, torch.autograd.grad(result, last, cotangent[:1, :, -_CHECKED:].float())[0]


def _losses(spec: dict[str, Any], device: torch.device) -> dict[str, Callable[[], Ready]]:
    return {name: partial(_prepare_loss, name, spec, device) for name in torch_loss.KINDS}


def _prepare_loss(name: str, spec: dict[str, Any], device: torch.device) -> Ready:
    dtype = spec["dtype"]
    hidden = torch.from_numpy(data.normal(0, spec["tokens"], spec["embed_dim"])).to(device, _DTYPES[dtype])
    table = 0.02 * torch.from_numpy(data.normal(1, spec["padded"], spec["embed_dim"]))
    table = table.to(device, _DTYPES[dtype])
    labels = torch.from_numpy(data.words(spec["tokens"], spec["words"])).long().to(device)
    loss_of = torch_loss.loss(name, width=spec["embed_dim"], words=spec["padded"])
    operands = [hidden.requires_grad_(), table.requires_grad_()]

    def with_gradients() -> tuple[torch.Tensor, ...]:
        loss = loss_of(hidden, table, labels)
        return (loss, *torch.autograd.grad(loss, operands))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    loss, gradient, _ = with_gradients()
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    right, of_hidden = torch_loss.exact(hidden.detach(), table.detach(), labels, checked=_CHECKED)
    errors = {"loss": _error(loss, right), "hidden": _error(gradient[:_CHECKED], of_hidden)}
    worst = max(errors, key=lambda name: errors[name])
    facts = {
        "ok": all(error <= _LIMITS[dtype] for error in errors.values()),
        "error": errors[worst],
        "error_of": worst,
        "limit": _LIMITS[dtype],
        "precision": dtype,
        "flops_full": spec["flops_full"],
        "temporary_bytes": peak,
    }
    return Ready(queued(with_gradients), facts)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
