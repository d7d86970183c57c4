"""What the lm-evaluation-harness's own Hugging Face model answers, of two small models.

    uv run --no-project --with 'lm_eval[hf]==0.4.13' --with transformers==5.24.0 \\
        python tests/goldens/make_harness.py

One is a GPT-2 whose tokenizer adds nothing to a text, one a Llama that begins each with <s>, and whose words
have their space inside. Both learn a few sentences, half by heart, so that some answers are the likeliest.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LENGTH, NEW = 48, 12
SMALLEST_MARGIN = 1e-3
"""Choices closer than this could differ by rounding alone."""
TEXT = [
    "the model reads a text and tells how likely each word of it is after those before",
    "in the middle of the night the old man and the sea met the other man near the harbour",
    "größer als das Haus, schöner als der Garten: où est la bibliothèque?",
    "1 2 3 4 5 6 7 8 9 10; a, b, c.\nA new line. Another\n\nand more",
]
LONG = " ".join(TEXT[:3])


def byte_level() -> Tokenizer:
    """As GPT-2 has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT * 3, trainer)
    return made


def words_with_spaces() -> Tokenizer:
    """As Llama 2 has it: a space before each text, bytes for what it does not know."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    some = [*special, *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=some, show_progress=False)
    made.train_from_iterator(TEXT * 3, trainer)
    tree = json.loads(made.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(tree))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def gpt2(marks: dict[str, int], words: int) -> transformers.PreTrainedModel:
    """Tied."""
    config = transformers.GPT2Config(
        vocab_size=words, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, **marks
    )
    return transformers.GPT2LMHeadModel(config)


def llama(marks: dict[str, int], words: int) -> transformers.PreTrainedModel:
    """Untied, two queries a key."""
    config = transformers.LlamaConfig(
        vocab_size=words,
        max_position_embeddings=LENGTH,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **marks,
    )
    return transformers.LlamaForCausalLM(config)


def learn(network: transformers.PreTrainedModel, texts: list[list[int]]) -> None:
    """A few sentences, in parts of every length."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network.eval()  # No dropout.
    for step in range(120):
        optimizer.zero_grad()
        for text in texts:
            start = step * 7 % max(1, len(text) - 8)
            tokens = torch.tensor([text[start : start + LENGTH]])
            network(tokens, labels=tokens).loss.backward()
        optimizer.step()


def ask(model: HFLM, kind: str, requests: list[tuple[Any, ...]]) -> list[Any]:
    """What the harness's model answers."""
    instances = [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]
    return getattr(model, kind)(instances, disable_tqdm=True)


def check_margin(model: HFLM, tokens: list[int], first: int) -> None:
    """The likeliest word is so by more than rounding at each place from `first` on."""
    with torch.no_grad():
        scores = model.model(torch.tensor([tokens])).logits[0, first - 1 :]
    best = scores.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > SMALLEST_MARGIN


def make(name: str, tokenizer: Tokenizer, build: Any, bos: str, eos: str) -> None:
    """Writes harness_NAME.npz beside this file."""
    torch.manual_seed(3)
    words: dict[str, int] = tokenizer.get_vocab()
    marks = {"bos_token_id": words[bos], "eos_token_id": words[eos]}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    network = build(marks, tokenizer.get_vocab_size())
    learn(network, [[*fast.encode(text), marks["eos_token_id"]] for text in TEXT])
    model = HFLM(pretrained=network, tokenizer=fast, batch_size=4, device="cpu")

    contexts = [
        "the model",
        "in the middle of",
        "größer als",
        "où 🙂",
        "a,",
        "1 2 3\n",
        LONG,
        f"{bos}the old man",
    ]
    options: dict[str, Any] = {"until": [], "max_gen_toks": NEW, "do_sample": False}
    plain = [(text, options) for text in contexts]
    written = ask(model, "generate_until", plain)
    longest: str = max(written, key=len)
    stop = longest[len(longest) // 2 :][:2]
    stops = [(text, options | {"until": [stop, "zz"]}) for text in contexts]
    generate = [*plain, *stops, ("the old", {"until": "e", "max_new_tokens": 5, "temperature": 0.0})]

    pairs = [
        *(("", text) for text in ("the model", " the", "größer", "🙂 ", "\n")),
        *((text, " and the sea") for text in contexts),
        ("the model ", "reads"),
        ("the model  \n", " reads"),
        ("a", "\n\n"),
        ("größe", "r als"),
        (LONG, " the harbour of größe and 🙂"),
        ("the", f" end{eos}"),
        ("the model", " and the sea"),  # A second time.
        *((text, answer) for (text, _), answer in zip(plain, written, strict=True) if answer),
    ]
    lengths = (LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH + 5)
    rolling = [
        ("",),
        ("a",),
        ("größer 🙂",),
        (LONG,),
        *((fast.decode(fast.encode(LONG * 2)[:n]),) for n in lengths),
    ]
    asked = {"loglikelihood": pairs, "loglikelihood_rolling": rolling, "generate_until": generate}
    told = {kind: ask(model, kind, requests) for kind, requests in asked.items()}

    greedy = [is_greedy for _, is_greedy in told["loglikelihood"]]
    assert 0 < sum(greedy) < len(greedy)
    texts = told["generate_until"]
    assert any(len(fast.encode(text)) < NEW - 2 for text in texts[: len(plain)]), "one ends by itself"
    assert any(a != b for a, b in zip(texts, texts[len(plain) :], strict=False)), "a stop string ends one"
    for (context, _), text in zip(plain, texts, strict=False):
        before = model.tok_encode(context)[-(LENGTH - NEW) :]
        new = network.generate(torch.tensor([before]), max_new_tokens=NEW, do_sample=False)[0].tolist()
        check_margin(model, new[:-1], len(before))
        assert fast.decode(new[len(before) :], skip_special_tokens=True) == text
    content = {
        "config": network.config.to_diff_dict() | {"architectures": [type(network).__name__]},
        "tokenizer": json.loads(tokenizer.to_str()),
        "tokenizer_config": {"bos_token": bos, "eos_token": eos},
        "asked": asked,
        "told": told,
    }
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    path = Path(__file__).with_name(f"harness_{name}.npz")
    np.savez_compressed(path, content=json.dumps(content, ensure_ascii=False), **weights)  # pyrefly: ignore


if __name__ == "__main__":
    make("gpt2", byte_level(), gpt2, "<|endoftext|>", "<|endoftext|>")
    make("llama", words_with_spaces(), llama, "<s>", "</s>")
