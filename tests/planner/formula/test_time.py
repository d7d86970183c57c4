"""The step time is made of physical parts, each of which behaves as its formula says."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.config import DecoderConfig
from stack.hardware.chip import load
from stack.planner.formula.links import ring_seconds
from stack.planner.formula.memory import memory
from stack.planner.formula.projects import published_memory
from stack.planner.formula.published import zero_elements_sent
from stack.planner.formula.shapes import parameters
from stack.planner.formula.time import product_seconds, published_time, step_time
from stack.planner.formula.workload import Workload

H100 = load("h100")
MODEL = DecoderConfig(
    vocab_size=50304, max_length=2048, num_layers=24, embed_dim=2048, num_heads=16, position="rotary"
)


def work(**changes) -> Workload:
    sizes: dict[str, Any] = {
        "model": MODEL,
        "length": 2048,
        "batch": 512,
        "micro_batch": 2,
        "fsdp": 8,
        "zero": 3,
    }
    return Workload(**(sizes | changes))


def seconds(**changes) -> float:
    return step_time(work(**changes), H100).total


def test_the_parts_add_up():
    time = step_time(work(data=4, stage=2, tensor=2, context=2, remat="full"), H100)
    parts = (
        time.matmul,
        time.attention,
        time.memory_bound,
        time.exposed,
        time.bubble,
        time.optimizer,
        time.host,
    )
    assert time.total == pytest.approx(sum(parts))
    assert all(part > 0 for part in parts)
    assert set(time.communication) == {"tensor", "context", "stage", "fsdp", "data"}


def test_a_second_shard_sends_weights_and_gradients_once_each():
    def sent(**changes: Any) -> float:
        return step_time(work(data=4, **changes), H100).communication["data"].bytes

    def second(**changes: Any) -> float:
        return sent(second_shard=True, **changes) / sent()

    # In bytes a number, the sum of shards is 4 there and 4 back.
    assert second() == pytest.approx((2 + 4) / 8)
    assert second(reduce_bytes=2) == pytest.approx((2 + 2) / 8)
    int8 = 1 + 4 / 256
    assert second(gather_dtype="int8") == pytest.approx((int8 + 4) / 8)
    assert second(gather_dtype="int8", scatter_dtype="int8") == pytest.approx(2 * int8 / 8)
    assert second(batch=64) == pytest.approx(second()), "however many micro-batches there are"


def test_a_layer_takes_as_long_as_its_window_says():
    def attention(**changes: Any) -> float:
        model = MODEL.model_copy(update={"num_layers": 3} | changes)
        return step_time(work(model=model, length=8192, micro_batch=1), H100).attention

    local, whole = attention(sliding_window=512), attention()
    mixed = attention(sliding_window=512, attention_pattern=("local", "local", "global"))
    assert whole > 5 * local
    assert mixed == pytest.approx((2 * local + whole) / 3)


def test_one_device_communicates_nothing():
    assert step_time(work(fsdp=1), H100).communication == {}


def test_no_product_beats_the_peak_or_the_memory():
    for rows in (1, 16, 4096):
        time = product_seconds(rows, 4096, 4096, "bfloat16", H100)
        assert time > 2 * rows * 4096**2 / H100.peak_flops["bfloat16"]
        assert time > 2 * 4096**2 / H100.memory_bandwidth


def test_half_of_the_rate_is_lost_where_the_constant_says():
    efficiency = dataclasses.replace(H100.efficiency, matmul=0.8, matmul_half=1000.0)
    chip = dataclasses.replace(H100, efficiency=efficiency)
    rate = 2 * 8192 * 2000 * 2000 / product_seconds(8192, 2000, 2000, "bfloat16", chip)
    assert rate == pytest.approx(0.5 * 0.8 * H100.peak_flops["bfloat16"])


def test_a_ring_moves_all_but_the_own_part():
    chip = dataclasses.replace(H100, domain_latency=1e-15, network_latency=1e-15)
    link = chip.domain_bandwidth * chip.efficiency.link
    assert ring_seconds(8e9, 8, 1, chip) == pytest.approx(7e9 / link)
    assert ring_seconds(8e9, 1, 1, chip) == 0


def test_chips_of_a_node_share_the_traffic_between_nodes():
    chip = dataclasses.replace(H100, domain_latency=1e-15, network_latency=1e-15, domain_bandwidth=1e15)
    whole_nodes = ring_seconds(8e9, 16, 1, chip)
    one_chip_each = ring_seconds(8e9, 2, 8, chip)
    assert one_chip_each == pytest.approx(8 * whole_nodes, rel=1e-6)


@given(members=st.integers(2, 4096), stride=st.sampled_from([1, 2, 4, 8, 64]), size=st.floats(1, 1e12))
def test_a_ring_is_no_faster_than_its_links(members, stride, size):
    fastest = max(H100.domain_bandwidth, 8 * H100.network_bandwidth)
    assert ring_seconds(size, members, stride, H100) > size * (members - 1) / members / fastest


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("reduce_bytes", [2, 4])
def test_each_zero_stage_sends_what_its_paper_says(zero, reduce_bytes):
    """Weights in two bytes, gradients in those they are summed in, which are all that stage 0 sends."""
    volume = step_time(work(batch=16, zero=zero, reduce_bytes=reduce_bytes), H100).communication["fsdp"].bytes
    matrices = sum(part.size for part in parameters(MODEL) if part.is_matrix)
    gradients = 2 if zero == 0 else 1
    weights = zero_elements_sent(1, zero) - gradients
    assert volume == pytest.approx((2 * weights + reduce_bytes * gradients) * matrices * 7 / 8)


def test_stage_2_scatters_every_micro_batch_and_stage_1_once():
    once, often = (step_time(work(batch=64, zero=zero), H100).communication["fsdp"].bytes for zero in (1, 2))
    matrices = sum(part.size for part in parameters(MODEL) if part.is_matrix)
    assert often - once == pytest.approx(3 * 4 * matrices * 7 / 8)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_replicas_sum_their_shards_once_a_step(zero):
    volume = step_time(work(batch=128, data=2, zero=zero), H100).communication["data"].bytes
    matrices = sum(part.size for part in parameters(MODEL) if part.is_matrix)
    assert volume == pytest.approx(4 * matrices / 8)


def test_others_pipelines_gather_and_scatter_once_whatever_the_stage_of_zero():
    works = [work(stage=4, zero=zero) for zero in (1, 2, 3)]
    one, two, three = [(published_time(w, H100), published_memory(w)) for w in works]
    assert one == two == three


def test_full_remat_costs_a_forward_pass_of_the_layers():
    none, full = (step_time(work(remat=remat), H100) for remat in ("none", "full"))
    head = step_time(work(model=MODEL.model_copy(update={"num_layers": 1})), H100)
    layers = none.matmul - (head.matmul - (none.matmul - head.matmul) / 23)
    assert full.matmul - none.matmul == pytest.approx(layers / 3)
    assert full.attention / none.attention == pytest.approx(4.5 / 3.5)


def test_policies_cost_less_the_more_they_save():
    none, dots, qkv, full = (seconds(remat=remat) for remat in ("none", "dots", "save_qkv_proj", "full"))
    assert none < dots < qkv < full


def test_sequence_parallelism_shares_what_tensor_parallelism_repeats():
    plain, shared = (step_time(work(tensor=8, sequence_parallel=on), H100) for on in (False, True))
    assert shared.memory_bound < plain.memory_bound
    assert shared.communication["tensor"].bytes == plain.communication["tensor"].bytes


def test_tensor_parallelism_across_nodes_is_slower_than_within():
    across, within = (step_time(work(tensor=ways, fsdp=64 // ways), H100) for ways in (16, 8))
    assert across.total > within.total
    assert across.communication["tensor"].seconds > 2 * within.communication["tensor"].seconds


def test_overlap_hides_collectives_that_run_beside_arithmetic_only():
    free = dataclasses.replace(H100, efficiency=dataclasses.replace(H100.efficiency, overlap=1.0))
    time = step_time(work(tensor=2), free)
    ends = 50304 * 2048 / 2 * 2  # The first gather, of the embedding, has nothing beside it.
    micro_batches = 512 // (8 * 2)
    assert time.communication["fsdp"].exposed == pytest.approx(micro_batches * ring_seconds(ends, 8, 2, free))
    assert time.communication["tensor"].exposed == time.communication["tensor"].seconds
    overlapped = step_time(work(tensor=2, overlapped_tensor_parallel=True), free)
    assert overlapped.communication["tensor"].exposed == 0


def test_float8_halves_products_and_pays_for_the_casts():
    wide, narrow = (step_time(work(precision=precision), H100) for precision in ("bfloat16", "float8"))
    assert wide.matmul / 2 < narrow.matmul < wide.matmul
    assert narrow.attention == wide.attention
    assert narrow.memory_bound > wide.memory_bound


def test_scores_that_are_written_to_memory_cost_time():
    fused, written = (step_time(work(fused_attention=on), H100) for on in (True, False))
    assert written.attention > 2 * fused.attention
    blocks = step_time(work(blocked_attention=True), H100)
    assert fused.attention < blocks.attention < written.attention


def test_offload_crosses_the_link_to_the_host():
    time = step_time(work(offload_optimizer=True, offload_activations=True, remat="full"), H100)
    moments = 2 * memory(work(offload_optimizer=True)).host
    inputs = 2 * 24 * 512 // 8 * 2048 * 2048 * 2
    assert time.communication["host"].bytes == pytest.approx(moments + inputs)


def test_more_devices_never_take_longer_for_the_same_batch():
    times = [seconds(data=data, micro_batch=1) for data in (1, 2, 4, 8, 16, 32, 64)]
    assert times == sorted(times, reverse=True)


def test_muon_pays_for_its_products_and_their_way():
    """Of MODEL, counted by hand: query, key and value as one width each, out, and the MLP's two or three."""
    model, width, mlp = MODEL, MODEL.embed_dim, MODEL.mlp_width
    assert model.num_heads * model.head_width == width
    assert not model.gated
    shapes = [(width, width)] * 4 + [(width, mlp)] * 2
    products = 0.0
    for short, long in shapes:
        each = (short, short, long), (short, short, short), (short, long, short)
        products += sum(product_seconds(*sizes, "bfloat16", H100) for sizes in each)
    per_device = -(-model.num_layers // 8)
    moves = sum(2 * ring_seconds(per_device * short * long * 2, 8, 1, H100) for short, long in shapes)
    longer = step_time(work(optimizer="muon", fsdp=8), H100).optimizer
    moments = 4 * 2 * model.num_layers * sum(short * long for short, long in shapes) / 8
    read = moments / (H100.memory_bandwidth * H100.efficiency.memory)
    expected = 5 * per_device * products + moves - read
    assert longer - step_time(work(fsdp=8), H100).optimizer == pytest.approx(expected, rel=1e-6)
    assert expected > 0
