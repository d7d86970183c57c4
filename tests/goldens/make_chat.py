"""What transformers makes of conversations, and which of it the assistant says.

    uv run --no-project --with transformers==5.24.0 --with jinja2 python tests/goldens/make_chat.py

The templates are written here, in two common styles; `{% generation %}` tells transformers where the
assistant speaks, and Stack finds that without it.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|turn|>", "<|end|>", "<s>", "</s>"]
TURNS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|turn|>assistant\n"
    "{% generation %}{{ message.content | trim }}<|end|>\n{% endgeneration %}"
    "{% else %}<|turn|>{{ message.role }}\n{{ message.content | trim }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %} {{ message.content }}{{ eos_token }}"
    "{% endgeneration %}"
    "{% elif message.role == 'user' %}[Q] {{ message.content }} [A]"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}{% endfor %}"
)
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, who are you?"}],
    [
        {"role": "user", "content": " one "},
        {"role": "assistant", "content": "two\n\nlines"},
        {"role": "user", "content": "größer 🙂"},
        {"role": "assistant", "content": "ja"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "who asks no more"},
    ],
]


def main() -> None:
    """Writes chat.json beside this file."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(SPECIAL)
    made = []
    for name, template, marks in (
        ("turns", TURNS, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
        ("brackets", BRACKETS, {"bos_token": "<s>", "eos_token": "</s>"}),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **marks)
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        for messages in CONVERSATIONS:
            both = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            made.append(
                {
                    "name": name,
                    "template": plain,
                    **marks,
                    "messages": messages,
                    "ids": both["input_ids"],
                    "said": both["assistant_masks"],
                    "ask": tokenizer.apply_chat_template(
                        messages[:1], chat_template=plain, tokenize=False, add_generation_prompt=True
                    ),
                }
            )
    content = {"tokenizer": json.loads(model.to_str()), "conversations": made}
    Path(__file__).with_name("chat.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
