"""A folder of BERT or RoBERTa becomes a run that trains, and a run such a folder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from safetensors import safe_open
from tokenizers import models, pre_tokenizers, processors

from stack import StackError, Trainer
from stack.cli import main
from stack.config import Config, EncoderConfig
from stack.data.tokenizer import BYTE_MARKS, ByteTokenizer, load_tokenizer
from stack.interop import hugging_face_files
from stack.interop.hugging_face import config_from_hf, params_from_hf
from stack.interop.hugging_face_files import config_to_hf
from stack.interop.safetensors_folder import INDEX, SINGLE
from stack.transfer.exporting import export
from stack.transfer.importing import load_weights

SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}


def write_tokenizer(folder: Path, family: str) -> None:
    """WordPiece as BERT's, or a byte-level BPE as RoBERTa's, of 61 words each."""
    special = SPECIAL[family]
    letters = "abcdefghijklmnopqrstuvwxyz"
    if family == "bert":
        words = [*special, *letters, *(f"##{letter}" for letter in letters), "def", "the", "in", "self"]
        words = {word: number for number, word in enumerate(words)}
        model = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        begin, end = "[CLS]", "[SEP]"
    else:
        words = [*special, "Ġ", *letters, *(f"Ġ{letter}" for letter in letters[:26]), "Ċ", ".", ","]
        words = {word: number for number, word in enumerate(words)}
        merges = [("Ġ", letter) for letter in letters]
        model = tokenizers.Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        begin, end = "<s>", "</s>"
    assert len(words) == 61
    model.add_special_tokens(list(special))
    model.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end], special_tokens=[(begin, words[begin]), (end, words[end])]
    )
    model.save(str(folder / "tokenizer.json"))


def save(folder: Path, golden, family: str, weights=None, **changes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(golden.config | changes))
    safetensors.numpy.save_file(weights or golden.weights, folder / SINGLE)
    write_tokenizer(folder, family)
    return folder


def bring_in(folder: Path, run: Path, *overrides: str, devices: int = 1) -> tuple[Trainer, list[str]]:
    told = list(load_weights(folder, run, overrides, devices=jax.devices()[:devices]))
    return Trainer.from_run(run, devices=jax.devices()[:devices]), told


def read(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="flax") as file:
            tensors |= {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_equal(tensors, want) -> None:
    assert tensors.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(tensors[name], tensor, strict=True, err_msg=name)


def test_bert_goes_in_and_out_bit_by_bit_without_its_head_of_next_sentences(bert, tmp_path) -> None:
    more = {f"cls.seq_relationship.{name}": np.ones((2, 32), np.float32) for name in ("weight", "bias")}
    saved = save(tmp_path / "saved", bert, "bert", bert.weights | more, architectures=["BertForPreTraining"])
    trainer, told = bring_in(saved, tmp_path / "run")
    assert told[-1] == (
        "note      the head of next sentences is not read, as Stack's models have none:"
        " cls.seq_relationship.bias, cls.seq_relationship.weight"
    )
    assert trainer.state is not None
    want = params_from_hf(bert.weights, config_from_hf(bert.config, bert.weights))
    jax.tree.map(np.testing.assert_array_equal, trainer.state["params"], want)
    list(export(trainer, tmp_path / "out"))
    assert_equal(read(tmp_path / "out"), bert.weights)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config_from_hf(config, bert.weights) == config_from_hf(bert.config, bert.weights).model_copy(
        update={"head_dim": None}
    )
    assert not (tmp_path / "out/generation_config.json").exists()
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert named == {
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 24,
    }


@pytest.mark.full
def test_roberta_goes_in_and_out_on_a_mesh_and_in_several_files(roberta, tmp_path) -> None:
    saved = save(tmp_path / "saved", roberta, "roberta")
    trainer, _ = bring_in(saved, tmp_path / "run", "mesh.fsdp=2", "mesh.tensor=2", devices=4)
    assert trainer.config.objective.kind == "masked_words"
    list(export(trainer, tmp_path / "out", most_bytes=20_000))
    assert_equal(read(tmp_path / "out"), roberta.weights)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["pad_token_id"], config["max_position_embeddings"]) == (1, 24)
    again, _ = bring_in(tmp_path / "out", tmp_path / "again")
    assert again.config.model == trainer.config.model
    assert again.config.objective == trainer.config.objective


@pytest.mark.full
def test_a_run_that_came_in_is_evaluated_and_trained(roberta, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    saved = save(tmp_path / "saved", roberta, "roberta")
    assert main(["import", str(saved), "--to", str(run), "mesh.data=8"]) == 0
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("the cat sat on a mat " * (3 + number % 5))
    data = [
        *("data.sources.0.kind=text", f"data.sources.0.path={tmp_path}/*.txt"),
        *(f"data.cache_dir={tmp_path}/cache", "data.heldout_fraction=0.2", "mesh.data=8"),
    ]
    assert main(["eval", str(run), *data]) == 0
    first = float(capsys.readouterr().out.split("loss")[1].split()[0])
    more = ("train.steps=20", "optimizer.schedule.warmup_steps=2", "optimizer.learning_rate=0.01")
    assert main(["train", str(run), *data, *more]) == 0
    assert float(capsys.readouterr().out.split("held-out: loss ")[1].split()[0]) < first


def test_bytes_and_their_special_words_become_a_tokenizer(tmp_path) -> None:
    config = Config.model_validate(
        {
            "model": {
                "kind": "encoder",
                "norm_placement": "post",
                "num_types": 1,
                "vocab_size": 361,
                "mlp": "gelu",
            }
        }
        | {"objective": {"kind": "masked_words"}}
    )
    hugging_face_files.write_files(tmp_path, config, ByteTokenizer(), "float32")
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert [loaded.token(word) for word in BYTE_MARKS] == list(range(257, 361))
    assert loaded.vocab_size == 361
    named = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert named["mask_token"] == "[MASK]"
    assert "cls_token" not in named


def test_a_word_that_roberta_takes_for_padding_is_refused(tmp_path) -> None:
    fields = {"kind": "encoder", "norm_placement": "post", "num_types": 1, "first_position": 2, "mlp": "gelu"}
    config = Config.model_validate({"model": fields, "objective": {"kind": "masked_words"}})
    with pytest.raises(
        StackError, match=r"RoBERTa takes word 1 for padding, and of this tokenizer that is '\\x"
    ):
        hugging_face_files.write_files(tmp_path, config, ByteTokenizer(), "float32")


BERT = {"kind": "encoder", "norm_placement": "post", "num_types": 2, "scale_residual_init": False}


@pytest.mark.parametrize(
    "change",
    [
        {"mlp": "gelu", "mlp_dim": 100, "norm_epsilon": 1e-12},
        {"mlp": "relu", "embedding_dropout": 0.2, "residual_dropout": 0.2, "attention_dropout": 0.3},
        {"mlp": "gelu", "first_position": 5, "num_types": 1, "max_length": 30, "init_std": 0.1},
    ],
)
def test_a_config_survives_the_way_out_and_in(change) -> None:
    config = EncoderConfig.model_validate(BERT | change)
    again = config_from_hf(config_to_hf(config))
    resolved = {"mlp_dim": config.mlp_width, "position_init_std": config.init_std}
    assert again == config.model_copy(update=resolved)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm_placement": "pre"}, "model.norm_placement=pre: transformers' BERT has norm_placement=post"),
        ({"num_types": 0}, "model.num_types=0: transformers' BERT has num_types=1"),
        ({"head_bias": False}, "model.head_bias=False: transformers' BERT has head_bias=True"),
        ({"embedding_norm": False}, "model.embedding_norm=False"),
        ({"tied_embeddings": False}, "model.tied_embeddings=False"),
        ({"position": "rotary"}, "model.position=rotary"),
        ({"num_kv_heads": 4}, "model.kv_heads=4: transformers' BERT has kv_heads=12"),
        ({"mlp": "swiglu"}, "model.gated=True"),
        ({"first_position": 2, "mlp": "relu"}, "model.mlp=relu: transformers' RoBERTa has mlp=gelu"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(change, told) -> None:
    with pytest.raises(StackError, match=f"{told}.*; this model has no counterpart there"):
        config_to_hf(EncoderConfig.model_validate(BERT | change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"is_decoder": True}, "is_decoder=true is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=true is not supported"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key" is not supp'),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported"),
        ({"architectures": ["BertForSequenceClassification"]}, "architectures=.*is not supported"),
        ({"hidden_act": "silu"}, 'hidden_act="silu" is not supported'),
        ({"num_attention_heads": 5}, "embed_dim=32 is not a multiple of num_heads=5"),
        ({"layer_norm_eps": 0.0}, "norm_epsilon"),
        ({"n_embd": 3}, "n_embd=3 is not a key"),
    ],
)
def test_a_key_that_changes_bert_is_refused_by_name(bert, change, told) -> None:
    with pytest.raises(StackError, match=f"^Hugging Face config: .*{told}"):
        config_from_hf(bert.config | change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "relu"}, 'hidden_act="relu" is not supported; Stack has "gelu"'),
        ({"pad_token_id": 30}, "max_position_embeddings=24 leaves none after pad_token_id"),
        ({"pad_token_id": None}, "pad_token_id=null must be a whole number"),
    ],
)
def test_of_roberta_too(roberta, change, told) -> None:
    with pytest.raises(StackError, match=f"^Hugging Face config: .*{told}"):
        config_from_hf(roberta.config | change)
