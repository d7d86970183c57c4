"""Writes what Hugging Face transformers computes for small random models: tests/goldens/hugging_face_*.npz.

Needs PyTorch and transformers, which the tests do not. In an environment of Python 3.11, whose PyTorch
has a small build for CPUs (written with torch 2.13.0 and transformers 5.23.0,
Gemma's with 5.24.0):

    pip install torch==2.13.0 transformers
    python tests/goldens/make_hugging_face.py [NAME ...]

Each file holds `config` (config.json as text), `weight/NAME` and `gradient/NAME` for every parameter,
`tokens` [2, 16], `lengths` [2] (the second row is padded on the right), `logits` [2, 16, vocab], `loss`
(mean over the next tokens that exist), `prompts` [2, 9] with `prompt_lengths` (the first is padded on
the left) and `generated` [2, 12], the greedy continuation through the key-value cache.

An encoder's has `types` [2, 16] and `labels` [2, 16] (-100 where nothing is asked) in place of the last
three, and `pooled` [2, width] of its last states where it has a pooler.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

LENGTH, PADDING = 16, 3
PROMPT_LENGTHS, NEW_TOKENS = (5, 9), 12
# Greedy choices closer than this could differ by rounding alone.
SMALLEST_MARGIN = 1e-3

COMMON = {"vocab_size": 61, "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None}
LLAMA3_ROPE = {
    # Head width 8 has wavelengths 6, 20, 63 and 199: one kept, one blended, two stretched.
    "rope_theta": 100.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **COMMON,
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3_ROPE,
        tie_word_embeddings=False,
        **COMMON,
    ),
    # Of head width 16 and this context one channel stays, one is blended, six are stretched.
    "mistral": transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={
            "rope_theta": 1000.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "original_max_position_embeddings": 32,
        },
        sliding_window=6,
        tie_word_embeddings=False,
        **COMMON,
    ),
    "qwen2": transformers.Qwen2Config(
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        **COMMON,
    ),
    "qwen3": transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        **COMMON,
    ),
    # The bounds between channels, and the factor of queries and keys as it is given.
    "llama_yarn": transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=12,
        max_position_embeddings=256,
        rope_parameters={
            "rope_theta": 200.0,
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 5.0,
            "beta_slow": 0.5,
            "attention_factor": 1.25,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        tie_word_embeddings=True,
        **COMMON,
    ),
    # What the published models leave off.
    "qwen3_window": transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
        tie_word_embeddings=False,
        **COMMON,
    ),
    # Of three layers the second sees all; both caps bend what they are put on.
    "gemma2": transformers.Gemma2Config(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=10,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        sliding_window=5,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=1.0,
        pad_token_id=None,
        **COMMON,
    ),
    # Of four layers the third sees all, by a rotation of its own.
    "gemma3": transformers.Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        sliding_window=4,
        sliding_window_pattern=3,
        pad_token_id=None,
        **COMMON,
    ),
}

ENCODERS = {
    "bert": transformers.BertConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **COMMON,
    ),
    # Positions begin at row 2, after those of padding; the activation of its head is always gelu.
    "roberta": transformers.RobertaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **COMMON,
    ),
    # The activation of the original code, which its head has too; no pooler, as `save_pretrained` writes it.
    "bert_tanh": transformers.BertConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu_new",
        max_position_embeddings=24,
        type_vocab_size=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **COMMON,
    ),
}
POOLED = ("bert",)


T5 = {
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 44,
    # With more layers that write than read transformers 5.24 has no cache.
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    # Distances reach the last bucket.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 3,
    "pad_token_id": 3,
}
T5_CONFIGS = {
    "t5": transformers.T5Config(**T5, **COMMON),
    "t5_v1_1": transformers.T5Config(
        **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **COMMON
    ),
}
"""Models that read one row and write another; see `golden_t5`."""


def make_t5(config: transformers.T5Config) -> transformers.T5ForConditionalGeneration:
    """A random model; transformers 5 ties the head of every T5 it makes, so that of v1.1 is made here."""
    model = transformers.T5ForConditionalGeneration(config).float().eval()
    width = config.d_model
    # Scores are not scaled. A tied head needs more for a text that is not one word again and again.
    queries, others = (0.6, 2.0) if config.scale_decoder_outputs else (0.4, 1.5)
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, width))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1, 0.2)
            elif "relative" in name:
                weight.normal_(0, 1)
            elif "shared" in name:
                weight.normal_(0, 0.2)
            else:
                weight.normal_(0, (queries if ".q." in name else others) * width**-0.5)
    return model


def t5_keys(config: transformers.T5Config) -> dict:
    """Its config.json as T5's authors publish it: transformers 5 writes that the head of v1.1 is tied."""
    keys = config.to_dict()
    return keys | {"tie_word_embeddings": keys.pop("scale_decoder_outputs")}


def golden_t5(config: transformers.T5Config, seed: int) -> dict[str, np.ndarray]:
    """As `golden`, with `target_tokens` [2, 11] that are written, `target_lengths`, and `logits` of them.

    Prompts are padded on the right.
    """
    torch.manual_seed(seed)
    model = make_t5(config)
    tokens, written = (torch.randint(4, config.vocab_size, (2, size)) for size in (LENGTH, 11))
    lengths, target_lengths = torch.tensor([LENGTH, LENGTH - PADDING]), torch.tensor([8, 11])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = written.where(torch.arange(11) < target_lengths[:, None], -100)
    # In float32 some of its own gradients are 4e-5 off.
    model.double()
    output = model(tokens, attention_mask=mask, labels=labels)
    output.loss.backward()
    model.float()
    prompts = torch.randint(4, config.vocab_size, (2, max(PROMPT_LENGTHS)))
    prompt_lengths = torch.tensor(PROMPT_LENGTHS)
    prompt_mask = (torch.arange(prompts.shape[1]) < prompt_lengths[:, None]).long()
    generated = generate(model, prompts, prompt_mask, begin=1)
    arrays = {
        "config": np.array(json.dumps(t5_keys(config), sort_keys=True)),
        "logits": output.logits.detach().numpy().astype(np.float32),
        "loss": output.loss.detach().numpy().astype(np.float32),
    }
    numbers = {
        "tokens": tokens,
        "lengths": lengths,
        "target_tokens": written,
        "target_lengths": target_lengths,
        "prompts": prompts,
        "prompt_lengths": prompt_lengths,
        "generated": generated,
    }
    arrays |= {name: number.numpy().astype(np.int32) for name, number in numbers.items()}
    for name, weight in model.named_parameters():
        arrays[f"weight/{name}"] = weight.detach().numpy()
        arrays[f"gradient/{name}"] = weight.grad.numpy()
    return arrays


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that attention and logits are far from uniform; no bias zero, no scale one."""
    gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
            elif weight.ndim == 1:
                weight.normal_(0 if gemma else 1, 0.2)  # Gemma adds one to it.
            elif any(word in name for word in ("wte", "wpe", "embed_tokens", "_embeddings")):
                # Multiplied by more, the word that was read would be the likeliest one.
                weight.normal_(0, 0.08 if gemma else 0.2)
            else:
                weight.normal_(0, 2.0 * model.config.hidden_size**-0.5)


def generate(
    model: transformers.PreTrainedModel,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    *,
    begin: int | None = None,
) -> torch.Tensor:
    """The greedy continuation, [2, NEW_TOKENS]; ValueError for one that would prove little.

    What is written begins at `begin`; None: after the prompts.
    """
    result = model.generate(
        prompts,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(result.logits).topk(2).values
    margin = (best[..., 0] - best[..., 1]).min().item()
    generated = result.sequences[:, prompts.shape[1] if begin is None else begin :]
    distinct = min(len(set(row.tolist())) for row in generated)
    if margin < SMALLEST_MARGIN or distinct < NEW_TOKENS // 2:
        raise ValueError(f"{distinct} distinct tokens, chosen by {margin:.1e}")
    return generated


def golden(config: transformers.PretrainedConfig, seed: int) -> dict[str, np.ndarray]:
    """Everything one file holds."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model)

    tokens = torch.randint(1, config.vocab_size, (2, LENGTH))
    mask = torch.ones_like(tokens)
    mask[1, LENGTH - PADDING :] = 0
    output = model(tokens, attention_mask=mask, labels=tokens.where(mask == 1, -100))
    output.loss.backward()

    prompts = torch.randint(1, config.vocab_size, (2, max(PROMPT_LENGTHS)))
    lengths = torch.tensor(PROMPT_LENGTHS)
    prompt_mask = (torch.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, None]).long()

    arrays = {
        "config": np.array(json.dumps(config.to_dict(), sort_keys=True)),
        "tokens": tokens.numpy().astype(np.int32),
        "lengths": mask.sum(1).numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
        "prompts": prompts.numpy().astype(np.int32),
        "prompt_lengths": lengths.numpy().astype(np.int32),
        "generated": generate(model, prompts * prompt_mask, prompt_mask).numpy().astype(np.int32),
    }
    for name, weight in model.named_parameters():
        arrays[f"weight/{name}"] = weight.detach().numpy()
        arrays[f"gradient/{name}"] = weight.grad.numpy()
    return arrays


def encoder(config: transformers.PretrainedConfig, *, pooler: bool) -> transformers.PreTrainedModel:
    """A model of masked words with weights of its own, and a pooler beside its head where that is asked."""
    model = transformers.AutoModelForMaskedLM.from_config(config).float().eval()
    if pooler:
        model.base_model.pooler = type(transformers.AutoModel.from_config(config).pooler)(config)
    randomize(model)
    return model


def encoder_golden(config: transformers.PretrainedConfig, *, pooler: bool) -> dict[str, np.ndarray]:
    """Everything the file of an encoder holds."""
    torch.manual_seed(0)
    model = encoder(config, pooler=pooler)
    # Words 0 to 3 are special; 1 is RoBERTa's padding, over which its positions do not count.
    tokens = torch.randint(4, config.vocab_size, (2, LENGTH))
    mask = torch.ones_like(tokens)
    mask[1, LENGTH - PADDING :] = 0
    tokens = tokens.where(mask == 1, 1)
    types = torch.randint(0, config.type_vocab_size, (2, LENGTH))
    labels = torch.randint(4, config.vocab_size, (2, LENGTH))
    labels = labels.where((torch.rand(2, LENGTH) < 0.4) & (mask == 1), -100)
    given = {"attention_mask": mask, "token_type_ids": types}
    output = model(tokens, labels=labels, **given)
    states = model.base_model(tokens, **given)
    pooled = states.pooler_output
    # That the pooler has a gradient too.
    (output.loss if pooled is None else output.loss + pooled.sum()).backward()
    arrays = {
        "config": np.array(json.dumps(config.to_dict(), sort_keys=True)),
        "tokens": tokens.numpy().astype(np.int32),
        "lengths": mask.sum(1).numpy().astype(np.int32),
        "types": types.numpy().astype(np.int32),
        "labels": labels.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
    }
    if pooled is not None:
        arrays["pooled"] = pooled.detach().numpy()
    for name, weight in model.named_parameters():
        arrays[f"weight/{name}"] = weight.detach().numpy()
        arrays[f"gradient/{name}"] = weight.grad.numpy()
    return arrays


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    path = Path(__file__).parent / f"hugging_face_{name}.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")  # noqa: T201


def main() -> None:
    """Writes a file for each config, or those named, from the first seed with a telling continuation."""
    configs = {**CONFIGS, **T5_CONFIGS}
    for family in sys.argv[1:] or (*configs, *ENCODERS):
        if family in ENCODERS:
            write(family, encoder_golden(ENCODERS[family], pooler=family in POOLED))
            continue
        make = golden_t5 if family in T5_CONFIGS else golden
        for seed in itertools.count():
            try:
                arrays = make(configs[family], seed)
            except ValueError as error:
                print(f"{family}, seed {seed}: {error}")  # noqa: T201
                continue
            write(family, arrays)
            break


if __name__ == "__main__":
    main()
