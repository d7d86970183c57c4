"""PyTorch: plain modules, the same compiled, and the GPT-2 of transformers."""

import itertools
import math
import sys
from collections.abc import Callable

import child
import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, setting: child.Setting) -> None:
        super().__init__()
        self.heads = setting.num_heads
        self.qkv = nn.Linear(setting.embed_dim, 3 * setting.embed_dim)
        self.out = nn.Linear(setting.embed_dim, setting.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, block, embed] -> the same."""
        batch, block, embed = x.shape
        qkv = self.qkv(x).view(batch, block, 3, self.heads, embed // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, block, embed))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, setting: child.Setting) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(setting.embed_dim)
        self.attention = Attention(setting)
        self.mlp_norm = nn.LayerNorm(setting.embed_dim)
        self.up = nn.Linear(setting.embed_dim, 4 * setting.embed_dim)
        self.down = nn.Linear(4 * setting.embed_dim, setting.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, block, embed] -> the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Decoder(nn.Module):
    """GPT-2 with its initialisation."""

    def __init__(self, setting: child.Setting) -> None:
        super().__init__()
        self.embed = nn.Embedding(setting.vocab, setting.embed_dim)
        self.position = nn.Embedding(setting.block, setting.embed_dim)
        self.blocks = nn.ModuleList(Block(setting) for _ in range(setting.num_layers))
        self.final_norm = nn.LayerNorm(setting.embed_dim)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * setting.num_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Tokens and their followers, both [batch, block] -> the mean loss."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.final_norm(x), self.embed.weight)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def transformers_model(setting: child.Setting) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """GPT2LMHeadModel and its loss on tokens and their followers."""
    import transformers  # a second of start-up that the other contestants do not owe

    config = transformers.GPT2Config(
        vocab_size=setting.vocab,
        n_positions=setting.block,
        n_embd=setting.embed_dim,
        n_layer=setting.num_layers,
        n_head=setting.num_heads,
        # The same function as its default gelu_new, in one kernel.
        activation_function="gelu_pytorch_tanh",
        attn_implementation="sdpa",
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(tokens).logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return model, loss


def main(kind: str) -> None:
    """Serves one contestant: plain, compiled or transformers."""
    setting = child.Setting()
    torch.manual_seed(0)
    if kind == "transformers":
        model, loss_of = transformers_model(setting)
    else:
        model = Decoder(setting)
        loss_of = torch.compile(model) if kind == "compiled" else model
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": setting.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=setting.learning_rate,
        betas=(setting.beta1, setting.beta2),
        fused=True,
    )
    data = itertools.cycle(torch.from_numpy(rows).long() for rows in child.batches(setting))

    def steps(count: int) -> float:
        loss = torch.tensor(0.0)
        for _ in range(count):
            rows = next(data)
            loss = loss_of(rows[:, :-1], rows[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    child.serve(
        steps,
        parameters=sum(weight.numel() for weight in model.parameters()),
        versions=f"torch {torch.__version__}",
    )


if __name__ == "__main__":
    main(sys.argv[1])
