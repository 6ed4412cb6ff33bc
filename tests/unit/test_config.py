"""The configuration refuses what cannot work, in one message that names key, value and the way to mend it."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny_config

from dpo_ray import config as configuration
from dpo_ray.config import Config, ScalingConfig, changed_keys, load_config, parse_config, to_yaml
from dpo_ray.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "name": "run",
    "storage_path": "runs",
    "model": {"path": "model"},
    "data": {"train": ["pairs.jsonl"]},
}


def with_values(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**MINIMAL, **{name: {**MINIMAL.get(name, {}), **values} for name, values in sections.items()}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            with_values(train={"global_batch_pair": 8}),
            "unknown key train.global_batch_pair: did you mean train.global_batch",
        ),
        ({**MINIMAL, "sclaing": {}}, "unknown key sclaing: did you mean scaling"),
        (with_values(objective={"loss": "sigmod"}), "objective.loss is 'sigmod', known are .*; did you mean 'sigmoid'"),
        (with_values(objective={"beta": -1}), "objective.beta is -1: Input should be greater than 0"),
        (with_values(objective={"loss": "hinge", "label_smoothing": 0.1}), "hinge does not use it"),
        (with_values(objective={"target_margin": 0.5}), "target_margin is 0.5, but sigmoid .* or choose one of simpo"),
        (
            with_values(objective={"loss": "nca_pair", "f_divergence": "js"}),
            "objective.f_divergence is js, but nca_pair is for reverse_kl alone: leave it out, or choose one of sigm",
        ),
        (
            with_values(objective={"loss": {"sigmoid": 1, "apo_zero": 1}, "f_divergence": "js"}),
            "objective.f_divergence is js, but apo_zero is for reverse_kl alone",
        ),
        (with_values(objective={"loss": {"sft": 1}, "f_divergence": "js"}), "but sft is for reverse_kl alone"),
        (with_values(objective={"loss": {"sigmoid": 1, "stf": 1}}), "objective.loss is 'stf', .*did you mean 'sft'"),
        (with_values(objective={"loss": {"sigmoid": 0}}), "gives sigmoid the weight 0: write a number above 0"),
        (with_values(objective={"loss": {}}), r"objective.loss is {}: write the name of a loss"),
        (with_values(objective={"loss": ["sigmoid"]}), r"objective.loss is \['sigmoid'\]: write the name of a loss"),
        (
            with_values(objective={"loss": {"ipo": 1, "sft": 1}, "label_smoothing": 0.1}),
            r"label_smoothing is 0.1, but ipo \+ sft does not use it",
        ),
        (with_values(objective={"loss": "simpo", "target_margin": 1, "ld_alpha": 0.5}), "but simpo has no log-ratios"),
        (with_values(objective={"loss": "aot", "weighting": "wpo"}), "weighting is wpo, but aot has no loss of two"),
        (with_values(objective={"loss": "plackett_luce", "weighting": "wpo"}), "but plackett_luce has no loss of two"),
        (
            with_values(objective={"ld_alpha": 0.5}, reference={"columns": ["a", "b"]}),
            "ld_alpha is 0.5, which needs the reference's scores of each token",
        ),
        (
            with_values(objective={"loss": "ipo"}, data={"margin_column": "gap"}),
            "data.margin_column is 'gap', but objective.loss: ipo has no place for a margin: .*use sigmoid, hinge, rob",
        ),
        (
            with_values(reference={"sync_steps": 5}, objective={"loss": {"sigmoid": 1, "bco_pair": 1}}),
            r"sync_steps is 5, but objective.loss: sigmoid \+ bco_pair holds rewards against the mean",
        ),
        (
            with_values(sft={"epochs": 1}, reference={"path": "/other"}),
            "reference.path is '/other', but with sft.epochs: 1 the policy starts from a model that this run makes",
        ),
        (with_values(data={"chat_template_kwargs": {"day": {1}}}), "is not JSON serializable; write texts, numbers"),
        (
            with_values(objective={"loss": "sft"}, reference={"place": "none", "replicas": 3}),
            "reference.replicas is 3, which does nothing with reference.place: none",
        ),
        (with_values(sft={"learning_rate": 1e-4}), "sft.learning_rate is 0.0001, which does nothing without sft.epo"),
        (with_values(sft={"epochs": 1}, objective={"loss": "sft"}), "sft.epochs is 1, but objective.loss: sft is such"),
        (with_values(objective={"f_divergence": "alpha"}), r"f_alpha is null: set it in \(0, 1\)"),
        (
            with_values(objective={"f_alpha": 0.5}),
            "objective.f_alpha is 0.5, but f_divergence: reverse_kl does not use",
        ),
        (with_values(objective={"f_divergence": "alpha", "f_alpha": 1}), "objective.f_alpha is 1: .* less than 1"),
        (with_values(objective={"loss": "cpo"}), r"nll_weight is 0.0, but cpo needs it in \(0, inf\)"),
        (
            with_values(objective={"label_smoothing": 0.6}),
            r"is 0.6, but sigmoid needs it in \[0, 0.5\)",
        ),
        (with_values(train={"global_batch_pairs": 2}, scaling={"workers": 3}), "fewer than scaling.workers"),
        (with_values(scaling={"shard_over": "nodes"}), "scaling.shard_over is 'nodes': write all, node, or a number"),
        (
            with_values(scaling={"workers": 12, "shard_over": 8}),
            r"shard_over is 8, but scaling.workers \(12\) is never several groups of 8",
        ),
        (with_values(scaling={"workers": 8, "shard_over": 8}), "is never several groups of 8"),
        (
            with_values(scaling={"workers": {"min": 5, "max": 7}, "shard_over": 2.0}),
            "shard_over is 2.0: write all",
        ),
        (
            with_values(scaling={"workers": {"min": 9, "max": 11}, "shard_over": 4}),
            r"scaling.workers \(9 to 11\) is never several groups of 4",
        ),
        (with_values(model={"weights_dtype": "bfloat16"}), "adamw_kahan"),
        (with_values(model={"freeze": ["layers.(0"]}), r"model.freeze: 'layers.\(0' is no regular expression"),
        (with_values(model={"freeze": ["embed"]}, adapter={"rank": 2}), "with adapter.rank 2 all of the model's own"),
        (
            with_values(data={"chat_template": "none", "chat_template_kwargs": {"a": 1}}),
            "but data.chat_template: none uses no template",
        ),
        (with_values(data={"chat_template_kwargs": {"tokenize": 1}}), "tokenize is not the template's"),
        (with_values(data={"train": []}), r"data.train is \[\]: write a list of files, or files with weights such as"),
        (with_values(data={"train": {"a": 0}}), "data.train gives a the weight 0: write a number above 0"),
        (with_values(data={"train": {"a": 1, "./a": 2}}), r"data.train names a place twice: a, ./a; name it once"),
        (with_values(data={"eval": {"a b": ["x"]}}), "data.eval: 'a b' cannot be the name of a set: write letters"),
        (with_values(data={"eval": {"a": "x"}}), r"data.eval is {'a': 'x'}: write a list of files, or such lists by"),
        (with_values(data={"eval": {"a": []}}), "data.eval: the set a has no files: name some, or leave it out"),
        (
            with_values(model={"gradient_checkpointing": "offload"}),
            "offload does nothing without .*use true",
        ),
        (with_values(model={"compile": True, "gradient_checkpointing": True}), "use one of them"),
        (
            with_values(reference={"place": "none"}),
            "reference.place is none, but objective.loss: sigmoid needs a reference: use reference.place: actors, or "
            "an objective without one: .*sft",
        ),
        (
            with_values(reference={"place": "store_only"}, objective={"loss": "sft"}),
            "reference.place is store_only, but objective.loss: sft has no reference: leave it out, or use none",
        ),
        (with_values(reference={"columns": ["good"]}), r"reference.columns is \['good'\]: name two columns"),
        (with_values(data={"score_columns": ["a", "a"]}), r"data.score_columns is \['a', 'a'\]: name two columns"),
        (with_values(reference={"columns": ["a", "b"]}, objective={"loss": "sft"}), "sft has no reference: leave it"),
        (
            with_values(reference={"label_selector": {"pool": "!policy"}}),
            "reference.label_selector.pool is '!policy': write the one value .*operators, such as !x and in",
        ),
        (
            with_values(reference={"label_selector": {"pool": "in(a, b)"}}),
            r"label_selector.pool is 'in\(a, b\)': write",
        ),
        *(
            (
                with_values(**{section: {"label_selector": {"pool": "!x"}}}),
                f"{section}.label_selector.pool is '!x': write",
            )
            for section in ("scaling", "data")
        ),
        (with_values(reference={"label_selector": {"pool": ""}}), "label_selector.pool is '': write the one value"),
        (with_values(reference={"label_selector": {"a b": "x"}}), "'a b' cannot be the name of a label"),
        (with_values(reference={"label_selector": {"a b/pool": "x"}}), "'a b/pool' cannot be the name of a label"),
        (with_values(reference={"label_selector": {"pool": 1}}), "label_selector.pool is 1: .*valid string"),
        (with_values(evaluation={"lm_eval": ["--limit", "5"]}), "evaluation.lm_eval is .*, without --tasks: name some"),
        (
            with_values(evaluation={"lm_eval": ["--tasks", "a", "--conf", "b"]}),
            "lm_eval has --conf, which dpo_ray gives",
        ),
        (
            with_values(evaluation={"lm_eval": ["--tasks", "a", "--model=hf"]}),
            "evaluation.lm_eval has --model, which dpo_ray gives itself",
        ),
        (
            with_values(model={"cpu_offload": True}, optimizer={"name": "muon"}, scaling={"gpus_per_worker": 1}),
            "optimizer.name is muon, but with model.cpu_offload: true its products of whole matrices would run",
        ),
        (with_values(model={"cpu_offload": True}), "does nothing without scaling.gpus_per_worker: 1.*use false"),
        (with_values(train={"eval_every_steps": 5}), "nothing is held out"),
        (with_values(data={"eval": ["x"], "eval_fraction": 0.1}), "keep one of them"),
        (with_values(adapter={"rank": 0}), "adapter.rank is 0: Input should be greater than 0"),
        (with_values(adapter={"rank": 4, "dropout": 0.1}), "unknown key adapter.dropout"),
        (with_values(adapter={"alpha": 8}), "adapter.alpha is 8.0, which does nothing without adapter.rank: set that"),
        (with_values(adapter={"dora": True}), "adapter.dora is True, which does nothing without adapter.rank"),
        (with_values(adapter={"merge": False}), "adapter.merge is False, which does nothing without adapter.rank"),
        (with_values(adapter={"rank": 4, "target_modules": []}), r"adapter.target_modules is \[\]: write all-linear"),
        (
            with_values(adapter={"quantize": "nf4"}),
            "adapter.quantize is 'nf4', which does nothing without adapter.rank",
        ),
        *(
            (
                with_values(adapter={"rank": 4, "quantize": "nf4"}, reference={"place": place}),
                f"adapter.quantize is nf4, but reference.place: {place} has scores of weights that are not quantized",
            )
            for place in ("actors", "store_only")
        ),
        (
            with_values(reference={"place": "adapter_off"}),
            "reference.place is adapter_off, but adapter.rank is null.*set adapter.rank, or reference.place: actors",
        ),
        (
            with_values(adapter={"rank": 4}, reference={"place": "adapter_off", "path": "/other"}),
            "reference.path is '/other', but .* the reference is the policy's start.*leave it out",
        ),
        (
            with_values(adapter={"rank": 4}, reference={"place": "adapter_off", "dtype": "float32"}),
            "reference.dtype is float32, but .* model.compute_dtype: bfloat16",
        ),
        (
            with_values(adapter={"rank": 4}, reference={"place": "adapter_off", "columns": ["a", "b"]}),
            r"reference.columns is \['a', 'b'\], but nobody checks",
        ),
        (
            with_values(adapter={"rank": 4}, reference={"place": "adapter_off"}, objective={"loss": "sft"}),
            "objective.loss: sft has no reference",
        ),
        (with_values(optimizer={"schedule": "constant", "warmup_steps": 3}), "constant_with_warmup"),
        *(
            (with_values(**{section: {key: value, **others}}), f"{section}.{key} is .*, which does nothing w{why}")
            for section, key, value, others, why in (
                ("optimizer", "betas", [0.9, 0.95], {"name": "rmsprop"}, "ith optimizer.name: rmsprop"),
                ("scaling", "grow_after_s", 5, {"workers": 3}, "ith scaling.workers: 3: write {min: ..., max: ...}"),
                ("data", "prompt_truncation_side", "right", {}, "ithout data.max_prompt_length"),
                ("tracking", "project", "mine", {}, r"ith tracking.trackers: \['tensorboard'\]: add wandb"),
                ("evaluation", "timeout_s", 5, {}, "ith evaluation.judge: none; set evaluation.judge: endpoint"),
                ("evaluation", "prior_std", 1, {}, "ith evaluation.judge: none, since nothing is ranked"),
                ("evaluation", "top_p", 0.5, {"prompts": 0}, "ith evaluation.prompts: 0"),
            )
        ),
        (
            with_values(train={"tokens_per_microbatch": "big"}),
            "^configuration: train.tokens_per_microbatch is 'big': Input should be a valid integer.*, or: .*'auto'$",
        ),
        (with_values(model={"gradient_checkpointing": "maybe"}), "model.gradient_checkpointing is 'maybe': .*, or: "),
        (with_values(scaling={"workers": -3}), "^configuration: scaling.workers is -3: write a number of 1 or more"),
        (
            with_values(scaling={"workers": {"min": 0, "max": 2}}),
            "scaling.workers is {.min.: 0, .max.: 2}: write a num",
        ),
        (with_values(scaling={"gpus_per_worker": 1}), "reference.gpus_per_replica is not set: set it to 1, for a GPU"),
        (with_values(optimizer={"betas": [0.9, 1.5]}), "optimizer.betas.1 is 1.5: Input should be less than 1"),
        (with_values(optimizer={"learning_rate": float("inf")}), "optimizer.learning_rate is inf: .*finite number"),
        (
            with_values(optimizer={"warmup_steps": 1.5}),
            "warmup_steps is 1.5: write a number of steps, or a share such as",
        ),
        (with_values(scaling={"resources_per_worker": {"a": -1}}), "scaling.resources_per_worker.a is -1: .*or equal"),
        (with_values(model={"path": "s3:/bucket/m"}), "model.path is 's3:/bucket/m': write s3://"),
        (with_values(model={"path": "$HOME/m"}), "model.path is '\\$HOME/m': variables of a shell are not replaced"),
        (with_values(objective={"loss": "dpo"}), "objective.loss is 'dpo', known are .*; did you mean 'sigmoid'"),
        ({key: value for key, value in MINIMAL.items() if key != "model"}, "model is required"),
        ({**MINIMAL, "name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_mistakes(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(raw)
    assert "\n" not in str(caught.value).strip()


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_values(train={"epochs": 0}, scaling={"workers": "many"}))
    assert "train.epochs is 0" in str(caught.value)
    assert "scaling.workers is 'many'" in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://user:canary@host/pairs.jsonl",
        "https://host/pairs.jsonl?X-Amz-Credential=a&X-Amz-Signature=canary",
        "abfs://data/pairs.jsonl?sv=2024&sig=canary",
        "s3://bucket/pairs.jsonl?secret_key=canary",
        "https://host/pairs.jsonl?api-key=canary",
        "https://host/pairs.jsonl?v=1&key=canary",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    places: list[tuple[str, dict[str, Any]]] = [
        ("storage_path", {"storage_path": uri}),
        ("model.path", {"model": {"path": uri}}),
        ("data.train", {"data": {"train": [uri]}}),
        ("data.train", {"data": {"train": {uri: 1.0}}}),
        ("data.eval.safe", {"data": {"train": ["a.jsonl"], "eval": {"safe": [uri]}}}),
        ("data.trian", {"data": {"trian": uri}}),
    ]
    for key, changed in places:
        with pytest.raises(ConfigError, match=f"^{key}: a URI has a password, a token or a signature") as raised:
            parse_config({**MINIMAL, **changed})
        assert "canary" not in str(raised.value)
    with pytest.raises(ConfigError):
        Config(**{**MINIMAL, "storage_path": uri})


def test_a_secret_of_the_environment_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary-0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "dpo_ray-1")
    assert (
        parse_config({**MINIMAL, "tracking": {"project": "dpo_ray-1", "trackers": ["wandb"]}}).tracking.project
        == "dpo_ray-1"
    )
    for section, key in (("tracking", "project"), ("tracking", "token"), ("data", "train")):
        with pytest.raises(ConfigError, match=f"^{section}.{key}: it has the environment's HF_TOKEN in it") as raised:
            parse_config({**MINIMAL, section: {key: "of hf_canary-0123456789"}})
        assert "canary" not in str(raised.value)


def test_a_key_in_place_of_its_variable_is_not_repeated() -> None:
    for key in ("sk-canary", "hf_canary", "CANARY KEY"):
        with pytest.raises(ConfigError, match="evaluation.key_variable is not the name of an env") as raised:
            parse_config({**MINIMAL, "evaluation": {"key_variable": key}})
        assert key not in str(raised.value)
    judge = {"judge": "endpoint", "endpoint": "http://x/v1", "endpoint_model": "m", "key_variable": "MY_KEY_2"}
    assert parse_config({**MINIMAL, "evaluation": judge}).evaluation.key_variable == "MY_KEY_2"


def test_what_is_no_secret_in_a_uri() -> None:
    for uri in ("abfs://container@account.dfs.core.windows.net/x", "hf://datasets/a/b@main/x", "s3://b/a:b@c?design=1"):
        assert parse_config({**MINIMAL, "storage_path": uri}).storage_path == uri


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(str(path), ["optimizer.learning_rate=1e-6", "scaling.workers=2", "data.eval=[a, b]", "seed=3"])
    assert (config.optimizer.learning_rate, config.scaling.workers, config.seed) == (1e-6, 2, 3)
    assert config.data.eval == [os.path.abspath("a"), os.path.abspath("b")]
    for override, message in (("scaling.workers", "section.key=value"), ("seed.x=1", "seed is not a section")):
        with pytest.raises(ConfigError, match=message):
            load_config(str(path), ["seed=3", override])


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(str(tmp_path / "none.yaml"))


def test_numbers_as_people_write_them_and_keys_that_stand_twice(tmp_path: Path) -> None:
    """1e-1 and 1e3 are texts in YAML 1.1, which PyYAML reads; a second section would hide the first."""
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump(MINIMAL) + "objective:\n  loss: {sigmoid: 1e-1, sft: .5e+0}\nseed: 1e3\n"
    path.write_text(text)
    config = load_config(str(path), ["tracking.trackers=[wandb]", "tracking.project=inf", "optimizer.eps=1E-7"])
    assert config.objective.shares == {"sigmoid": 0.1, "sft": 0.5}
    assert (config.seed, config.tracking.project, config.optimizer.eps) == (1000, "inf", 1e-7)
    path.write_text(text + "train:\n  epochs: 3\nobjective:\n  beta: 0.2\n")
    with pytest.raises(ConfigError, match=r"(?s)run.yaml: not valid YAML: objective stands twice.*line \d+, column 1"):
        load_config(str(path))


def test_the_template_is_a_configuration_with_all_keys_and_defaults() -> None:
    raw = yaml.safe_load(configuration.template())
    config = parse_config(raw)
    required = {key: raw[key] for key in ("name", "storage_path")}
    required |= {"model": {"path": raw["model"]["path"]}, "data": {"train": raw["data"]["train"]}}
    assert config == parse_config(required)
    assert set(raw) == set(Config.model_fields)
    for name, section in raw.items():
        if isinstance(section, dict):
            assert set(section) == set(type(getattr(config, name)).model_fields), name


def test_resolved_configuration_reads_back() -> None:
    config = parse_config(MINIMAL)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_what_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    before = tiny_config("s", "run", tmp_path, "/pairs.jsonl").model_dump(mode="json")
    allowed = tiny_config(
        "s", "run", tmp_path, "/pairs.jsonl", scaling={"workers": 4}, train={"max_steps": 99}, reference={"replicas": 3}
    )
    assert changed_keys(before, allowed) == []
    allowed = tiny_config("s", "run", tmp_path, "/pairs.jsonl", reference={"label_selector": {"ray.io/zone": "x"}})
    assert changed_keys(before, allowed) == []
    adapted = tiny_config("s", "run", tmp_path, "/pairs.jsonl", adapter={"rank": 4}).model_dump(mode="json")
    alone = tiny_config("s", "run", tmp_path, "/pairs.jsonl", adapter={"rank": 4, "merge": False})
    assert changed_keys(adapted, alone) == []
    older = {key: value for key, value in before.items() if key != "adapter"}
    older["reference"] = {key: value for key, value in before["reference"].items() if key != "mixup_alpha"}
    assert changed_keys(older, allowed) == []
    for stored in (before, older):
        assert changed_keys(stored, alone) == ["adapter.rank: None -> 4"]
    changed = tiny_config(
        "s", "run", tmp_path, "s3://other.jsonl", train={"global_batch_pairs": 13}, objective={"loss": "ipo"}
    )
    assert changed_keys(before, changed) == [
        "data.train: ['/pairs.jsonl'] -> ['s3://other.jsonl']",
        "objective.loss: sigmoid -> ipo",
        "train.global_batch_pairs: 12 -> 13",
    ]


def test_objectives_that_need_no_reference() -> None:
    for reference in ({}, {"place": "none"}, {"place": "actors"}):
        assert not parse_config(with_values(objective={"loss": "sft"}, reference=reference)).needs_reference
    assert parse_config(MINIMAL).reference.place == "actors"


def test_workers_are_a_number_or_a_range() -> None:
    for workers, least, most in ((3, 3, 3), ({"min": 2, "max": 8}, 2, 8)):
        scaling = parse_config(with_values(scaling={"workers": workers})).scaling
        assert (scaling.min_workers, scaling.max_workers) == (least, most)
    for workers, message in (
        ({"min": 3, "max": 2}, "min is 3, more than max"),
        ({"min": 1}, "write a number of 1 or more, or {min: 2, max: 8}"),
        (0, "scaling.workers is 0: write a number"),
        (True, "scaling.workers is True"),
        ({"min": 0, "max": 2}, "scaling.workers"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_config(with_values(scaling={"workers": workers}))
    with pytest.raises(ConfigError, match=r"fewer than scaling.workers \(8\)"):
        parse_config(with_values(scaling={"workers": {"min": 1, "max": 8}}, train={"global_batch_pairs": 4}))


def test_a_start_by_likelihood_and_what_follows() -> None:
    config = parse_config(
        with_values(
            sft={"epochs": 2, "learning_rate": 1e-4},
            objective={"loss": "ipo", "beta": 0.3},
            reference={"replicas": 2, "gpus_per_replica": 1},
            optimizer={"learning_rate": 1e-6, "warmup_steps": 3},
            train={"epochs": 1, "eval_every_steps": 5, "eval_place": "actors", "keep_best": "eval_rewards/margins"},
            data={"eval_fraction": 0.1},
            adapter={"rank": 4, "merge": False},
        )
    )
    start, after = config.start(), config.after_start()
    assert start.name == f"{config.name}-sft"
    assert (start.objective.loss, start.needs_reference, start.sft.epochs) == ("sft", False, None)
    assert (start.optimizer.learning_rate, start.optimizer.warmup_steps) == (1e-4, 3)
    assert (start.train.epochs, start.train.keep_best, start.adapter.merge) == (2, "eval_loss", True)
    assert start.data == config.data
    # Evaluated beside training on what a replica of the reference has.
    assert (start.train.eval_place, start.reference.replicas, start.reference.gpus_per_replica) == ("actors", 1, 1)
    assert after.model.path == after.reference_path == f"{start.run_uri}/export"
    assert after.model.tokenizer == config.model.path
    assert after.model_copy(update={"model": config.model}) == config


def test_a_section_whose_keys_are_all_commented_out() -> None:
    assert parse_config({**MINIMAL, "optimizer": None}) == parse_config(MINIMAL)
    with pytest.raises(ConfigError, match="model.path is required"):
        parse_config({**MINIMAL, "model": None})


def test_actors_have_what_workers_have() -> None:
    """On GPUs nobody samples answers on a CPU by having forgotten a key."""
    gpus: dict[str, Any] = {"scaling": {"gpus_per_worker": 1}, "reference": {"gpus_per_replica": 0}}
    found = parse_config({**MINIMAL, **gpus, "pairs": {"gpus_per_actor": 0.5}})
    assert (found.pairs.gpus_per_actor, found.evaluation.gpus_per_actor) == (0.5, 1.0)
    assert parse_config(MINIMAL).evaluation.gpus_per_actor == 0.0
    assert parse_config({**MINIMAL, **gpus, "evaluation": {"gpus_per_actor": 0}}).evaluation.gpus_per_actor == 0.0


def test_mixtures_say_what_they_need() -> None:
    config = parse_config(with_values(objective={"loss": {"sigmoid": 0.8, "sft": 0.2}}))
    assert config.needs_reference
    assert config.objective.shares == {"sigmoid": 0.8, "sft": 0.2}
    assert not parse_config(with_values(objective={"loss": {"sft": 1, "orpo": 1}})).needs_reference
    assert not config.needs_token_scores
    assert parse_config(with_values(objective={"ld_alpha": 0.5})).needs_token_scores


@pytest.mark.parametrize(
    ("shard_over", "nodes", "group"),
    [
        ("all", "AABB", 4),
        ("node", "AABB", 2),
        ("node", "ABCD", 1),
        ("node", "AAAA", 4),
        ("node", "AAAB", 4),  # Groups of 3 and 1 would not be alike.
        ("node", "ABAB", 4),  # Ranks that are not numbered node by node.
        ("node", "AABBA", 5),
        (2, "AAAABB", 2),
        (2, "AAABBB", 2),  # One group on two nodes: slower, and right.
        (4, "AABBC", 5),
        (4, "AAB", 3),
    ],
)
def test_who_shares_a_copy_of_the_weights(shard_over: Any, nodes: str, group: int) -> None:
    scaling = ScalingConfig.model_validate({"workers": {"min": 1, "max": 8}, "shard_over": shard_over})
    assert scaling.group_of(nodes) == group
