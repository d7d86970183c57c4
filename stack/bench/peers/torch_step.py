"""PyTorch's training step at its best: compiled, its fastest attention and loss, fused AdamW."""

import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stack.bench import data
from stack.bench.peers import torch_loss
from stack.bench.serve import Ready, UnableError, is_out_of_memory
from stack.parallel.host_memory import keep_freed_memory

_AUTOTUNED = "max-autotune-no-cudagraphs"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TOO_FAR = 0.5
"""Nats by which the first loss may differ from that of guessing."""
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "swiglu": functional.silu,
    "geglu": partial(functional.gelu, approximate="tanh"),
}


def makers(spec: dict[str, Any], device: torch.device) -> dict[str, Callable[[], Ready]]:
    """Compiled; on a CPU, where that is not always faster, eager too."""
    kinds = ("compiled", "eager") if device.type == "cpu" else ("compiled",)
    return {kind: partial(_prepare, kind == "compiled", spec, device) for kind in kinds}


def block_mask(segments: torch.Tensor) -> Any:
    """FlexAttention's: causal within the documents of [batch, length] segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (segments[row, query] == segments[row, key])

    rows, length = segments.shape
    return create_block_mask(sees, rows, None, length, length, device=segments.device)


class _Linear(nn.Linear):
    """Weights in float32, multiplied in what the inputs have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - its name in the base class
        """[..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


class _Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in float32."""

    def __init__(self, shapes: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shapes["embed_dim"]))
        is_layer = shapes["norm"] == "layernorm"
        self.bias = nn.Parameter(torch.zeros(shapes["embed_dim"])) if is_layer else None
        self.epsilon = shapes["norm_epsilon"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., embed] -> the same."""
        if self.bias is None:
            return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(x.dtype)
        normal = functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.epsilon)
        return normal.to(x.dtype)


class _Block(nn.Module):
    """One pre-norm transformer block: one product for queries, keys and values, one for gate and up."""

    def __init__(self, shapes: dict[str, Any], attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shapes["num_heads"], shapes["kv_heads"], shapes["head_width"]
        embed, mlp = shapes["embed_dim"], shapes["mlp_width"]
        self.gated = shapes["mlp"] in ("swiglu", "geglu")
        self.activation = _ACTIVATIONS[shapes["mlp"]]
        self.attend = attend
        self.attention_norm, self.mlp_norm = _Norm(shapes), _Norm(shapes)
        outputs = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv = _Linear(embed, outputs, bias=shapes["qkv_bias"])
        self.out = _Linear(self.heads * self.width, embed, bias=shapes["out_bias"])
        self.up = _Linear(embed, mlp * (2 if self.gated else 1), bias=shapes["mlp_bias"])
        self.down = _Linear(mlp, embed, bias=shapes["mlp_bias"])

    def forward(self, x: torch.Tensor, turn: torch.Tensor | None, mask: Any) -> torch.Tensor:
        """[batch, length, embed] -> the same."""
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.width)).split(sizes, dim=2)
        query, key, value = (head.transpose(1, 2) for head in heads)
        if turn is not None:
            query, key = _rotate(query, turn), _rotate(key, turn)
        x = x + self.out(self.attend(query, key, value, mask).transpose(1, 2).flatten(2))
        hidden = self.up(self.mlp_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return x + self.down(self.activation(gate) * hidden)
        return x + self.down(self.activation(hidden))


def _rotate(heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, length, width]; `turn`: [2, batch, 1, length, width / 2]."""
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = turn
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1).to(heads.dtype)


def _keep_products(_context: Any, operation: Any, *_operands: Any, **_options: Any) -> CheckpointPolicy:
    """What of a block is kept: its products and its attention."""
    name = str(operation)
    is_kept = name.startswith(("aten.mm.", "aten.addmm.", "aten._scaled_dot_product", "flex_attention"))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Remat(nn.Module):
    """A block that is computed again in the backward pass, whole or without its products."""

    def __init__(self, block: nn.Module, remat: str) -> None:
        super().__init__()
        self.block = block
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}
        self.options: dict[str, Any] = contexts if remat == "dots" else {}

    def forward(self, x: torch.Tensor, turn: torch.Tensor | None, mask: Any) -> torch.Tensor:
        """As the block."""
        return checkpoint(self.block, x, turn, mask, use_reentrant=False, **self.options)


class _Decoder(nn.Module):
    """GPT-2's or Llama's, up to the hidden states; initialised as GPT-2."""

    def __init__(self, spec: dict[str, Any], dtype: torch.dtype, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        shapes = spec["shapes"]
        embed, words = shapes["embed_dim"], shapes["padded_vocab_size"]
        self.dtype = dtype
        self.embed = nn.Embedding(words, embed)
        learned = shapes["position"] == "learned"
        self.position = nn.Embedding(spec["length"], embed) if learned else None
        blocks = (_Block(shapes, attend) for _ in range(shapes["num_layers"]))
        remat = spec["remat"]
        self.blocks = nn.ModuleList(block if remat == "none" else _Remat(block, remat) for block in blocks)
        self.final_norm = _Norm(shapes)
        self.table = self.embed.weight
        if not shapes["tied_embeddings"]:
            self.table = nn.Parameter(torch.empty(words, embed))
        residual = shapes["init_std"] / math.sqrt(2 * shapes["num_layers"])
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=residual if writes else shapes["init_std"])
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, turn: torch.Tensor | None, mask: Any
    ) -> torch.Tensor:
        """Tokens [batch, length] -> hidden states [batch x length, embed]."""
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        x = x.to(self.dtype)
        for block in self.blocks:
            x = block(x, turn, mask)
        return self.final_norm(x).flatten(0, 1)


def _prepare(compiled: bool, spec: dict[str, Any], device: torch.device) -> Ready:
    """The step of as many rows as there is room for: half of them where there is not."""
    if device.type == "cpu":
        keep_freed_memory()  # As Stack does, which speeds it up too.
        if compiled and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise UnableError("torch.compile needs a C++ compiler on a CPU, and there is none")
    if spec["precision"] not in _DTYPES:
        raise UnableError(f"it is not made to train in {spec['precision']} here")
    torch.set_float32_matmul_precision("high")
    while True:
        try:
            return _step(compiled, spec, device)
        except Exception as error:
            if not is_out_of_memory(error) or spec["rows"] == 1:
                raise
        torch.cuda.empty_cache()
        spec = spec | {"rows": spec["rows"] // 2}


def _step(compiled: bool, spec: dict[str, Any], device: torch.device) -> Ready:
    torch.manual_seed(0)
    shapes, rates, rows, length = spec["shapes"], spec["optimizer"], spec["rows"], spec["length"]
    dtype = _DTYPES[spec["precision"]]
    batch = data.batch(rows, length, shapes["vocab_size"], packed=spec["packed"])
    tokens, positions, segments = (
        torch.from_numpy(batch[name]).to(device) for name in ("tokens", "positions", "segments")
    )
    labels = torch.from_numpy(batch["labels"]).long().flatten().to(device)
    attend, mask, kind = _attention(spec, dtype, segments)
    with device:
        model = _Decoder(spec, dtype, attend)
    turn = _turns(shapes, positions) if shapes["position"] == "rotary" else None
    if compiled:
        # Layers are alike, and compile once.
        for part in [*model.blocks, model.final_norm] if device.type == "cuda" else [model]:
            part.compile(mode=_AUTOTUNED if device.type == "cuda" else "default")
    loss_of, chosen = _loss(shapes, dtype, rows * length, device, compiled=compiled)
    optimizer = _optimizer(model, rates)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = {"loss": torch.zeros(())}

    def run(iterations: int) -> None:
        for _ in range(iterations):
            hidden = model(tokens, positions, turn, mask)
            held["loss"] = loss_of(hidden, model.table.to(dtype), labels)
            held["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), rates["clip_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        held["loss"] = held["loss"].detach()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(1)
    first = float(held["loss"])

    def after() -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        last = float(held["loss"])
        return {"last_loss": last, "peak_bytes": peak, "ok": math.isfinite(last)}

    flops = spec["flops_per_token"]
    facts = {
        "ok": abs(first - math.log(shapes["padded_vocab_size"])) < _TOO_FAR,
        "first_loss": first,
        "rows": rows,
        "remat": spec["remat"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "note": f"attention {kind}, loss {chosen}",
        "tokens": rows * length,
        "precision": spec["precision"],
        "peak_flops": spec["peak_flops"],
        "flops_causal": flops["causal"] * rows * length,
        "flops_full": flops["full"] * rows * length,
    }
    return Ready(run, facts, after)


def _optimizer(model: nn.Module, rates: dict[str, float]) -> torch.optim.Optimizer:
    """AdamW, fused; matrices decay."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": rates["weight_decay"]},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    betas = rates["beta1"], rates["beta2"]
    return torch.optim.AdamW(groups, lr=rates["learning_rate"], betas=betas, eps=rates["epsilon"], fused=True)


def _turns(shapes: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """Cosines and sines [2, batch, 1, length, width / 2], float32."""
    half = shapes["head_width"] // 2
    rates = shapes["theta"] ** -(torch.arange(half, device=positions.device) / half)
    angles = positions[:, None, :, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def _attention(
    spec: dict[str, Any], dtype: torch.dtype, segments: torch.Tensor
) -> tuple[Callable[..., torch.Tensor], Any, str]:
    """The fastest for these rows, its mask, and its name."""
    shapes = spec["shapes"]
    grouped = shapes["kv_heads"] != shapes["num_heads"]
    call = partial(functional.scaled_dot_product_attention, enable_gqa=grouped)
    if spec["packed"] and segments.is_cuda:
        from torch.nn.attention.flex_attention import flex_attention

        def documents(query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
            return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)

        return documents, block_mask(segments), "flex"
    if spec["packed"]:
        causal = torch.ones(spec["length"], spec["length"], dtype=torch.bool).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        return lambda query, key, value, mask: call(query, key, value, attn_mask=mask), mask, "masked"

    def whole(query: Any, key: Any, value: Any, _: Any) -> torch.Tensor:
        return call(query, key, value, is_causal=True)

    if not segments.is_cuda:
        return whole, None, "sdpa"
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    sizes = [(spec["rows"], shapes[heads], spec["length"], shapes["head_width"]) for heads in
             ("num_heads", "kv_heads", "kv_heads")]  # fmt: skip
    operands = [torch.randn(size, device="cuda", dtype=dtype, requires_grad=True) for size in sizes]

    def by(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend(query: Any, key: Any, value: Any, _: Any) -> torch.Tensor:
            with sdpa_kernel(backend):
                return call(query, key, value, is_causal=True)

        return attend

    functions = {name: by(backend) for name, backend in backends.items()}
    trials: dict[str, Callable[[], None]] = {
        name: partial(_with_gradient, function, *operands, None) for name, function in functions.items()
    }
    chosen = _fastest(trials)
    return functions[chosen], None, chosen


def _loss(
    shapes: dict[str, Any], dtype: torch.dtype, tokens: int, device: torch.device, *, compiled: bool
) -> tuple[torch_loss.Loss, str]:
    """The fastest for a step, and its name; an eager step has an eager one."""
    if not compiled:
        return _plain_loss, "plain"
    width, words = shapes["embed_dim"], shapes["padded_vocab_size"]
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    table = torch.randn(words, width, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(shapes["vocab_size"], (tokens,), device=device)
    losses: dict[str, torch_loss.Loss] = {}
    for kind in torch_loss.KINDS:
        try:
            losses[kind] = torch_loss.loss(kind, width=width, words=words)
        except UnableError:  # An older PyTorch.
            continue
    chosen = _fastest(
        {kind: partial(_with_gradient, loss, hidden, table, labels) for kind, loss in losses.items()}
    )
    return losses[chosen], chosen


def _plain_loss(hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(hidden, table).float(), labels, ignore_index=-1)


def _with_gradient(function: Callable[..., torch.Tensor], *operands: Any) -> None:
    result = function(*operands)
    wanted = [operand for operand in operands if isinstance(operand, torch.Tensor) and operand.requires_grad]
    torch.autograd.grad(result.float().sum(), wanted)


def _fastest(trials: dict[str, Callable[[], None]]) -> str:
    """The name of what takes the least time, of three after one that does not count."""
    seconds: dict[str, float] = {}
    problems: list[str] = []
    for name, trial in trials.items():
        try:
            times = []
            for _ in range(4):
                start = time.perf_counter()
                trial()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            seconds[name] = min(times[1:])
        except RuntimeError as error:  # No kernel for it, or no room.
            problems.append(f"{name}: {error}")
            torch.cuda.empty_cache()
    if not seconds:
        raise RuntimeError("; ".join(problems))
    return min(seconds, key=lambda name: seconds[name])
