"""Implicit rewards, and metrics that add up over parts."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from dpo_ray.objective.losses import LOSSES, AnswerStats
from dpo_ray.objective.rewards import METRIC_SUMS, finish_metrics, implicit_rewards, metric_sums

BETA = 0.1


def make_stats(policy, reference) -> AnswerStats:
    num_pairs = len(policy)
    return AnswerStats(
        policy_logps=torch.tensor(policy).flatten().requires_grad_(),
        ref_logps=None if reference is None else torch.tensor(reference).flatten(),
        num_tokens=torch.ones(2 * num_pairs, dtype=torch.int64),
        pair_index=torch.arange(num_pairs).repeat_interleave(2),
        answer_index=torch.tensor([0, 1]).repeat(num_pairs),
    )


# Log-ratios (4, -6), (-2, 8) and (1, 1): one pair right, one wrong, one tie.
STATS = make_stats([(-10.0, -20.0), (-30.0, -40.0), (-5.0, -7.0)], [(-14.0, -14.0), (-28.0, -48.0), (-6.0, -8.0)])
LOSS = torch.tensor([0.5, 1.5, 4.0], requires_grad=True)


def test_implicit_rewards_are_beta_times_the_log_ratio():
    assert implicit_rewards(STATS, BETA).tolist() == pytest.approx([0.4, -0.6, -0.2, 0.8, 0.1, 0.1])
    with pytest.raises(ValueError, match="reference scores"):
        implicit_rewards(replace(STATS, ref_logps=None), BETA)


def test_metrics_of_three_pairs():
    """Rewards (0.4, -0.6), (-0.2, 0.8), (0.1, 0.1); a tie counts as wrong."""
    assert finish_metrics(metric_sums(STATS, LOSS, BETA)) == pytest.approx(
        {
            "loss": 2.0,
            "logps/chosen": -15.0,
            "logps/rejected": -67 / 3,
            "rewards/chosen": 0.1,
            "rewards/rejected": 0.1,
            "rewards/margins": 0.0,
            "rewards/accuracies": 1 / 3,
        },
        abs=1e-7,
    )


def test_metrics_without_reference_have_no_rewards():
    metrics = finish_metrics(metric_sums(replace(STATS, ref_logps=None), LOSS, BETA))
    assert metrics == pytest.approx({"loss": 2.0, "logps/chosen": -15.0, "logps/rejected": -67 / 3})


def test_entropy_and_logits_are_means_over_tokens():
    """Of answers with 1 and 3, 2 and 2, 4 and 1 tokens, from their sums."""
    stats = replace(
        STATS,
        num_tokens=torch.tensor([1, 3, 2, 2, 4, 1]),
        entropy=torch.tensor([7.0, 3.0, 1.0, 4.0, 2.5, 2.0]),
        mean_logits=torch.tensor([2.5, 6.0, 2.0, 5.0, 6.0, 7.0]),
    )
    metrics = finish_metrics(metric_sums(stats, LOSS, BETA))
    assert metrics["entropy"] == pytest.approx(19.5 / 13)
    assert metrics["logits/chosen"] == pytest.approx(10.5 / 7)
    assert metrics["logits/rejected"] == pytest.approx(18 / 6)


def test_accuracy_is_zero_while_the_policy_is_the_reference():
    stats = make_stats([(-10.1, -20.3)], [(-10.1, -20.3)])
    metrics = finish_metrics(metric_sums(stats, torch.tensor([math.log(2)]), BETA))
    assert metrics["rewards/accuracies"] == 0.0
    assert metrics["rewards/margins"] == 0.0


def test_parts_add_up_to_the_whole():
    """Two uneven parts, as two ranks have them, give the metrics of all pairs: no means of means."""
    parts = []
    for start, stop in ((0, 1), (1, 3)):
        answers = slice(2 * start, 2 * stop)
        part = AnswerStats(
            STATS.policy_logps[answers],
            STATS.ref_logps[answers],
            STATS.num_tokens[answers],
            STATS.pair_index[answers] - start,
            STATS.answer_index[answers],
        )
        parts.append(metric_sums(part, LOSS[start:stop], BETA))
    whole = metric_sums(STATS, LOSS, BETA)
    assert finish_metrics(parts[0] + parts[1]) == pytest.approx(finish_metrics(whole), abs=1e-12)


def test_sums_are_one_flat_float64_tensor_without_gradient():
    sums = metric_sums(STATS, LOSS, BETA)
    assert sums.shape == (len(METRIC_SUMS),)
    assert sums.dtype == torch.float64
    assert not sums.requires_grad
    assert dict(zip(METRIC_SUMS, sums.tolist(), strict=True))["num_pairs"] == 3.0


def test_sums_do_not_lose_small_losses():
    """2^24 + 1 has no float32: the sum of a large and two small losses needs float64."""
    sums = metric_sums(STATS, torch.tensor([2.0**24, 1.0, 1.0]), BETA)
    assert sums[METRIC_SUMS.index("loss")].item() == 2**24 + 2
    sums = metric_sums(STATS, torch.tensor([2.0**24, 1.0, 0.0]), BETA)
    assert sums[METRIC_SUMS.index("loss")].item() == 2**24 + 1


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name):
    """On the meta device tensors have no values: whatever asked for one, as a host sync does, would fail."""
    stats = replace(STATS, entropy=torch.ones(6), mean_logits=torch.ones(6))
    on_meta = AnswerStats(*(getattr(stats, field.name).to("meta") for field in dataclasses.fields(stats)))
    losses = LOSSES[name].fn(on_meta, **{parameter: 0.1 for parameter in LOSSES[name].parameters})
    assert metric_sums(on_meta, losses, BETA).device.type == "meta"


def test_metrics_of_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        finish_metrics(torch.zeros(len(METRIC_SUMS), dtype=torch.float64))
