"""How large a run is, before there is a cluster: memory of a device, pairs per second, cost. Arithmetic alone.

Memory is that of tensors at five moments of an optimizer step, of which the worst counts:

- output layer: the forward pass has ended, all that autograd keeps is there, and logits come on top;
- last block: the backward pass has come there; FSDP holds its weights, those of the block before it, the gradients of
  both, and what it sums over workers;
- first block: the activations have gone, the gradients have come;
- embedding: its gradient is summed over workers, together with the output layer's;
- update: what the optimizer needs for itself.

What a step before has left is there from the start: with more than one microbatch the gradients, and the optimizer's
state. An allocator's fragments, CUDA's context and NCCL's buffers come on top: a device counts as full at 85 %.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from dpo_ray.config import Config
from dpo_ray.model.footprint import Footprint, Weight
from dpo_ray.training.budget import CPU_TOKENS, GRADIENT_SHARE, MOST_TOKENS, TRIED_TOKENS, USED_SHARE
from dpo_ray.training.optimizer import BLOCK, NEWTON_SCHULZ_STEPS, in_blocks

MILLION = 1_000_000
GIB = 2**30
MOST_WORKERS = 1024
# Until it is summed over workers a gradient is in float32.
REDUCED_BYTES = 4
# Of a weight in 4 bits, with its block's scale, itself in 8 bits (arXiv:2305.14314, section 3).
QUANTIZED_BYTES = 0.516
# Tensors that the optimizer keeps for each trained weight, of its dtype; of the last two the weights that are AdamW's.
STATES = {"adamw": 2, "rmsprop": 1, "adamw_kahan": 3, "adamw_8bit": 2, "muon": 2}


@dataclass(frozen=True, slots=True)
class Network:
    """What connects devices.

    Attributes:
        devices_per_node: Those that are near each other.
        near_gb_s: What a device sends and receives within a node, in GB/s.
        far_gb_s: And beyond it; the devices of a node have as many times that together.
        latency_us: What a collective takes for each node that it reaches beyond the first.
    """

    devices_per_node: int = 8
    near_gb_s: float = 450.0
    far_gb_s: float = 50.0
    latency_us: float = 5.0

    def step_s(
        self,
        workers: int,
        group: int,
        compute_s: float,
        gather_bytes: float,
        sum_bytes: float,
        blocks: int,
        microbatches: int,
        reduce_each: bool,
    ) -> float:
        """Seconds of an optimizer step; what fits beside computation is free.

        Args:
            workers: Devices that share the work.
            group: Those of them that share a copy of the weights.
            compute_s: Of a microbatch.
            gather_bytes: All weights, gathered twice for each microbatch.
            sum_bytes: All gradients, summed once for each step.
            blocks: Collectives of a pass.
            microbatches: Of a step.
            reduce_each: Whether gradients are summed over a group for each microbatch instead.
        """
        gather_s = 2 * self._collective_s(group, group, gather_bytes, blocks)
        sum_s = self._collective_s(group, group, sum_bytes, blocks)
        # Between groups a device sums its own shard alone, once: scattered, then gathered.
        between_s = 2 * self._collective_s(workers // group, workers, sum_bytes / group, blocks)
        each_s = gather_s + (sum_s if reduce_each else 0.0)
        return (microbatches - 1) * max(compute_s, each_s) + max(compute_s, gather_s + sum_s + between_s)

    def _collective_s(self, devices: int, reach: int, size: float, blocks: int) -> float:
        """Seconds in which devices gather or scatter so many bytes, block by block.

        Args:
            devices: How many.
            reach: Out of so many, node by node, from the first to the last.
            size: Bytes of the whole.
            blocks: Collectives.
        """
        if devices == 1:
            return 0.0
        nodes = min(devices, -(-reach // self.devices_per_node))
        # All devices of a node that take part have its links together: a byte that they all want comes to it once.
        far_gb_s = self.far_gb_s * devices / nodes
        bandwidth = (self.near_gb_s if nodes == 1 else min(self.near_gb_s, far_gb_s)) * 1e9
        return size * (devices - 1) / devices / bandwidth + self.latency_us * 1e-6 * (nodes - 1) * blocks


@dataclass(frozen=True, slots=True)
class Hardware:
    """What is rented, and what is made of it.

    Attributes:
        memory_gib: Of a device.
        tflops: What a device can do at most, in 10^12 operations per second.
        utilisation: Share of it that training and scoring make use of.
        price_per_hour: Of a device.
        network: Between devices.
    """

    memory_gib: float = 80.0
    tflops: float = 989.0
    utilisation: float = 0.4
    price_per_hour: float = 2.5
    network: Network = field(default_factory=Network)

    @property
    def usable_bytes(self) -> float:
        """What tensors may take of a device."""
        return USED_SHARE * self.memory_gib * GIB

    def seconds(self, operations: float) -> float:
        """How long a device takes for them."""
        return operations / (self.tflops * 1e12 * self.utilisation)


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker computes in a step.

    Attributes:
        tokens: Of its largest microbatch.
        microbatches: How many it has.
        reduce_each: Whether gradients are summed over workers after each, see `training.budget`.
    """

    tokens: int
    microbatches: int
    reduce_each: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """A run with a number of workers.

    Attributes:
        workers: How many.
        group: Those that share a copy of the weights.
        batch_pairs: Pairs of a step: train.global_batch_pairs, or one for each worker where that is fewer.
        load: What the worker with most pairs computes.
        peak_bytes: Its memory at the worst moment.
        host_bytes: What it keeps in the host's memory.
        fits: Whether that is what tensors may take.
        busy: Share of the time in which a device computes; the rest is communication.
        pairs_per_s: Of all workers.
        hours_per_million: Hours that training on a million pairs takes.
        cost_per_million: What it costs, with scoring them once and with the replica that evaluates beside training.
        reference_devices: So many keep pace with the trainer.
    """

    workers: int
    group: int
    batch_pairs: int
    load: Load
    peak_bytes: int
    host_bytes: int
    fits: bool
    busy: float
    pairs_per_s: float
    hours_per_million: float
    cost_per_million: float
    reference_devices: float


@dataclass(frozen=True, slots=True)
class Sizing:
    """A run's memory and speed by the number of its workers.

    Attributes:
        config: The run.
        policy: Of its policy.
        reference: Of its reference; None where it has none in actors.
        pair: Mean tokens of a pair, its prompt once, and how many of them are the answers'.
        hardware: What is rented.
    """

    config: Config
    policy: Footprint
    reference: Footprint | None
    pair: tuple[float, float]
    hardware: Hardware

    @property
    def scores(self) -> bool:
        """Whether a reference scores the pairs, and not something before this run."""
        return self.reference is not None or self.config.reference.place == "adapter_off"

    def group(self, workers: int) -> int:
        """How many of the workers share a copy of the weights; nodes are full, but for the last."""
        return self.config.scaling.group_of([rank // self._per_node for rank in range(workers)])

    @property
    def _per_node(self) -> int:
        return self.hardware.network.devices_per_node

    def load(self, workers: int) -> Load:
        """What the worker with most pairs computes in a step.

        Args:
            workers: How many share the global batch.
        """
        configured, tokens = self.config.train.tokens_per_microbatch, self._step_tokens(workers)
        if configured != "auto":
            return self._load(workers, configured)
        if not self.config.scaling.gpus_per_worker:
            return self._load(workers, CPU_TOKENS)
        # As many as fit, in steps of 256 as `training.budget` has them.
        low, high = TRIED_TOKENS[-1] // 256, min(MOST_TOKENS, max(TRIED_TOKENS[-1], tokens + 256)) // 256
        while low < high:
            middle = -(-(low + high) // 2)
            fits = self.peak_bytes(workers, self._load(workers, 256 * middle)) <= self.hardware.usable_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return self._load(workers, 256 * low)

    def _step_tokens(self, workers: int) -> int:
        pairs = -(-max(self.config.train.global_batch_pairs, workers) // workers)
        return round(pairs * self.pair[0])

    def _load(self, workers: int, budget: int) -> Load:
        tokens = self._step_tokens(workers)
        reduce_each = workers == 1 and self.config.model.weights_dtype == "float32"
        if self.config.scaling.gpus_per_worker:
            whole = REDUCED_BYTES * _numel(_trained(self.policy.weights))
            reduce_each |= whole > GRADIENT_SHARE * self.hardware.memory_gib * GIB
        return Load(min(budget, tokens), -(-tokens // budget), reduce_each)

    def moments(self, workers: int, load: Load) -> dict[str, dict[str, int]]:
        """Bytes of a device at each moment of a step, by what they are for."""
        policy, compute = self.policy, _bytes_of(self.config.model.compute_dtype)
        group = self.group(workers)
        weights, state, shards = self._resident(group)
        offload, alone, several = self.config.model.cpu_offload, workers == 1, load.microbatches > 1
        always = {} if offload else {"weights": weights, "optimizer state": state}
        shards = 0 if offload else shards
        whole = REDUCED_BYTES * _numel(_trained(policy.weights))
        # What waits to be summed over further copies of the weights stays as it was summed, and becomes the gradient.
        waiting = shards if group == workers else REDUCED_BYTES * shards // self._trained_bytes
        left = 0 if not several else waiting if load.reduce_each else whole
        block = max(policy.blocks, key=_numel, default=())
        gathered = tuple(compute * _gathered(part) for part in (policy.rest, block, () if alone else block))
        root_shard = 0 if offload else self._trained_bytes * _shard(_trained(policy.rest), group)
        root_trained, head_gradient = _numel(_trained(policy.rest)), compute * policy.head_weight
        kept, working = policy.kept.at(load.tokens), policy.working.at(load.tokens)
        of_block, trained_block = kept // max(1, len(policy.blocks)), _numel(_trained(block))
        block_sum, block_gradient = REDUCED_BYTES * trained_block, compute * trained_block
        # With one worker what is summed becomes the gradient, where there is none yet.
        root_sum = 0 if alone and not several else REDUCED_BYTES * root_trained
        root_left = REDUCED_BYTES * root_trained if several and not load.reduce_each else compute * root_trained
        return {
            "output layer": {
                **always,
                "gradients": left,
                "gathered weights": gathered[0] + gathered[2],
                "activations": kept,
                "logits": policy.head(round(load.tokens * self.pair[1] / self.pair[0])),
            },
            "last block": {
                **always,
                "gradients": left + head_gradient,
                "gathered weights": sum(gathered),
                # The block's own go while its gradients come.
                "activations": kept + max(working, block_gradient - of_block),
                "sums": block_sum,
            },
            "first block": {
                **always,
                "gradients": shards
                - (0 if several and load.reduce_each else root_shard)
                + max(root_left, head_gradient),
                "gathered weights": sum(gathered[:2]),
                "activations": max(of_block + working, block_gradient),
                "sums": block_sum,
            },
            "embedding": {**always, "gradients": shards + root_left, "sums": root_sum},
            "update": {**always, "gradients": shards, "sums": self._update_bytes(group)},
        }

    def peak_bytes(self, workers: int, load: Load) -> int:
        """At the worst moment."""
        return max(sum(parts.values()) for parts in self.moments(workers, load).values())

    def host_bytes(self, workers: int) -> int:
        """What model.cpu_offload keeps in the host's memory for a worker."""
        return sum(self._resident(self.group(workers))) if self.config.model.cpu_offload else 0

    def _resident(self, group: int) -> tuple[int, int, int]:
        """A worker's share of the weights, of the optimizer's state, and of the gradients."""
        trained = _shard(_trained(self.policy.weights), group)
        frozen = _shard(
            (weight for weight in self.policy.weights if not weight.trained and not weight.quantized), group
        )
        in_4_bits = _numel(weight for weight in self.policy.weights if weight.quantized)
        of_trained = self._trained_bytes * trained
        # Beside an adapter they are in the dtype that they compute in.
        adapted, model = self.config.adapter.rank is not None, self.config.model
        weights = of_trained + _bytes_of(model.compute_dtype if adapted else model.weights_dtype) * frozen
        weights += round(QUANTIZED_BYTES * in_4_bits)
        state = sum(self._state_bytes(weight, True, group) for block in self.policy.blocks for weight in block)
        state += sum(self._state_bytes(weight, False, group) for weight in self.policy.rest)
        return weights, state, of_trained

    def _state_bytes(self, weight: Weight, in_a_block: bool, group: int) -> int:
        """What the optimizer keeps for a worker's share of a weight."""
        name, numel = self.config.optimizer.name, weight.shard(group)
        if not weight.trained:
            return 0
        if name == "adamw_8bit" and not weight.embedding and in_blocks(weight.rows, weight.numel):
            # Two moments of a byte each, and for each block of them a scale.
            return 2 * (numel + self._trained_bytes * numel // BLOCK)
        tensors = 1 if name == "muon" and in_a_block and weight.smaller_side > 1 else STATES[name]
        return tensors * self._trained_bytes * numel

    def _orthogonalized(self) -> list[Weight]:
        """What Muon updates."""
        wanted = self.config.optimizer.name == "muon"
        return [w for block in self.policy.blocks for w in _trained(block) if wanted and w.smaller_side > 1]

    def _update_bytes(self, group: int) -> int:
        """What the update needs for itself: AdamW is one kernel, others go weight by weight, on GPUs not RMSprop."""
        optimizer, trained = self.config.optimizer, _trained(self.policy.weights)
        shards = [self._trained_bytes * weight.shard(group) for weight in trained]
        if optimizer.name == "adamw" or not shards or self.config.model.cpu_offload:
            return 0
        if optimizer.name == "muon":
            # Of the matrix that a worker has to itself: its part of each that is dealt, the whole, two steps of it, and
            # two of its products with itself.
            compute = _bytes_of(self.config.model.compute_dtype)
            whole = (compute * (4 * w.numel + 2 * w.smaller_side**2) for w in self._orthogonalized())
            return max(whole, default=0)
        on_gpu = self.config.scaling.gpus_per_worker
        if optimizer.name == "rmsprop" and on_gpu:
            return sum(shards) * (2 if optimizer.weight_decay else 1)
        if optimizer.name == "adamw_8bit":
            # One kernel on GPUs; elsewhere in steps: both moments, the gradient, and two of the denominator.
            return 0 if on_gpu else 5 * max(shards)
        return max(shards)

    def reference_parts(self) -> dict[str, int]:
        """Bytes of a device of the reference."""
        assert self.reference is not None, "there is no reference in actors"
        settings, devices = self.config.reference, self.config.reference.devices_per_replica
        size = _bytes_of(self.config.reference_dtype)
        tokens = settings.tokens_per_microbatch
        completions = round(tokens * self.pair[1] / self.pair[0])
        passes = self.reference.kept.at(tokens) + max(
            self.reference.working.at(tokens), self.reference.head(completions)
        )
        weights = size * _shard(self.reference.weights, devices)
        block = max(map(_numel, self.reference.blocks), default=0)
        gathered = 0 if devices == 1 else size * (_numel(self.reference.rest) + 3 * block)
        return {"weights": weights, "gathered weights": gathered, "activations and logits": passes}

    def reference_pairs_per_s(self) -> float:
        """Of one device; without a reference in actors, the policy's without its adapter."""
        model = self.reference or self.policy
        return 1.0 / self.hardware.seconds(2.0 * _numel(model.weights) * self.pair[0])

    def scale(self, workers: int) -> Scale:
        """The run with this number of workers."""
        hardware, load, weights = self.hardware, self.load(workers), self.policy.weights
        trained, frozen = _numel(_trained(weights)), _numel(w for w in weights if not w.trained)
        again = 2 * (trained + frozen) if self.config.model.gradient_checkpointing else 0
        tokens = self._step_tokens(workers)
        compute_s = hardware.seconds((6.0 * trained + 4.0 * frozen + again) * tokens / load.microbatches)
        step_s = hardware.network.step_s(
            workers,
            self.group(workers),
            compute_s,
            _bytes_of(self.config.model.compute_dtype) * _gathered(weights),
            REDUCED_BYTES * trained,
            len(self.policy.blocks),
            load.microbatches,
            load.reduce_each,
        )
        sides = ((w.smaller_side, w.numel // w.smaller_side) for w in self._orthogonalized())
        update_s = (
            hardware.seconds(sum(NEWTON_SCHULZ_STEPS * (4.0 * m * m * n + 2.0 * m**3) for m, n in sides)) / workers
        )
        step_s += update_s
        batch = max(self.config.train.global_batch_pairs, workers)
        pairs_per_s = batch / step_s
        hours = MILLION / pairs_per_s / 3600
        scoring_hours = MILLION / self.reference_pairs_per_s() / 3600 if self.scores else 0.0
        if self.reference is None:
            # The workers score by themselves.
            hours, scoring_hours = hours + scoring_hours / workers, 0.0
        evaluating = self.config.reference.devices_per_replica if self.config.train.eval_place == "actors" else 0
        peak = self.peak_bytes(workers, load)
        return Scale(
            workers,
            self.group(workers),
            batch,
            load,
            peak,
            self.host_bytes(workers),
            peak <= hardware.usable_bytes,
            (load.microbatches * compute_s + update_s) / step_s,
            MILLION / hours / 3600,
            hours,
            (hours * (workers + evaluating) + scoring_hours) * hardware.price_per_hour,
            pairs_per_s / self.reference_pairs_per_s() if self.reference else 0.0,
        )

    def least_workers(self) -> int | None:
        """The fewest workers whose devices hold the run; None: not even `MOST_WORKERS` do."""
        over = self.config.scaling.shard_over
        most = {"all": MOST_WORKERS, "node": self._per_node}.get(str(over), over)
        for workers in range(1, MOST_WORKERS + 1):
            # Where they are no groups of the kind that is asked for, all share a copy: more of them would not fit.
            if (
                self.group(workers) <= int(most)
                and self.peak_bytes(workers, self.load(workers)) <= self.hardware.usable_bytes
            ):
                return workers
        return None

    @property
    def _trained_bytes(self) -> int:
        return _bytes_of(self.config.model.weights_dtype)


def _trained(weights: Iterable[Weight]) -> list[Weight]:
    return [weight for weight in weights if weight.trained]


def _numel(weights: Iterable[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def _gathered(weights: Iterable[Weight]) -> int:
    return sum(weight.numel for weight in weights if not weight.quantized)


def _shard(weights: Iterable[Weight], group: int) -> int:
    return sum(weight.shard(group) for weight in weights)


def _bytes_of(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size
