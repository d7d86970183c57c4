"""The sharding table: what lies where, for devices that are not here."""

from stack.config import Config, DataConfig, DecoderConfig, MeshConfig
from stack.step.describe import sharding_table

MODEL = DecoderConfig(
    vocab_size=50_000, num_layers=2, embed_dim=1000, num_heads=10, max_length=64, tied_embeddings=True
)


def table(devices: int, **mesh) -> list[str]:
    config = Config(model=MODEL, data=DataConfig(sequence_length=64), mesh=MeshConfig(**mesh)).replace(
        f"train.batch_size={devices}"
    )
    return sharding_table(config, devices).splitlines()


def row(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))


def test_a_row_tells_shape_axes_spec_and_bytes_per_device():
    line = row(table(8, fsdp=8), "embed.table")
    for part in ("50048x1000", "vocab, embed", "P('fsdp', None)", f"{50048 * 1000 * 4 // 8:,}"):
        assert part in line


def test_the_count_leaves_padding_out():
    layers = 2 * (12 * 1000**2 + 13 * 1000)
    assert f"{50_000 * 1000 + 64 * 1000 + layers + 2 * 1000:,} parameters" in "\n".join(table(8))


def test_large_parameters_left_whole_are_warned_of_with_the_reason():
    assert not [line for line in table(8, fsdp=8) if line.startswith("warning")]
    warnings = [line for line in table(8, fsdp=8, zero=0) if line.startswith("warning")]
    assert any("embed.table is whole" in line and "zero=0" in line for line in warnings)
    warnings = [line for line in table(7, fsdp=7) if line.startswith("warning")]
    assert any("fsdp 7 divides none of" in line for line in warnings)
