"""Implicit rewards, and metrics that add up over parts."""

import math
from dataclasses import replace

import pytest
import torch

from dpo_ray.objective.losses import LOSSES, AnswerStats, wpo_weights
from dpo_ray.objective.rewards import METRIC_SUMS, finish_metrics, implicit_rewards, metric_sums

BETA = 0.1


def make_stats(policy, reference) -> AnswerStats:
    num_pairs = len(policy)
    return AnswerStats(
        policy_logps=torch.tensor(policy).flatten().requires_grad_(),
        ref_logps=None if reference is None else torch.tensor(reference).flatten(),
        num_tokens=torch.ones(2 * num_pairs, dtype=torch.int64),
        num_answers=[2] * num_pairs,
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
            [2] * (stop - start),
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


def test_metrics_of_pairs_with_several_rejected_answers():
    """A pair weighs the same however many answers it has; logits and entropy go by tokens."""
    stats = AnswerStats(
        policy_logps=torch.tensor([-10.0, -20.0, -30.0, -40.0, -5.0, -7.0]),
        ref_logps=torch.tensor([-12.0, -19.0, -26.0, -44.0, -6.0, -7.0]),
        num_tokens=torch.tensor([1, 2, 3, 4, 5, 6]),
        num_answers=[4, 2],
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.5]),
        mean_logits=torch.tensor([3.0, 2.0, 4.0, 3.0, 9.0, 6.0]),
    )
    # Log-ratios 2 against -1, -4, 4; and 1 against 0.
    assert finish_metrics(metric_sums(stats, torch.tensor([1.0, 2.0]), 1.0)) == pytest.approx(
        {
            "loss": 1.5,
            "logps/chosen": -7.5,
            "logps/rejected": -18.5,
            "rewards/chosen": 1.5,
            "rewards/rejected": -1 / 6,
            "rewards/margins": 5 / 3,
            "rewards/accuracies": 5 / 6,
            "logits/chosen": 12 / 6,
            "logits/rejected": 15 / 15,
            "entropy": 21.5 / 21,
        },
        abs=1e-7,
    )


def test_metrics_of_chosen_answers_alone():
    """-log pi / |y| of 10 / 2 and 12 / 4 nats a token; of rejected answers nothing is said."""
    stats = AnswerStats(
        policy_logps=torch.tensor([-10.0, -12.0]),
        ref_logps=None,
        num_tokens=torch.tensor([2, 4]),
        num_answers=[1, 1],
        entropy=torch.tensor([3.0, 6.0]),
        mean_logits=torch.tensor([4.0, -1.0]),
    )
    losses = LOSSES["sft"].of_pairs(stats, {})
    assert losses.tolist() == [5.0, 3.0]
    assert finish_metrics(metric_sums(stats, losses, BETA)) == pytest.approx(
        {"loss": 4.0, "logps/chosen": -11.0, "logits/chosen": 3 / 6, "entropy": 9 / 6}
    )


@pytest.mark.parametrize("num_answers", [[2, 2, 2], [4, 2]])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name, num_answers):
    """On the meta device tensors have no values: whatever asked for one, as a host sync does, would fail."""
    ones = torch.ones(6, device="meta")
    stats = AnswerStats(ones, ones, ones, num_answers, entropy=ones, mean_logits=ones, alignment=ones)
    parameters = {parameter: 0.1 for parameter in LOSSES[name].parameters}
    losses = LOSSES[name].of_pairs(stats, parameters, None if LOSSES[name].of_rankings else wpo_weights(stats))
    assert losses.shape == (len(num_answers),)
    assert metric_sums(stats, losses, BETA).device.type == "meta"


def test_metrics_of_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        finish_metrics(torch.zeros(len(METRIC_SUMS), dtype=torch.float64))
