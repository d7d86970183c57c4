"""Writes what transformers' heads of tasks compute on the trunks of make_hugging_face.py: tasks.npz.

Needs PyTorch and transformers, which the tests do not (written with torch 2.13.0 and transformers 5.24.0):

    python tests/goldens/make_tasks.py

For each of `bert` (BertForSequenceClassification), `tags` (BertForTokenClassification), `answers`
(BertForQuestionAnswering), `gpt2` and `llama` (...ForSequenceClassification), by prefix: `weight`
[classes, 32] and `bias` of the head, where it has one, `labels` (-100 where nothing is asked; of answers
[2, 2], begin and end, of the first row alone), `logits`, `loss`, and `gradient` of the head's weight and
`table` of the words'. The trunk, tokens, lengths and types are those of hugging_face_NAME.npz.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers as t

HERE = Path(__file__).parent
CLASSES = {"tags": 5, "answers": 2}
"""Of the others 3."""
MODELS = {
    "bert": ("bert", t.BertConfig, t.BertForSequenceClassification),
    "tags": ("bert", t.BertConfig, t.BertForTokenClassification),
    "answers": ("bert", t.BertConfig, t.BertForQuestionAnswering),
    "gpt2": ("gpt2", t.GPT2Config, t.GPT2ForSequenceClassification),
    "llama": ("llama", t.LlamaConfig, t.LlamaForSequenceClassification),
}


def made(name: str) -> dict[str, np.ndarray]:
    trunk, config_class, model_class = MODELS[name]
    with np.load(HERE / f"hugging_face_{trunk}.npz") as file:
        stored = dict(file)
    settings = json.loads(str(stored["config"]))
    settings = {key: value for key, value in settings.items() if not key.endswith(("2label", "2id"))}
    settings["num_labels"] = CLASSES.get(name, 3)
    # No token of the rows is it, so what is filled up is told by the mask, or by this number.
    padding = int(min(set(range(settings["vocab_size"])) - set(stored["tokens"].ravel().tolist())))
    config = config_class(**settings | {"pad_token_id": padding})
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = model_class(config).eval()
    weights = {
        key.removeprefix("weight/"): torch.tensor(value)
        for key, value in stored.items()
        if key.startswith("weight/")
    }
    missing, _ = model.load_state_dict(weights, strict=False)
    heads = ("classifier", "qa_outputs", "score")
    assert all(key.startswith(heads) for key in missing), missing
    head = next(getattr(model, key) for key in heads if hasattr(model, key))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5)
    lengths = torch.tensor(stored["lengths"])
    mask = (torch.arange(stored["tokens"].shape[1]) < lengths[:, None]).long()
    tokens = torch.tensor(stored["tokens"]).long()
    tokens = torch.where(mask > 0, tokens, padding)
    given = {"input_ids": tokens, "attention_mask": mask}
    if trunk == "bert":
        given["token_type_ids"] = torch.tensor(stored["types"]).long()
    if name == "answers":
        # The second row is filled up, and transformers would have answers there as well: it is not asked.
        labels = torch.tensor([[3, 6], [tokens.shape[1]] * 2])
        output = model(**given, start_positions=labels[:, 0], end_positions=labels[:, 1])
        logits = torch.stack([output.start_logits, output.end_logits], -1)
    else:
        labels = torch.tensor([2, 0])
        if name == "tags":
            labels = torch.randint(0, CLASSES[name], tokens.shape)
            labels[mask == 0] = -100
            labels[:, ::5] = -100
        output = model(**given, labels=labels)
        logits = output.logits
    output.loss.backward()
    arrays = {
        "weight": head.weight,
        "labels": labels,
        "logits": logits,
        "loss": output.loss,
        "gradient": head.weight.grad,
        "table": model.get_input_embeddings().weight.grad,
    } | ({} if head.bias is None else {"bias": head.bias})
    return {f"{name}/{key}": value.detach().numpy() for key, value in arrays.items()}


if __name__ == "__main__":
    found = {}
    for each in MODELS:
        found |= made(each)
    np.savez_compressed(HERE / "tasks.npz", **found)
