"""Token log-probabilities against log_softmax, sums over answers, and the one label shift."""

import math

import pytest
import torch

from dpo_ray.objective import logps
from dpo_ray.objective.logps import completion_positions, completion_token_scores, sum_by_answer, token_scores


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = 5 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (rows,), generator=generator)


def test_token_scores_of_two_tokens():
    """Logits log 1 and log 3: the second token has probability 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert token_scores(logits, torch.tensor([1])).logps.item() == pytest.approx(math.log(0.75), abs=1e-12)


@pytest.mark.parametrize("block_elements", [1, 70, logps._BLOCK_ELEMENTS["cpu"]])
def test_token_scores_and_gradient_against_log_softmax(block_elements, monkeypatch):
    monkeypatch.setitem(logps._BLOCK_ELEMENTS, "cpu", block_elements)
    logits, targets = random_logits(rows=11, vocabulary=23)
    weights = torch.linspace(-2, 3, 11, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values = token_scores(ours, targets).logps
    expected = torch.log_softmax(theirs, dim=-1)[torch.arange(11), targets]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    (values @ weights).backward()
    (expected @ weights).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_elements", [1, 70, logps._BLOCK_ELEMENTS["cpu"]])
def test_entropy_and_mean_logits(block_elements, monkeypatch):
    """- sum p log p, which is log V where all logits are equal."""
    monkeypatch.setitem(logps._BLOCK_ELEMENTS, "cpu", block_elements)
    logits, targets = random_logits(rows=11, vocabulary=23)
    logits[4] = 7.0
    scores = token_scores(logits.requires_grad_(), targets)
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(scores.entropy, -(log_probs.exp() * log_probs).sum(-1), rtol=0, atol=1e-12)
    assert scores.entropy[4].item() == pytest.approx(math.log(23))
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1), rtol=0, atol=1e-12)
    assert scores.logps.requires_grad
    assert not scores.entropy.requires_grad
    assert not scores.mean_logits.requires_grad


def test_token_scores_gradcheck():
    logits, targets = random_logits(rows=4, vocabulary=5)
    assert torch.autograd.gradcheck(lambda scores: token_scores(scores, targets).logps, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_scores_are_float32_for_narrow_logits(dtype):
    """The value is that of the rounded logits in float32, and the gradient comes back in the dtype of the logits."""
    logits, targets = random_logits(rows=7, vocabulary=300, dtype=dtype)
    logits.requires_grad_()
    values = token_scores(logits, targets).logps
    exact = torch.log_softmax(logits.detach().double(), dim=-1)[torch.arange(7), targets]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-6)
    values.sum().backward()
    assert logits.grad.dtype == dtype


def test_token_scores_survive_large_logits():
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert token_scores(logits, torch.tensor([1, 0])).logps.tolist() == [-1e4, -1e4]


def test_token_scores_of_no_rows():
    logits = torch.zeros(0, 5, requires_grad=True)
    values = token_scores(logits, torch.zeros(0, dtype=torch.int64)).logps
    assert values.shape == (0,)
    values.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_token_scores_keep_no_second_copy_of_the_logits():
    logits, targets = random_logits(rows=8, vocabulary=50, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        token_scores(logits.requires_grad_(), targets)
    assert [tensor.dtype for tensor in saved if tensor.ndim == 2] == [torch.bfloat16]


def test_sum_by_answer():
    """Answer 1 has no token; tokens of an answer need not be neighbours."""
    values = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    sums = sum_by_answer(values, torch.tensor([0, 2, 0, 2]), 3)
    assert sums.tolist() == [-4.0, 0.0, -6.0]
    assert sums.dtype == torch.float32
    (sums @ torch.tensor([10.0, 100.0, 1000.0])).backward()
    assert values.grad.tolist() == [10.0, 1000.0, 10.0, 1000.0]


def test_sum_by_answer_does_not_depend_on_the_neighbours():
    values = -torch.rand(3000, generator=torch.Generator().manual_seed(0))
    alone = sum_by_answer(values, torch.zeros(3000, dtype=torch.int64), 1)
    doubled = sum_by_answer(values.repeat_interleave(2), torch.arange(6000) % 2, 2)
    assert doubled.tolist() == [alone.item(), alone.item()]
    assert alone.item() == values.double().sum().float().item()


def test_completion_positions_in_a_pack():
    tokens = ["p0", "p1", "a0", "a1", "b0", "q0", "c0", "d0", "d1", "d2"]
    predicting, targets, answers = completion_positions([[2, 2, 1], [1, 1, 3]])
    assert [tokens[position] for position in targets] == ["a0", "a1", "b0", "c0", "d0", "d1", "d2"]
    # The first token of each answer is predicted by its prompt's last one, the others by the one before.
    assert [tokens[position] for position in predicting] == ["p1", "a0", "p1", "q0", "q0", "d0", "d1"]
    assert answers.tolist() == [0, 0, 1, 2, 3, 3, 3]


def test_completion_positions_need_a_prompt():
    with pytest.raises(ValueError, match="at least 1 token before it"):
        completion_positions([[2, 1, 1], [0, 3, 1]])


def test_completion_token_scores_equal_those_of_all_logits(monkeypatch):
    """Blocks of 3, the last one short, two kept and one made again: values and gradients of the whole at once."""
    monkeypatch.setattr(logps, "_HEAD_ROWS", {"cpu": 3})
    monkeypatch.setattr(logps, "_KEPT_ELEMENTS", 6 * 11)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator).requires_grad_()
    targets, calls = torch.arange(8), []

    def head(states):
        calls.append(len(states))
        return states @ weight.T

    found = completion_token_scores(hidden, targets, head, 11).logps
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(8), targets]
    torch.testing.assert_close(found, expected)
    factors = torch.arange(1.0, 9.0, dtype=torch.float64)
    ours = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    theirs = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs)
    assert calls == [3, 3, 2, 2]
