"""Each loss and its gradient against its closed form, written here on its own, in float64."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from dpo_ray.objective.losses import LOSSES, AnswerStats, hinge, ipo, robust, sft, sigmoid

# Summed log-probabilities and lengths of five pairs: a large margin of either sign, a small one, none, a long answer.
POLICY = [(-20.0, -95.0), (-80.0, -31.5), (-12.25, -12.0), (-40.0, -40.0), (-300.0, -7.0)]
REFERENCE = [(-33.0, -60.0), (-50.0, -45.0), (-12.5, -11.0), (-40.0, -40.0), (-310.0, -6.5)]
NUM_TOKENS = [(7, 31), (24, 12), (5, 5), (16, 2), (150, 3)]

# Loss name -> hyperparameters that it is tried with.
SETTINGS = {
    "sigmoid": [{"beta": b, "label_smoothing": e} for b in (0.01, 0.1, 0.7) for e in (0.0, 0.1, 0.25, 0.49)],
    "ipo": [{"beta": b} for b in (0.01, 0.1, 0.7)],
    "hinge": [{"beta": b} for b in (0.01, 0.1, 0.7)],
    "robust": [{"beta": b, "label_smoothing": e} for b in (0.01, 0.1, 0.7) for e in (0.0, 0.1, 0.25, 0.49)],
    "sft": [{}],
}
CASES = [(name, setting) for name, settings in SETTINGS.items() for setting in settings]


def make_stats(policy=POLICY, reference=REFERENCE, num_tokens=NUM_TOKENS, dtype=torch.float64) -> AnswerStats:
    num_pairs = len(policy)
    return AnswerStats(
        policy_logps=torch.tensor(policy, dtype=dtype).flatten().requires_grad_(),
        ref_logps=None if reference is None else torch.tensor(reference, dtype=dtype).flatten(),
        num_tokens=torch.tensor(num_tokens).flatten(),
        pair_index=torch.arange(num_pairs).repeat_interleave(2),
        answer_index=torch.tensor([0, 1]).repeat(num_pairs),
    )


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def closed_form(name, policy, reference, num_tokens, beta=0.0, label_smoothing=0.0):
    """Loss, d loss / d chosen policy logp, d loss / d rejected policy logp of one pair."""
    (chosen, rejected), (n_chosen, n_rejected), eps = policy, num_tokens, label_smoothing
    if name == "sft":
        return -chosen / n_chosen, -1 / n_chosen, 0.0
    h_chosen, h_rejected = chosen - reference[0], rejected - reference[1]
    z = beta * (h_chosen - h_rejected)
    match name:
        case "sigmoid":
            # d/dz: -(1 - eps) sigma(-z) + eps sigma(z) = sigma(z) - (1 - eps)
            loss, slope = (1 - eps) * softplus(-z) + eps * softplus(z), logistic(z) - (1 - eps)
        case "robust":
            # d/dz: [-(1 - eps) sigma(-z) - eps sigma(z)] / (1 - 2 eps)
            loss = ((1 - eps) * softplus(-z) - eps * softplus(z)) / (1 - 2 * eps)
            slope = -((1 - eps) * logistic(-z) + eps * logistic(z)) / (1 - 2 * eps)
        case "hinge":
            loss, slope = max(0.0, 1 - z), -1.0 if z < 1 else 0.0
        case "ipo":
            gap = h_chosen / n_chosen - h_rejected / n_rejected - 0.5 / beta
            return gap * gap, 2 * gap / n_chosen, -2 * gap / n_rejected
        case _:
            raise AssertionError(f"{name} has no closed form here: write one")
    return loss, beta * slope, -beta * slope


@pytest.mark.parametrize(("name", "setting"), CASES, ids=str)
def test_loss_and_gradient_equal_the_closed_form(name, setting):
    stats = make_stats()
    losses = LOSSES[name].fn(stats, **setting)
    losses.sum().backward()
    expected = [closed_form(name, *row, **setting) for row in zip(POLICY, REFERENCE, NUM_TOKENS, strict=True)]
    values = torch.tensor([row[0] for row in expected], dtype=torch.float64)
    gradient = torch.tensor([row[1:] for row in expected], dtype=torch.float64).flatten()
    torch.testing.assert_close(losses.detach(), values, rtol=0, atol=1e-9)
    torch.testing.assert_close(stats.policy_logps.grad, gradient, rtol=0, atol=1e-9)


def test_every_entry_is_tried_and_agrees_with_its_function():
    assert SETTINGS.keys() == LOSSES.keys()
    for name, spec in LOSSES.items():
        keywords = {p.name for p in inspect.signature(spec.fn).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == spec.parameters, name
        assert spec.fn.__name__ == name


@pytest.mark.parametrize(("name", "setting"), CASES, ids=str)
def test_no_loss_needs_more_than_its_entry_says(name, setting):
    """Without reference: the same numbers, or an error. Without `couples_pairs`: one pair alone gives the same."""
    spec, stats = LOSSES[name], make_stats()
    losses = spec.fn(stats, **setting).detach()
    if spec.needs_reference:
        with pytest.raises(ValueError, match="reference scores"):
            spec.fn(replace(stats, ref_logps=None), **setting)
    else:
        assert torch.equal(spec.fn(replace(stats, ref_logps=None), **setting), losses)
    if not spec.couples_pairs:
        rows = zip(POLICY, REFERENCE, NUM_TOKENS, strict=True)
        alone = [spec.fn(make_stats([p], [r], [n]), **setting).item() for p, r, n in rows]
        assert alone == losses.tolist()


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.0}, math.log(2)),
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.3}, math.log(2)),
        ("ipo", {"beta": 0.1}, 25.0),
        ("hinge", {"beta": 0.1}, 1.0),
        ("robust", {"beta": 0.1, "label_smoothing": 0.3}, math.log(2)),
    ],
    ids=str,
)
def test_step_one_value_in_float32(name, setting, expected):
    """Policy = reference, so z = 0: -log(1/2), (0 - 1 / 0.2)^2 and 1 - 0, whatever the smoothing."""
    losses = LOSSES[name].fn(make_stats(POLICY, POLICY, dtype=torch.float32), **setting)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([expected] * len(POLICY), rel=1e-6)


def test_sft_of_one_token_of_probability_one_half():
    stats = make_stats([(math.log(0.5), -3.0)], None, [(1, 2)])
    assert sft(stats).item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_robust_without_smoothing_is_sigmoid(beta):
    stats = make_stats()
    both = (loss(stats, beta=beta, label_smoothing=0.0) for loss in (robust, sigmoid))
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_smoothing_is_a_mixture_and_robust_undoes_it(eps):
    """cDPO is the mean of the loss over labels flipped with probability eps; over the same flips robust's mean is the
    loss of the true labels (arXiv 2403.00409)."""
    stats = make_stats()
    flipped = make_stats([pair[::-1] for pair in POLICY], [pair[::-1] for pair in REFERENCE])
    clean = sigmoid(stats, beta=0.1, label_smoothing=0.0)
    mixture = (1 - eps) * clean + eps * sigmoid(flipped, beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(sigmoid(stats, beta=0.1, label_smoothing=eps), mixture, rtol=0, atol=1e-9)
    undone = (1 - eps) * robust(stats, beta=0.1, label_smoothing=eps)
    undone = undone + eps * robust(flipped, beta=0.1, label_smoothing=eps)
    torch.testing.assert_close(undone, clean, rtol=0, atol=1e-9)


def test_losses_stay_finite_and_right_at_extreme_margins():
    """z = -1000 and +1000 in float32: sigmoid is 1000 and 0, with gradients -beta and 0 for chosen."""
    stats = make_stats([(-1e4, 0.0), (0.0, -1e4)], [(0.0, 0.0)] * 2, [(1, 1)] * 2, dtype=torch.float32)
    losses = sigmoid(stats, beta=0.1, label_smoothing=0.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1000.0, 0.0])
    assert stats.policy_logps.grad.tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.0])


def test_ipo_is_least_at_a_margin_of_one_over_two_beta_per_token():
    stats = make_stats([(-10.0, -60.0)], [(-20.0, -40.0)], [(4, 8)])  # 10/4 + 20/8 = 5
    assert ipo(stats, beta=0.1).item() == 0.0


def test_hinge_is_zero_beyond_a_margin_of_one_over_beta():
    stats = make_stats([(11.0, 0.0), (9.0, 0.0)], [(0.0, 0.0)] * 2, [(1, 1)] * 2)
    assert hinge(stats, beta=0.1).tolist() == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize(
    ("pair_index", "answer_index"),
    [
        ([0, 0, 1, 1], [1, 0, 0, 1]),  # rejected first
        ([0, 0, 0, 1], [0, 1, 2, 0]),  # three answers and one
        ([0, 1, 0, 1], [0, 0, 1, 1]),  # all chosen first
        ([0, 0, 0, 0], [0, 1, 0, 1]),  # four answers of one pair
        ([0, 1, 2, 3], [0, 1, 0, 1]),  # one answer each
        ([1, 1, 0, 0], [0, 1, 0, 1]),  # not in order
        ([0, 0, 0], [0, 1, 2]),  # a ranking of three
    ],
)
def test_pairwise_refuses_any_other_layout(pair_index, answer_index):
    values = torch.zeros(len(pair_index))
    stats = AnswerStats(values, values, values + 1, torch.tensor(pair_index), torch.tensor(answer_index))
    with pytest.raises(ValueError, match="exactly two answers per pair"):
        stats.pairwise(values)


def test_pairwise_gives_views():
    stats = make_stats()
    values = torch.arange(10.0)
    chosen, rejected = stats.pairwise(values)
    assert chosen.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert rejected.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert chosen.data_ptr() == values.data_ptr()
    with pytest.raises(ValueError, match="values of shape"):
        stats.pairwise(values[:4])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sigmoid", {"beta": 0.0}, r"beta is 0\.0, but sigmoid needs it in \(0, inf\)"),
        ("sigmoid", {"label_smoothing": 0.5}, r"sigmoid needs it in \[0, 0\.5\)"),
        ("sigmoid", {"label_smoothing": math.nan}, "label_smoothing is nan"),
        ("robust", {"label_smoothing": -0.1}, r"robust needs it in \[0, 0\.5\)"),
        ("ipo", {"beta": math.inf}, "beta is inf"),
        ("hinge", {"label_smoothing": 0.1}, "hinge does not use it: set it to 0, or choose one of robust, sigmoid"),
        ("sft", {"label_smoothing": 0.1}, "sft does not use it"),
    ],
)
def test_check_refuses_what_is_out_of_range_or_unused(name, values, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name].check(**values)


@pytest.mark.parametrize(("name", "setting"), CASES, ids=str)
def test_check_accepts_what_is_in_range(name, setting):
    LOSSES[name].check(**{"beta": 0.1, "label_smoothing": 0.0, **setting})
