"""A run's memory and speed, from a model whose numbers can be added up by hand."""

from dataclasses import replace
from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.model.footprint import Footprint, Growth, Weight
from dpo_ray.training.sizing import GIB, Hardware, Load, Network, Sizing

# 3 blocks of 600 weights (6 rows) and 10 rows of 100 besides: 2,800.
BLOCK = (Weight(6, 600, True),)
MODEL = Footprint(
    (BLOCK,) * 3, (Weight(10, 1000, True),), Growth(0, 30), Growth(10, 5), lambda tokens: 7 * tokens, 1000
)


def a_run(**sections: Any) -> Config:
    return parse_config(
        {
            "name": "run",
            "storage_path": "runs",
            "model": {"path": "model", **sections.pop("model", {})},
            "data": {"train": ["pairs.jsonl"]},
            "train": {"global_batch_pairs": 64, "tokens_per_microbatch": 1000, **sections.pop("train", {})},
            "scaling": {"gpus_per_worker": 1},
            "reference": {"gpus_per_replica": 0, **sections.pop("reference", {})},
            **sections,
        }
    )


def sizing(hardware: Hardware | None = None, footprint: Footprint = MODEL, **sections: Any) -> Sizing:
    return Sizing(a_run(**sections), footprint, None, (100.0, 60.0), hardware or Hardware())


def totals(moments: dict[str, dict[str, int]]) -> dict[str, int]:
    return {moment: sum(parts.values()) for moment, parts in moments.items()}


def test_one_microbatch_on_four_workers() -> None:
    """Of 6 rows the largest shard has 2, of 10 rows 3: 3 x 200 + 300 = 900 weights, 3,600 bytes, AdamW 7,200.

    Gathered in bfloat16: 2,000 for the rest, 1,200 for a block. 100 tokens leave 3,000 bytes, 510 more in a block, of
    whose 1,000 each is; its gradients are 1,200 in bfloat16, 2,400 where they are summed. The rest's gradient is 2,000
    in bfloat16, 4,000 where it is summed. Shards of the blocks' gradients: 3 x 200 x 4 = 2,400, of all 3,600.
    """
    always = 3600 + 7200
    assert totals(sizing().moments(4, Load(100, 1, False))) == {
        "output layer": always + (2000 + 1200) + 3000 + 7 * 60,
        "last block": always + 2000 + (2000 + 1200 + 1200) + 3510 + 2400,
        "first block": always + (2400 + 2000) + (2000 + 1200) + 1510 + 2400,
        "embedding": always + (3600 + 2000) + 4000,
        "update": always + 3600,
    }


def test_gradients_of_earlier_microbatches() -> None:
    """Not summed yet, 4 bytes of each of the 2,800 weights; summed each time, a shard; alone, all of them."""
    run = sizing()
    last = {each: run.moments(4, Load(100, 2, each))["last block"]["gradients"] for each in (False, True)}
    assert last == {False: 4 * 2800 + 2000, True: 3600 + 2000}
    assert run.moments(1, Load(100, 2, True))["output layer"]["gradients"] == 4 * 2800
    # With one worker there is nothing to gather ahead, and what is summed becomes the gradient.
    first = run.moments(1, Load(100, 1, True))
    assert first["last block"]["gathered weights"] == 2000 + 1200
    assert first["embedding"]["sums"] == 0


def test_other_optimizers_and_places() -> None:
    """A bfloat16 shard is 1,800 bytes: two moments and Kahan's sum 5,400, and the largest weight 600 besides."""
    kahan = sizing(model={"weights_dtype": "bfloat16"}, optimizer={"name": "adamw_kahan"})
    assert kahan.moments(4, Load(100, 1, False))["update"] == {
        "weights": 1800,
        "optimizer state": 5400,
        "gradients": 1800,
        "sums": 600,
    }
    rmsprop = sizing(optimizer={"name": "rmsprop", "weight_decay": 0.1})
    assert rmsprop.moments(4, Load(100, 1, False))["update"]["sums"] == 2 * 3600
    host = sizing(model={"cpu_offload": True})
    assert host.host_bytes(4) == 3600 + 7200 + 3600
    assert totals(host.moments(4, Load(100, 1, False)))["update"] == 0


def test_moments_in_8_bits() -> None:
    """Of 4 rows of 512 a worker of two has 1,024 weights: 2 x 1,024 bytes, and for each of 4 blocks two scales of 4.

    An embedding, and rows of 100, have 8 bytes a weight.
    """
    blocks = ((Weight(4, 2048, True), *BLOCK),)
    footprint = replace(MODEL, blocks=blocks, rest=(Weight(4, 2048, True, embedding=True),))
    found = sizing(footprint=footprint, optimizer={"name": "adamw_8bit"}).moments(2, Load(100, 1, False))["update"]
    assert found["optimizer state"] == 2 * 1024 + 2 * 4 * 4 + 8 * 300 + 8 * 1024
    assert found["sums"] == 0


def test_muon() -> None:
    """A block's 600 weights, 6 rows, have one moment, its norm of 8 two, and so the rest's 1,000; 2 x 300 numbers are
    a worker's part. In the update 4 x 600 + 2 x 6 x 6 numbers in bfloat16. Five steps of 4 x 6 x 6 x 100 + 2 x 6^3
    operations, three times, on two workers that do 10^9 a second."""
    footprint = replace(MODEL, blocks=((*BLOCK, Weight(8, 8, True)),) * 3)
    hardware = Hardware(tflops=2e-3, utilisation=0.5, network=Network(8, 1e9, 1e9, 0.0))
    muon, adamw = (sizing(hardware, footprint, optimizer={"name": name}) for name in ("muon", "adamw"))
    found = muon.moments(2, Load(100, 1, False))["update"]
    assert found["optimizer state"] == 3 * (4 * 300 + 8 * 4) + 8 * 500
    assert found["sums"] == 2 * (4 * 600 + 2 * 6 * 6)
    steps_s = [run.scale(2).batch_pairs / run.scale(2).pairs_per_s for run in (muon, adamw)]
    assert steps_s[0] - steps_s[1] == pytest.approx(3 * 5 * (4 * 36 * 100 + 2 * 6**3) / 2 / 1e9)


def test_muon_leaves_experts_and_what_is_frozen_alone() -> None:
    """Of three dimensions a weight is AdamW's: two moments. Where blocks are frozen nothing is whole on a worker."""
    experts = replace(MODEL, blocks=((Weight(4, 2048, True, dims=3),),), rest=())
    found = sizing(footprint=experts, optimizer={"name": "muon"}).moments(2, Load(100, 1, False))["update"]
    assert (found["optimizer state"], found["sums"]) == (8 * 1024, 0)


def test_an_adapter_alone_is_trained() -> None:
    """500 frozen weights in bfloat16 and 100 of the adapter: 1,000 + 400 bytes, and 800 for AdamW."""
    block = (Weight(5, 500, False), Weight(5, 100, True))
    footprint = replace(MODEL, blocks=(block,), rest=(Weight(10, 1000, False),), head_weight=0)
    found = sizing(footprint=footprint, adapter={"rank": 4}).moments(1, Load(100, 1, True))
    assert found["update"] == {"weights": 1000 + 2000 + 400, "optimizer state": 800, "gradients": 400, "sums": 0}
    assert found["last block"]["sums"] == 400


def test_weights_in_4_bits_are_whole_on_each_worker_and_never_gathered() -> None:
    """10,000 of them are 5,000 bytes, 10,000 / 64 for scales in 8 bits, 4 bytes for each 256 of these: 5,159. Of the
    rest a worker of 2 has half of 100 in float32 and half of 1,000 in bfloat16."""
    block = (Weight(5, 10_000, False, quantized=True), Weight(10, 100, True))
    footprint = replace(MODEL, blocks=(block,), rest=(Weight(10, 1000, False),), head_weight=0)
    adapter = {"rank": 4, "quantize": "nf4"}
    found = sizing(footprint=footprint, adapter=adapter, reference={"place": "adapter_off"})
    moments = found.moments(2, Load(100, 1, False))
    assert moments["update"]["weights"] == pytest.approx(5159 + 200 + 1000, abs=2)
    assert moments["last block"]["gathered weights"] == 2 * (1000 + 100 + 100)


def test_what_a_worker_computes() -> None:
    """64 pairs of 100 tokens: 1,600 a worker of four in two microbatches of 1,000; of 128 workers each has a pair."""
    run = sizing()
    assert run.load(4) == Load(1000, 2, False)
    assert run.load(128) == Load(100, 1, False)
    # 11,200 bytes of gradient are more than 15 % of 70,000.
    assert sizing(Hardware(memory_gib=70_000 / GIB)).load(4).reduce_each


def test_as_many_tokens_as_fit() -> None:
    """4 workers have 10,000 tokens. Of 170,000 usable bytes 31,600 are taken otherwise in the output layer: 10,800 of
    weights and state, 3,200 gathered, 11,200 of gradients: 144,800 at 30 + 0.6 x 7 = 34.2 each are 4,233 tokens. In the
    last block they are 170,000 - 10,800 - 13,200 - 4,400 - 2,400 - 10 = 139,190 at 35: 3,976, or 15 times 256."""
    memory = Hardware(memory_gib=200_000 / GIB)
    run = sizing(memory, train={"tokens_per_microbatch": "auto", "global_batch_pairs": 400})
    assert run.load(4) == Load(3840, 3, False)
    assert run.least_workers() == 1


def test_too_large_for_any_number_of_workers() -> None:
    """30,000 bytes of activations stay on each; with 4,000 more, 10,000 workers would not help."""
    assert sizing(Hardware(memory_gib=10_000 / GIB)).least_workers() is None


def test_a_step_takes_the_longer_of_computation_and_communication() -> None:
    """Two nodes of 8, which have 10 GB/s together: 15/16 of 32 MB twice are 6 ms and 2 x 3 x 100 us more: 6.6 ms; sums
    of 64 MB take 6.3 ms. Of three microbatches of 7 ms the last takes 12.9 ms; where sums come each time, all do."""
    network = Network(devices_per_node=8, near_gb_s=100.0, far_gb_s=1.25, latency_us=100.0)
    once = network.step_s(16, 16, 7e-3, 32e6, 64e6, 3, 3, False)
    assert once == pytest.approx(2 * 7e-3 + 12.9e-3)
    assert network.step_s(16, 16, 7e-3, 32e6, 64e6, 3, 3, True) == pytest.approx(3 * 12.9e-3)
    # A link for each that has more than there is within a node does not help.
    wide = Network(devices_per_node=8, near_gb_s=10.0, far_gb_s=10.0, latency_us=100.0)
    assert wide.step_s(16, 16, 7e-3, 32e6, 64e6, 3, 3, False) == pytest.approx(once)
    assert network.step_s(1, 1, 7e-3, 32e6, 64e6, 3, 3, True) == pytest.approx(3 * 7e-3)


def test_copies_are_summed_once_and_gathered_within_a_node() -> None:
    """Two nodes of 8: 7/8 of 32 MB twice at 100 GB/s are 0.56 ms, sums of 64 MB over a node another 0.56 ms. Then each
    device sums 8 MB with the one of the other node: 1/2 of them twice at 10 GB/s, and 2 x 3 x 100 us: 1.4 ms."""
    network = Network(devices_per_node=8, near_gb_s=100.0, far_gb_s=10.0, latency_us=100.0)
    assert network.step_s(16, 8, 1e-9, 32e6, 64e6, 3, 3, False) == pytest.approx(3 * 0.56e-3 + 0.56e-3 + 1.4e-3)
    assert network.step_s(16, 8, 1e-9, 32e6, 64e6, 3, 3, True) == pytest.approx(3 * 1.12e-3 + 1.4e-3)
    assert network.step_s(16, 8, 7e-3, 32e6, 64e6, 3, 3, True) == pytest.approx(3 * 7e-3)
    # Groups of 4 in one node of 8 sum within it: 1/2 of 16 MB twice at 100 GB/s; nothing is latent there.
    assert network.step_s(8, 4, 1e-9, 32e6, 64e6, 3, 1, False) == pytest.approx(0.48e-3 + 0.48e-3 + 0.16e-3)


def test_memory_with_a_copy_on_each_node() -> None:
    """Of 8 workers on two nodes each has what one of 4 has; what waits for the other node is in float32."""
    hardware = Hardware(network=Network(devices_per_node=4))
    nodes = sizing(hardware, scaling={"gpus_per_worker": 1, "shard_over": "node"})
    assert [nodes.group(workers) for workers in (1, 3, 4, 6, 8)] == [1, 3, 4, 6, 4]
    assert nodes.moments(8, Load(100, 2, True)) == sizing(hardware).moments(4, Load(100, 2, True))
    kahan: dict[str, Any] = {"model": {"weights_dtype": "bfloat16"}, "optimizer": {"name": "adamw_kahan"}}
    nodes = sizing(hardware, scaling={"gpus_per_worker": 1, "shard_over": "node"}, **kahan)
    assert nodes.moments(8, Load(100, 2, True))["output layer"]["gradients"] == 4 * 900
    assert sizing(hardware, **kahan).moments(8, Load(100, 2, True))["output layer"]["gradients"] == 2 * (3 * 100 + 200)


def test_the_fewest_workers_with_a_copy_on_each_node() -> None:
    """What does not fit on a full node would fit on 5 workers of two nodes, but not on 8: it needs another setting."""
    microbatches = {"tokens_per_microbatch": 200, "global_batch_pairs": 8192}
    peaks = [sizing().peak_bytes(workers, Load(200, 2, True)) for workers in (4, 5)]
    hardware = Hardware(memory_gib=(peaks[0] - 1) / 0.85 / GIB, network=Network(devices_per_node=4))
    assert peaks[1] < hardware.usable_bytes < peaks[0]
    scaling = {"gpus_per_worker": 1, "workers": 8, "shard_over": "node"}
    assert sizing(hardware, train=microbatches).least_workers() == 5
    assert sizing(hardware, train=microbatches, scaling=scaling).scale(5).fits
    assert sizing(hardware, train=microbatches, scaling=scaling).least_workers() is None


def test_pairs_and_price() -> None:
    """A device does 10^9 operations a second: 6 x 2,800 x 100 for a pair are 595 pairs/s, two workers twice that, where
    communication costs nothing. A million pairs take 466.7 s on two, 0.259 device-hours at 3 an hour."""
    hardware = Hardware(tflops=2e-3, utilisation=0.5, price_per_hour=3.0, network=Network(8, 1e9, 1e9, 0.0))
    found = sizing(hardware).scale(2)
    assert found.pairs_per_s == pytest.approx(2e9 / (6 * 2800 * 100))
    assert found.cost_per_million == pytest.approx(3 * 6 * 2800 * 100 * 1e6 / 1e9 / 3600)
    assert found.busy == pytest.approx(1.0)
    scored = replace(sizing(hardware), reference=MODEL).scale(2)
    # Scoring is a third of the operations, and three workers need one device for it.
    assert scored.cost_per_million == pytest.approx(4 / 3 * found.cost_per_million)
    assert scored.reference_devices == pytest.approx(2 / 3)
    # Two more devices beside these two, all the time.
    beside = {
        "train": {"eval_place": "actors", "eval_every_steps": 1},
        "data": {"train": ["pairs.jsonl"], "eval_fraction": 0.1},
        "reference": {"devices_per_replica": 2},
    }
    assert sizing(hardware, **beside).scale(2).cost_per_million == pytest.approx(2 * found.cost_per_million)
    again = sizing(hardware, model={"gradient_checkpointing": True}).scale(2)
    assert again.pairs_per_s == pytest.approx(6 / 8 * found.pairs_per_s)
