"""Loss, gradient and metrics against TRL's own `DPOTrainer` on the same pairs. Needs the extra `bench`.

Both sides have the same tiny float32 Llama as policy and another one as reference. TRL tokenizes, pads and computes as
it does in training; ours runs each answer alone and unpadded through an untouched copy of the model. What stands
between the two is rounding: at most 5e-7 of the largest entry of the gradient, 2e-7 of the loss. Longer answers make
more of it, since the loss takes differences of summed log-probabilities.

Where the two differ on purpose:
- TRL ignores `label_smoothing` for sigmoid; ours is cDPO then, which `test_losses.py` holds to its closed form.
- TRL's sft is the mean over the chosen tokens of a microbatch, ours the mean over pairs of each pair's mean, so that it
  does not depend on how pairs fall into microbatches. The two are one for a batch of one pair.
- The likelihood in TRL's CPO and ORPO is a mean over tokens too, and ORPO's goes over the prompt as well.
- bco_pair here has the mean reward of the steps before as its shift, TRL's none; at the first step they are one.
- TRL's aot and aot_unpaired sort each process's microbatch, ours the global batch. Here the one is the other.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_ray.config import ObjectiveConfig
from dpo_ray.objective.logps import Scores, completion_positions, sum_by_answer, token_scores
from dpo_ray.objective.losses import AnswerStats
from dpo_ray.objective.rewards import finish_metrics, metric_sums
from dpo_ray.pairs.pack import token_weights
from dpo_ray.training.step import objective_of

trl = pytest.importorskip("trl", reason="needs the extra `bench`")
datasets = pytest.importorskip("datasets", reason="needs the extra `bench`")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.bench

VOCABULARY = 64
# Prompt and answer tokens of each pair; TRL adds the end-of-sequence token to plain answers.
LENGTHS = [(3, 3, 1), (5, 1, 4), (1, 2, 2), (8, 5, 2)]
TOLERANCE = 1e-6


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def pairs() -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    return [
        {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected)}
        for prompt, chosen, rejected in LENGTHS
    ]


@pytest.fixture
def make_trainer(tmp_path):
    def make(**objective):
        args = trl.DPOConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            disable_tqdm=True,
            **objective,
        )
        return trl.DPOTrainer(
            model=tiny_model(seed=1),
            ref_model=tiny_model(seed=2),
            args=args,
            train_dataset=datasets.Dataset.from_list(pairs()),
            processing_class=tiny_tokenizer(),
        )

    return make


@pytest.fixture
def make_reference_free_trainer(tmp_path):
    """TRL's trainers of CPO, SimPO and ORPO; they call the token ids by other names."""
    experimental = {name: pytest.importorskip(f"trl.experimental.{name.lower()}") for name in ("CPO", "ORPO")}

    def make(kind, **objective):
        args = getattr(experimental[kind], f"{kind}Config")(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=64,
            disable_tqdm=True,
            remove_unused_columns=False,
            **objective,
        )
        return getattr(experimental[kind], f"{kind}Trainer")(
            model=tiny_model(seed=1),
            args=args,
            train_dataset=datasets.Dataset.from_list(pairs()),
            processing_class=tiny_tokenizer(),
        )

    return make


def with_our_names(row):
    answers = {f"{key}_ids": [i for i in row[f"{key}_labels"] if i != -100] for key in ("chosen", "rejected")}
    return {"prompt_ids": row["prompt_input_ids"], **answers}


def trl_side(trainer, rows):
    """TRL's loss, gradient and metrics, with the model in training mode as `training_step` has it."""
    model = trainer.model.train()
    model.zero_grad()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in getattr(trainer, "_metrics", {"train": {}})["train"].items()}
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, metrics


def our_side(rows, **objective):
    """Loss, gradient and metrics of this package over the token ids that TRL made."""
    model, reference, config = (
        tiny_model(seed=1),
        tiny_model(seed=2).requires_grad_(False),
        ObjectiveConfig(**objective),
    )
    answers = [(row["prompt_ids"], row[key]) for row in rows for key in ("chosen_ids", "rejected_ids")]
    sizes = [len(answer) for _, answer in answers]
    weights = torch.from_numpy(token_weights([sizes[i : i + 2] for i in range(0, len(sizes), 2)], config.ld_alpha))
    each_weights = weights.split(sizes)
    scores = [answer_scores(model, *each) for each in zip(*zip(*answers, strict=True), each_weights, strict=True)]
    known = [answer_scores(reference, *each) for each in zip(*zip(*answers, strict=True), each_weights, strict=True)]
    stats = AnswerStats(
        policy_logps=torch.cat([each.logps for each in scores]),
        ref_logps=torch.cat([each.logps for each in known]),
        num_tokens=torch.tensor(sizes),
        num_answers=[2] * len(rows),
        entropy=torch.cat([each.entropy for each in scores]),
        mean_logits=torch.cat([each.mean_logits for each in scores]),
        alignment=torch.cat([each.alignment for each in scores]),
    )
    losses = objective_of(config).loss(stats)
    (losses.sum() / len(rows)).backward()
    metrics = finish_metrics(metric_sums(stats, losses, config.beta))
    return metrics["loss"], {name: p.grad for name, p in model.named_parameters()}, metrics


def answer_scores(model, prompt, answer, weights):
    sequence = torch.tensor(prompt + answer)
    predicting, targets, owners = completion_positions([[len(prompt), len(answer)]])
    found = token_scores(model(input_ids=sequence[None]).logits[0][predicting], sequence[targets])
    return Scores(*(sum_by_answer(each, owners, 1) for each in found._replace(logps=found.logps * weights)))


def assert_same(theirs, ours, tolerance=TOLERANCE):
    """Loss and metrics within `tolerance` relative; gradients within it of the whole gradient's largest entry."""
    (their_loss, their_gradient, their_metrics), (our_loss, our_gradient, our_metrics) = theirs, ours
    assert our_loss == pytest.approx(their_loss, rel=tolerance)
    scale = max(gradient.abs().max().item() for gradient in their_gradient.values())
    assert scale > 1e-3
    assert our_gradient.keys() == their_gradient.keys()
    for name, gradient in their_gradient.items():
        difference = (our_gradient[name] - gradient).abs().max().item() / scale
        assert difference <= tolerance, name
    for name in our_metrics.keys() - {"loss"}:
        assert our_metrics[name] == pytest.approx(their_metrics[name], rel=TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("name", "label_smoothing"),
    [
        ("sigmoid", 0.0),
        ("sigmoid_norm", 0.0),
        ("ipo", 0.0),
        ("hinge", 0.0),
        *(("robust", smoothing) for smoothing in (0.0, 0.1, 0.3)),
        *(("exo_pair", smoothing) for smoothing in (1e-3, 0.1)),
        ("nca_pair", 0.0),
        ("bco_pair", 0.0),
        ("sppo_hard", 0.0),
        ("apo_zero", 0.0),
        ("apo_down", 0.0),
        ("discopop", 0.0),
        *((name, smoothing) for name in ("aot", "aot_unpaired") for smoothing in (0.0, 0.1)),
    ],
)
def test_loss_gradient_and_metrics_equal_trl(make_trainer, name, label_smoothing, beta):
    trainer = make_trainer(loss_type=[name], beta=beta, label_smoothing=label_smoothing)
    rows = list(trainer.train_dataset)
    assert [tuple(len(row[f"{key}_ids"]) for key in ("prompt", "chosen", "rejected")) for row in rows] == [
        (prompt, chosen + 1, rejected + 1) for prompt, chosen, rejected in LENGTHS
    ]
    # discopop takes z / 0.05, and so twenty times its rounding.
    tolerance = 20 * TOLERANCE if name == "discopop" else TOLERANCE
    ours = our_side(rows, loss=name, beta=beta, label_smoothing=label_smoothing)
    assert_same(trl_side(trainer, rows), ours, tolerance)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
@pytest.mark.parametrize(
    ("theirs", "ours", "alpha"),
    [("forward_kl", "forward_kl", None), ("js_divergence", "js", None)]
    + [("alpha_divergence", "alpha", alpha) for alpha in (0.2, 0.5)],
)
def test_divergences_equal_trl(make_trainer, name, theirs, ours, alpha):
    """Rewards too: in TRL and here they are beta times the log-ratio, whatever the divergence. The exponential makes
    the rounding of log-ratios of several nats a relative error."""
    trainer = make_trainer(loss_type=[name], beta=0.5, f_divergence_type=theirs, f_alpha_divergence_coef=alpha or 0.5)
    rows = list(trainer.train_dataset)
    found = our_side(rows, loss=name, beta=0.5, f_divergence=ours, f_alpha=alpha)
    assert_same(trl_side(trainer, rows), found, tolerance=5e-6)


@pytest.mark.parametrize("shares", [{"sigmoid": 0.8, "bco_pair": 0.2}, {"ipo": 1.0, "nca_pair": 0.5, "apo_zero": 2.0}])
def test_mixtures_equal_trl(make_trainer, shares):
    trainer = make_trainer(loss_type=list(shares), loss_weights=list(shares.values()), beta=0.1)
    rows = list(trainer.train_dataset)
    assert_same(trl_side(trainer, rows), our_side(rows, loss=shares))


def test_the_paper_s_mixture_equals_trl_on_each_pair(make_trainer):
    """MPO's: preference, quality and generation."""
    shares = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    trainer = make_trainer(loss_type=list(shares), loss_weights=list(shares.values()), beta=0.1)
    for row in trainer.train_dataset:
        assert_same(trl_side(trainer, [row]), our_side([row], loss=shares))
        trainer._metrics["train"].clear()


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair"])
def test_wpo_weights_equal_trl(make_trainer, name):
    trainer = make_trainer(loss_type=[name], beta=0.1, use_weighting=True)
    rows = list(trainer.train_dataset)
    assert_same(trl_side(trainer, rows), our_side(rows, loss=name, weighting="wpo"))


@pytest.mark.parametrize("ld_alpha", [0.1, 0.5])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_ld_dpo_equals_trl(make_trainer, name, ld_alpha):
    trainer = make_trainer(loss_type=[name], beta=0.1, ld_alpha=ld_alpha)
    rows = list(trainer.train_dataset)
    assert_same(trl_side(trainer, rows), our_side(rows, loss=name, ld_alpha=ld_alpha))


def test_sft_equals_trl_on_each_pair(make_trainer):
    trainer = make_trainer(loss_type=["sft"])
    for row in trainer.train_dataset:
        assert_same(trl_side(trainer, [row]), our_side([row], loss="sft"))
        trainer._metrics["train"].clear()


def test_simpo_equals_trl(make_reference_free_trainer):
    trainer = make_reference_free_trainer("CPO", loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)
    rows = list(trainer.train_dataset)
    ours = our_side(list(map(with_our_names, rows)), loss="simpo", beta=2.0, target_margin=0.5)
    assert_same(trl_side(trainer, rows), (*ours[:2], {}))


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_cpo_equals_trl_on_each_pair(make_reference_free_trainer, weight):
    trainer = make_reference_free_trainer("CPO", loss_type="sigmoid", cpo_alpha=weight, beta=0.1)
    for row in trainer.train_dataset:
        ours = our_side([with_our_names(row)], loss="cpo", beta=0.1, nll_weight=weight)
        assert_same(trl_side(trainer, [row]), (*ours[:2], {}))


def test_the_odds_ratio_of_orpo_equals_trl(make_reference_free_trainer):
    """What more of beta adds, which the likelihood has no part in."""
    theirs, ours = [], []
    for beta in (0.5, 20.5):
        trainer = make_reference_free_trainer("ORPO", beta=beta)
        rows = list(trainer.train_dataset)
        theirs.append(trl_side(trainer, rows))
        ours.append(our_side(list(map(with_our_names, rows)), loss="orpo", beta=beta))
    theirs, ours = (
        (more[0] - less[0], {name: more[1][name] - less[1][name] for name in less[1]}, {})
        for less, more in (theirs, ours)
    )
    assert_same(theirs, ours)


def test_trl_still_ignores_smoothing_for_sigmoid(make_trainer):
    """The day this fails, compare sigmoid with smoothing too."""
    losses = []
    for label_smoothing in (0.0, 0.3):
        trainer = make_trainer(loss_type=["sigmoid"], label_smoothing=label_smoothing)
        losses.append(trl_side(trainer, list(trainer.train_dataset))[0])
    assert losses[0] == losses[1]
