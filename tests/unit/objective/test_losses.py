"""Each loss and its gradient against its closed form, written here on its own, in float64."""

import inspect
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dpo_ray.config import ObjectiveConfig
from dpo_ray.objective.losses import (
    LOSSES,
    PARAMETERS,
    AnswerStats,
    aot,
    bco_pair,
    check_parameters,
    discopop,
    exo_pair,
    hinge,
    ipo,
    orpo,
    plackett_luce,
    robust,
    sft,
    sigmoid,
    softmax,
    under_divergence,
    wpo_weights,
)
from dpo_ray.training.step import objective_of

# Summed log-probabilities and lengths of six pairs: a large margin of either sign, a small one, none, a long answer,
# and one whose margin has another rank among the policy's than among the reference's.
POLICY = [(-20.0, -95.0), (-80.0, -31.5), (-12.25, -12.0), (-40.0, -40.0), (-300.0, -7.0), (-50.0, -52.0)]
REFERENCE = [(-33.0, -60.0), (-50.0, -45.0), (-12.5, -11.0), (-40.0, -40.0), (-310.0, -6.5), (-70.0, -40.0)]
MEAN_REWARD = 0.3
NUM_TOKENS = [(7, 31), (24, 12), (5, 5), (16, 2), (150, 3), (20, 30)]

# Loss name -> hyperparameters that it is tried with.
BETAS = [{"beta": b} for b in (0.01, 0.1, 0.7)]
SMOOTHED = [{**beta, "label_smoothing": e} for beta in BETAS for e in (0.0, 0.1, 0.25, 0.49)]
SETTINGS = {
    "sigmoid": SMOOTHED,
    "sigmoid_norm": [*BETAS, {"beta": 5.0}],
    "ipo": BETAS,
    "hinge": BETAS,
    "robust": SMOOTHED,
    "exo_pair": [{**beta, "label_smoothing": e} for beta in BETAS for e in (1e-3, 0.1, 0.49)],
    "nca_pair": BETAS,
    "bco_pair": BETAS,
    "sppo_hard": BETAS,
    "apo_zero": BETAS,
    "apo_down": BETAS,
    "discopop": BETAS,
    "aot": SMOOTHED,
    "aot_unpaired": SMOOTHED,
    "softmax": BETAS,
    "plackett_luce": BETAS,
    "sft": [{}],
    "cpo": [{**beta, "nll_weight": w} for beta in BETAS for w in (0.2, 1.0)],
    "simpo": [{"beta": b, "target_margin": g} for b in (0.1, 2.0, 10.0) for g in (0.3, 1.6)],
    "orpo": BETAS,
}
CASES = [(name, setting) for name, settings in SETTINGS.items() for setting in settings]


def make_stats(policy=POLICY, reference=REFERENCE, num_tokens=NUM_TOKENS, dtype=torch.float64) -> AnswerStats:
    num_pairs = len(policy)
    return AnswerStats(
        policy_logps=torch.tensor(policy, dtype=dtype).flatten().requires_grad_(),
        ref_logps=None if reference is None else torch.tensor(reference, dtype=dtype).flatten(),
        num_tokens=torch.tensor(num_tokens).flatten(),
        num_answers=[2] * num_pairs,
        mean_reward=MEAN_REWARD,
    )


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def closed_form(name, policy, reference, num_tokens, beta=0.0, label_smoothing=0.0, nll_weight=0.0, target_margin=0.0):
    """Loss, d loss / d chosen policy logp, d loss / d rejected policy logp of one pair."""
    (chosen, rejected), (n_chosen, n_rejected), eps = policy, num_tokens, label_smoothing
    match name:
        case "sft":
            return -chosen / n_chosen, -1 / n_chosen, 0.0
        case "cpo":
            z = beta * (chosen - rejected)
            slope = -beta * logistic(-z)
            return softplus(-z) - nll_weight * chosen / n_chosen, slope - nll_weight / n_chosen, -slope
        case "simpo":
            z = beta * (chosen / n_chosen - rejected / n_rejected) - target_margin
            return softplus(-z), -beta * logistic(-z) / n_chosen, beta * logistic(-z) / n_rejected
        case "orpo":
            # p / (1 - p) = 1 / (1 / p - 1), and d log odds / d log p = 1 / (1 - p)
            p_chosen, p_rejected = math.exp(chosen / n_chosen), math.exp(rejected / n_rejected)
            z = math.log(1 / p_rejected - 1) - math.log(1 / p_chosen - 1)
            slope = -beta * logistic(-z)
            d_chosen = (slope / (1 - p_chosen) - 1) / n_chosen
            return -math.log(p_chosen) + beta * softplus(-z), d_chosen, -slope / (1 - p_rejected) / n_rejected
    h_chosen, h_rejected = chosen - reference[0], rejected - reference[1]
    z = beta * (h_chosen - h_rejected)
    match name:
        case "softmax" | "plackett_luce":
            # Of two answers: sigma(z) = exp(beta h_chosen) / (exp(beta h_chosen) + exp(beta h_rejected)).
            loss, slope = softplus(-z), -logistic(-z)
        case "sigmoid":
            # d/dz: -(1 - eps) sigma(-z) + eps sigma(z) = sigma(z) - (1 - eps)
            loss, slope = (1 - eps) * softplus(-z) + eps * softplus(z), logistic(z) - (1 - eps)
        case "robust":
            # d/dz: [-(1 - eps) sigma(-z) - eps sigma(z)] / (1 - 2 eps)
            loss = ((1 - eps) * softplus(-z) - eps * softplus(z)) / (1 - 2 * eps)
            slope = -((1 - eps) * logistic(-z) + eps * logistic(z)) / (1 - 2 * eps)
        case "hinge":
            loss, slope = max(0.0, 1 - z), -1.0 if z < 1 else 0.0
        case "exo_pair":
            # d/dz: sigma(z) sigma(-z) [log sigma(z) - log sigma(-z) - log((1 - eps) / eps)], the first two being z
            kept, flipped = -softplus(-z) - math.log(1 - eps), -softplus(z) - math.log(eps)
            loss = logistic(z) * kept + logistic(-z) * flipped
            slope = logistic(z) * logistic(-z) * (z - math.log((1 - eps) / eps))
        case "discopop":
            # m' = m (1 - m) / tau; d/dz: m' (exp(-z) + log sigma(z)) - (1 - m) sigma(-z) - m exp(-z)
            m, rest, exponential = logistic(20 * z), logistic(-20 * z), math.exp(-z - softplus(-20 * z))
            loss = rest * softplus(-z) + exponential
            slope = 20 * rest * (exponential - m * softplus(-z)) - rest * logistic(-z) - exponential
        case "nca_pair":
            r_chosen, r_rejected = beta * h_chosen, beta * h_rejected
            loss = softplus(-r_chosen) + (softplus(r_chosen) + softplus(r_rejected)) / 2
            return loss, beta * (1.5 * logistic(r_chosen) - 1), beta * logistic(r_rejected) / 2
        case "bco_pair":
            r_chosen, r_rejected = beta * h_chosen - MEAN_REWARD, beta * h_rejected - MEAN_REWARD
            return softplus(-r_chosen) + softplus(r_rejected), -beta * logistic(-r_chosen), beta * logistic(r_rejected)
        case "sppo_hard":
            gaps = h_chosen - 0.5 / beta, h_rejected + 0.5 / beta
            return gaps[0] ** 2 + gaps[1] ** 2, 2 * gaps[0], 2 * gaps[1]
        case "apo_zero":
            p_chosen, p_rejected = logistic(beta * h_chosen), logistic(beta * h_rejected)
            loss = 1 - p_chosen + p_rejected
            return loss, -beta * p_chosen * (1 - p_chosen), beta * p_rejected * (1 - p_rejected)
        case "apo_down":
            p_chosen, p = logistic(beta * h_chosen), logistic(z)
            falling = beta * p * (1 - p)
            return p_chosen + 1 - p, beta * p_chosen * (1 - p_chosen) - falling, falling
        case "sigmoid_norm":
            z = beta * (h_chosen / n_chosen - h_rejected / n_rejected)
            return softplus(-z), -beta * logistic(-z) / n_chosen, beta * logistic(-z) / n_rejected
        case "ipo":
            gap = h_chosen / n_chosen - h_rejected / n_rejected - 0.5 / beta
            return gap * gap, 2 * gap / n_chosen, -2 * gap / n_rejected
        case _:
            raise AssertionError(f"{name} has no closed form here: write one")
    return loss, beta * slope, -beta * slope


def sorted_form(name, beta, label_smoothing):
    """The same of all pairs, for losses that match values by rank: `lower` is to lie below `upper`."""
    if name == "aot":
        upper, lower = ([chosen - rejected for chosen, rejected in side] for side in (POLICY, REFERENCE))
    else:
        upper, lower = ([p[k] - r[k] for p, r in zip(POLICY, REFERENCE, strict=True)] for k in (0, 1))
    by_rank = [sorted(range(len(side)), key=side.__getitem__) for side in (upper, lower)]
    rows = [[0.0, 0.0, 0.0] for _ in POLICY]
    for i, j in zip(*by_rank, strict=True):
        z = beta * (upper[i] - lower[j])
        rows[i][0] = (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)
        slope = beta * (logistic(z) - (1 - label_smoothing))
        rows[i][1] = slope
        rows[i if name == "aot" else j][2] = -slope
    return rows


@pytest.mark.parametrize(("name", "setting"), CASES, ids=str)
def test_loss_and_gradient_equal_the_closed_form(name, setting):
    stats = make_stats()
    losses = LOSSES[name].of_pairs(stats, setting)
    losses.sum().backward()
    if name in ("aot", "aot_unpaired"):
        expected = sorted_form(name, **setting)
    else:
        expected = [closed_form(name, *row, **setting) for row in zip(POLICY, REFERENCE, NUM_TOKENS, strict=True)]
    values = torch.tensor([row[0] for row in expected], dtype=torch.float64)
    gradient = torch.tensor([row[1:] for row in expected], dtype=torch.float64).flatten()
    torch.testing.assert_close(losses.detach(), values, rtol=0, atol=1e-9)
    torch.testing.assert_close(stats.policy_logps.grad, gradient, rtol=0, atol=1e-9)


def link(h, f_divergence, f_alpha=None):
    """f'(exp(h)) and its slope in h."""
    match f_divergence:
        case "reverse_kl":
            return h, 1.0
        case "forward_kl":
            return 1 - math.exp(-h), math.exp(-h)
        case "js":
            return math.log(2 / (1 + math.exp(-h))), logistic(-h)
        case "alpha":
            return (math.exp(h * (f_alpha - 1)) - 1) / (f_alpha - 1), math.exp(h * (f_alpha - 1))


DIVERGENCES = [
    {"f_divergence": "reverse_kl"},
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js"},
    *({"f_divergence": "alpha", "f_alpha": alpha} for alpha in (0.1, 0.5, 0.8)),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.any_divergence])
def test_the_configured_divergence_equals_the_closed_form(name, divergence):
    """As configured, over log-ratios of up to 4 nats: f' for h, and the chain rule."""
    tenth = [
        tuple(r + (p - r) / 10 for p, r in zip(*pair, strict=True)) for pair in zip(POLICY, REFERENCE, strict=True)
    ]
    stats, setting = make_stats(tenth), SETTINGS[name][-1]
    losses = objective_of(ObjectiveConfig(loss=name, **setting, **divergence)).loss(stats)
    losses.sum().backward()
    expected = []
    for policy, reference, num_tokens in zip(tenth, REFERENCE, NUM_TOKENS, strict=True):
        scores, slopes = zip(*(link(p - r, **divergence) for p, r in zip(policy, reference, strict=True)), strict=True)
        loss, *gradient = closed_form(name, scores, (0.0, 0.0), num_tokens, **setting)
        expected.append([loss, *(g * slope for g, slope in zip(gradient, slopes, strict=True))])
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(losses.detach(), expected[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.policy_logps.grad, expected[:, 1:].flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_divergences_are_zero_at_the_reference_and_never_overflow(divergence):
    """The slope there is f''(1): 1, or 1/2 for js."""
    stats = make_stats([(0.0, 0.0), (-1e4, 1e4)], [(0.0, 0.0)] * 2, [(1, 1)] * 2, dtype=torch.float32)
    scores = under_divergence(stats, **divergence).log_ratios()
    (slopes,) = torch.autograd.grad(scores.sum(), stats.policy_logps)
    assert scores[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert slopes[:2].tolist() == pytest.approx([0.5 if divergence["f_divergence"] == "js" else 1.0] * 2)
    assert scores.isfinite().all()
    assert slopes.isfinite().all()


def test_a_divergence_needs_reference_scores():
    with pytest.raises(ValueError, match="reference scores"):
        under_divergence(replace(make_stats(), ref_logps=None), "js")


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
        ("sigmoid_norm", {"beta": 0.1}, math.log(2)),
        ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, -math.log(2) - math.log(1e-3 * (1 - 1e-3)) / 2),  # 2.761
        ("nca_pair", {"beta": 0.1}, 2 * math.log(2)),
        ("sppo_hard", {"beta": 0.1}, 2 * 25.0),
        ("apo_zero", {"beta": 0.1}, 1.0),
        ("apo_down", {"beta": 0.1}, 1.0),
        ("discopop", {"beta": 0.1}, math.log(2) / 2 + 1 / 2),
        ("aot", {"beta": 0.1, "label_smoothing": 0.3}, math.log(2)),
    ],
    ids=str,
)
def test_step_one_value_in_float32(name, setting, expected):
    """Policy = reference, so z = 0: -log(1/2), (0 - 1 / 0.2)^2 and 1 - 0, whatever the smoothing; the KL of (1/2, 1/2)
    from (1 - eps, eps) for exo_pair, half of each loss for discopop."""
    losses = LOSSES[name].fn(make_stats(POLICY, POLICY, dtype=torch.float32), **setting)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([expected] * len(POLICY), rel=1e-6)


def test_sft_of_one_token_of_probability_one_half():
    stats = make_stats([(math.log(0.5), -3.0)], None, [(1, 2)])
    assert sft(stats).item() == pytest.approx(math.log(2), abs=1e-12)


def test_orpo_of_certain_tokens_is_finite():
    """Odds of 1 / 0, up to the rounding of log-probabilities: no NaN in loss or gradient."""
    stats = make_stats([(0.0, 0.0), (0.0, -3.0), (-3.0, 0.0)], None, [(2, 3)] * 3, dtype=torch.float32)
    losses = orpo(stats, beta=0.1)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0.1 * math.log(2))
    assert losses.isfinite().all()
    assert stats.policy_logps.grad.isfinite().all()


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


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_or_gradient_overflows(name):
    """Log-ratios of -1e4 and +1e4 nats in float32."""
    stats = make_stats([(-2e4, -1e4), (-1e4, -2e4)], [(-1e4, -2e4), (-2e4, -1e4)], [(100, 100)] * 2, torch.float32)
    losses = LOSSES[name].fn(stats, **SETTINGS[name][0])
    losses.sum().backward()
    assert losses.isfinite().all()
    assert stats.policy_logps.grad.isfinite().all()


def test_discopop_far_from_zero():
    """z = -1000 and 1000: DPO's 1000, and exp(-1000) = 0; TRL's has 0 * inf at the first."""
    stats = make_stats([(-1e4, 0.0), (0.0, -1e4)], [(0.0, 0.0)] * 2, [(1, 1)] * 2, dtype=torch.float32)
    assert discopop(stats, beta=0.1).tolist() == pytest.approx([1000.0, 0.0])


def test_exo_is_zero_where_the_policy_prefers_as_the_labels_say():
    stats = make_stats([(10 * math.log(9), 0.0)], [(0.0, 0.0)], [(1, 1)])  # sigma(log 9) = 0.9
    assert exo_pair(stats, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.0, abs=1e-12)


def test_aot_compares_margins_of_the_same_rank():
    """Margins (3, 0, -4) against the reference's (-4, 3, 0): the same distribution, so log 2 for each."""
    stats = make_stats([(3.0, 0.0), (0.0, 0.0), (-4.0, 0.0)], [(-4.0, 0.0), (3.0, 0.0), (0.0, 0.0)], [(1, 1)] * 3)
    assert aot(stats, beta=0.5, label_smoothing=0.0).tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.couples_pairs])
def test_losses_that_couple_pairs_keep_each_at_its_place(name):
    """Whatever order the pairs come in, each has the same loss."""
    order = [3, 0, 5, 1, 4, 2]
    there = LOSSES[name].fn(make_stats(), **SETTINGS[name][0])
    moved = make_stats(*([rows[i] for i in order] for rows in (POLICY, REFERENCE, NUM_TOKENS)))
    assert LOSSES[name].fn(moved, **SETTINGS[name][0]).tolist() == there[order].tolist()


def test_ipo_is_least_at_a_margin_of_one_over_two_beta_per_token():
    stats = make_stats([(-10.0, -60.0)], [(-20.0, -40.0)], [(4, 8)])  # 10/4 + 20/8 = 5
    assert ipo(stats, beta=0.1).item() == 0.0


def test_hinge_is_zero_beyond_a_margin_of_one_over_beta():
    stats = make_stats([(11.0, 0.0), (9.0, 0.0)], [(0.0, 0.0)] * 2, [(1, 1)] * 2)
    assert hinge(stats, beta=0.1).tolist() == pytest.approx([0.0, 0.1])


def test_pairwise_gives_views():
    stats = make_stats()
    values = torch.arange(12.0)
    chosen, rejected = stats.pairwise(values)
    assert chosen.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert rejected.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
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
        (
            "hinge",
            {"label_smoothing": 0.1},
            "hinge does not use it: set it to 0, or choose one of aot, .*robust, sigmoid",
        ),
        ("sft", {"label_smoothing": 0.1}, "sft does not use it"),
        ("cpo", {"nll_weight": 0.0}, r"nll_weight is 0\.0, but cpo needs it in \(0, inf\)"),
        ("simpo", {"target_margin": 0.0}, r"target_margin is 0\.0, but simpo needs it in \(0, inf\)"),
        ("orpo", {"nll_weight": 1.0}, "nll_weight is 1.0, but orpo does not use it: set it to 0, or choose one of cpo"),
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing is 0\.0, but exo_pair needs it in \(0, 0\.5\)"),
    ],
)
def test_check_refuses_what_is_out_of_range_or_unused(name, values, message):
    with pytest.raises(ValueError, match=message):
        check_parameters([name], values)


@pytest.mark.parametrize(("name", "setting"), CASES, ids=str)
def test_check_accepts_what_is_in_range(name, setting):
    neutral = {key: 0.1 if value is None else value for key, value in PARAMETERS.items()}
    check_parameters([name], {**neutral, **setting})


# Rankings of 4, 2 and 3 answers.
RANKED = AnswerStats(
    policy_logps=torch.tensor([-20.0, -95.0, -80.0, -31.5, -12.25, -12.0, -40.0, -41.0, -300.0], dtype=torch.float64),
    ref_logps=torch.tensor([-33.0, -60.0, -50.0, -45.0, -12.5, -11.0, -40.0, -42.0, -310.0], dtype=torch.float64),
    num_tokens=torch.tensor([7, 31, 24, 12, 5, 5, 16, 2, 150]),
    num_answers=[4, 2, 3],
    mean_reward=MEAN_REWARD,
)


def ranked(policy_logps: torch.Tensor | None = None) -> AnswerStats:
    """A fresh leaf each time."""
    values = RANKED.policy_logps if policy_logps is None else policy_logps
    return replace(RANKED, policy_logps=values.clone().requires_grad_())


@pytest.mark.parametrize(
    "name", [name for name, spec in LOSSES.items() if not (spec.of_rankings or spec.couples_pairs)]
)
def test_the_loss_of_several_rejected_answers_is_the_mean_over_them(name):
    """Each compared with the chosen answer as if it were alone."""
    setting, stats, expected, gradient = SETTINGS[name][-1], ranked(), [], torch.zeros(9, dtype=torch.float64)
    losses = LOSSES[name].of_pairs(stats, setting)
    losses.sum().backward()
    start = 0
    for num in RANKED.num_answers:
        rows = []
        for other in range(start + 1, start + num):
            sides = [(side[start].item(), side[other].item()) for side in (RANKED.policy_logps, RANKED.ref_logps)]
            lengths = RANKED.num_tokens[start].item(), RANKED.num_tokens[other].item()
            loss, d_chosen, d_rejected = closed_form(name, *sides, lengths, **setting)
            rows.append(loss)
            gradient[start] += d_chosen / (num - 1)
            gradient[other] += d_rejected / (num - 1)
        expected.append(sum(rows) / len(rows))
        start += num
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(stats.policy_logps.grad, gradient, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.7])
@pytest.mark.parametrize("name", ["softmax", "plackett_luce"])
def test_rankings_equal_the_closed_form(name, beta):
    """-sum over choices of [r_k - log sum_{j >= k} exp(r_j)]; its slope in r_i is sum over choices of
    softmax_k(i) - [i = k]."""
    stats = ranked()
    losses = LOSSES[name].fn(stats, beta=beta)
    losses.sum().backward()
    rewards = (beta * (RANKED.policy_logps - RANKED.ref_logps)).tolist()
    expected, gradient, start = [], [0.0] * len(rewards), 0
    for num in RANKED.num_answers:
        loss = 0.0
        for k in range(start, start + (1 if name == "softmax" else num - 1)):
            largest = max(rewards[k : start + num])
            total = sum(math.exp(rewards[j] - largest) for j in range(k, start + num))
            loss -= rewards[k] - largest - math.log(total)
            gradient[k] -= beta
            for j in range(k, start + num):
                gradient[j] += beta * math.exp(rewards[j] - largest) / total
        expected.append(loss)
        start += num
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(stats.policy_logps.grad, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [softmax, plackett_luce])
def test_rankings_of_two_are_dpo_to_the_last_bit(loss, dtype):
    """Losses and gradients, over six pairs and a thousand random ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = (100 * torch.randn(2, 1000, 2, generator=generator)).tolist()
    for policy, reference in ((POLICY, REFERENCE), drawn):
        ranking, pairwise = (make_stats(policy, reference, [(1, 1)] * len(policy), dtype) for _ in range(2))
        found, expected = loss(ranking, beta=0.13), sigmoid(pairwise, beta=0.13, label_smoothing=0.0)
        (found.sum() + expected.sum()).backward()
        assert torch.equal(found, expected)
        assert torch.equal(ranking.policy_logps.grad, pairwise.policy_logps.grad)


def test_plackett_luce_is_a_distribution_over_rankings():
    """The probabilities of all 24 rankings of four answers sum to 1, and drawing one answer after the other with
    chances exp(r) gives each as often as its probability says, within five standard deviations."""
    h = [2.0, -1.0, 0.5, 1.5]
    probabilities = {}
    for order in itertools.permutations(range(4)):
        logps = torch.tensor([h[i] for i in order], dtype=torch.float64)
        stats = AnswerStats(logps, torch.zeros(4, dtype=torch.float64), torch.ones(4), [4])
        probabilities[order] = math.exp(-plackett_luce(stats, beta=0.8).item())
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-12)
    draws, chances = random.Random(0), [math.exp(0.8 * each) for each in h]
    num, seen = 20_000, Counter[tuple[int, ...]]()
    for _ in range(num):
        left, order = list(range(4)), []
        while left:
            order.append(draws.choices(left, [chances[i] for i in left])[0])
            left.remove(order[-1])
        seen[tuple(order)] += 1
    for order, p in probabilities.items():
        assert abs(seen[order] - num * p) < 5 * math.sqrt(num * p * (1 - p)) + 1, order


@pytest.mark.parametrize(
    "name", [name for name, spec in LOSSES.items() if spec.any_divergence and name not in ("sigmoid_norm", "ipo")]
)
def test_what_a_prompt_adds_to_all_its_rewards_changes_nothing(name):
    """r'(x, y) = r(x, y) + f(x): the class of rewards that DPO's reparameterization is about."""
    setting, shift = SETTINGS[name][-1], torch.tensor([5.0] * 4 + [-3.0] * 2 + [40.0] * 3, dtype=torch.float64)
    expected = LOSSES[name].of_pairs(RANKED, setting)
    found = LOSSES[name].of_pairs(replace(RANKED, policy_logps=RANKED.policy_logps + shift), setting)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_bco_is_shifted_by_the_mean_reward():
    """At the mean reward both answers have probability 1/2."""
    stats = replace(make_stats([(3.0, 3.0)], [(0.0, 0.0)], [(1, 1)]), mean_reward=0.3)
    assert bco_pair(stats, beta=0.1).item() == pytest.approx(2 * math.log(2), abs=1e-12)


def test_a_mixture_is_the_weighted_sum():
    stats, config = make_stats(), ObjectiveConfig(loss={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}, beta=0.1)
    losses = objective_of(config).loss(stats)
    parts = sigmoid(stats, beta=0.1, label_smoothing=0.0), bco_pair(stats, beta=0.1), sft(stats)
    expected = 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert torch.equal(objective_of(ObjectiveConfig(loss={"ipo": 1})).loss(stats), ipo(stats, beta=0.1))


def test_a_mixture_couples_pairs_where_a_part_does():
    assert objective_of(ObjectiveConfig(loss={"sigmoid": 1, "aot": 1})).couples_pairs
    assert not objective_of(ObjectiveConfig(loss={"sigmoid": 1, "sft": 1})).couples_pairs


def test_a_divergence_leaves_the_likelihood_in_a_mixture_alone():
    stats = make_stats(REFERENCE)
    found = objective_of(ObjectiveConfig(loss={"sigmoid": 1, "sft": 1}, f_divergence="js")).loss(stats)
    torch.testing.assert_close(found, math.log(2) + sft(stats), rtol=1e-12, atol=0)


def test_wpo_weighs_comparisons():
    """w = exp of the mean over an answer's tokens; pairs of two and more answers; no gradient through it."""
    alignment = torch.tensor([-7.0, -62.0, -12.0, -6.0, 0.0, -5.0, -8.0, -1.0, -15.0], dtype=torch.float64)
    stats = replace(ranked(), alignment=alignment.clone().requires_grad_())
    means = [-1.0, -2.0, -0.5, -0.5, 0.0, -1.0, -0.5, -0.5, -0.1]
    expected = [means[0] + means[k] for k in (1, 2, 3)] + [means[4] + means[5]] + [means[6] + means[k] for k in (7, 8)]
    weights = wpo_weights(stats)
    assert weights.tolist() == pytest.approx([math.exp(each) for each in expected], rel=1e-12)
    assert not weights.requires_grad
    losses = objective_of(ObjectiveConfig(weighting="wpo")).loss(stats)
    each = weights * sigmoid(stats, beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(losses, torch.stack([each[:3].mean(), each[3], each[4:].mean()]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.takes_margins])
def test_a_pair_s_own_margin_shifts_z(name):
    """ODPO: z - margin in place of z, for pairs of two and more answers."""
    margins = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    setting = SETTINGS[name][-1]
    found = LOSSES[name].of_pairs(replace(RANKED, margins=margins), setting)
    # A margin of m is a chosen answer whose log-ratio is lower by m / beta.
    chosen = torch.tensor([0, 4, 6])
    shifted = RANKED.policy_logps.clone()
    shifted[chosen] -= margins / setting["beta"]
    torch.testing.assert_close(
        found, LOSSES[name].of_pairs(replace(RANKED, policy_logps=shifted), setting), rtol=1e-12, atol=1e-12
    )


def test_an_entry_says_whether_margins_count():
    stats = replace(RANKED, margins=torch.ones(3, dtype=torch.float64))
    for name, spec in LOSSES.items():
        changed = not torch.equal(spec.of_pairs(stats, SETTINGS[name][-1]), spec.of_pairs(RANKED, SETTINGS[name][-1]))
        assert changed == spec.takes_margins, name


MODULE = """
from dpo_ray.objective.losses import POSITIVE, LossSpec

def halved(stats, *, beta):
    chosen, rejected = stats.pairwise(beta * stats.log_ratios())
    return (rejected - chosen) / 2

HALVED = LossSpec(halved, "of one's own", {"beta": POSITIVE})
TEMPERED = LossSpec(halved, "of one's own", {"temperature": POSITIVE})
GROUNDED = LossSpec(lambda stats: -stats.pairwise(stats.log_ratios())[0], "of one's own", chosen_only=True)
"""


def test_rejected_answers_are_left_out_only_where_no_score_is_of_them(tmp_path, monkeypatch):
    """The reference's scores are of all answers: beside the chosen one alone they would go to other pairs."""
    (tmp_path / "losses_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert ObjectiveConfig(loss="sft").chosen_only
    assert not ObjectiveConfig(loss={"sft": 1.0, "sigmoid": 1.0}).chosen_only
    assert not ObjectiveConfig(loss="losses_of_mine:GROUNDED").chosen_only


def test_a_loss_of_one_s_own_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = ObjectiveConfig(loss="losses_of_mine:HALVED", beta=0.5)
    assert config.needs_reference
    expected = [-0.25 * ((p[0] - r[0]) - (p[1] - r[1])) for p, r in zip(POLICY, REFERENCE, strict=True)]
    assert objective_of(config).loss(make_stats()).tolist() == pytest.approx(expected)
    mixed = objective_of(ObjectiveConfig(loss={"losses_of_mine:HALVED": 2.0, "sft": 1.0}, beta=0.5))
    torch.testing.assert_close(mixed.loss(make_stats()), 2 * torch.tensor(expected).double() + sft(make_stats()))
    for name, message in (
        ("losses_of_mine:halved", r"is of type function: it must be a dpo_ray.objective.losses.LossSpec"),
        ("losses_of_mine:MISSING", "cannot be imported: AttributeError"),
        ("nowhere:HALVED", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'; write module:name"),
        ("losses_of_mine:TEMPERED", r"has the hyperparameters \['temperature'\]: known are beta, label_smoothing"),
    ):
        with pytest.raises(ValueError, match=f"objective.loss is '{name}' {message}"):
            ObjectiveConfig(loss=name)
    with pytest.raises(ValueError, match="label_smoothing is 0.1, but losses_of_mine:HALVED does not use it"):
        ObjectiveConfig(loss="losses_of_mine:HALVED", label_smoothing=0.1)
