"""Dashboard and alerts: PromQL that parses, gauges that exist, and what Grafana and Prometheus demand of files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from ray._private import ray_constants

from dpo_ray.orchestration.gauges import GAUGES

CLUSTER = Path(__file__).parents[2] / "cluster"
DASHBOARD = json.loads((CLUSTER / "monitoring/dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
GROUPS = yaml.safe_load((CLUSTER / "monitoring/rules.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
QUERIES = {
    f"panel {panel['title']}, {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]
}
ALERTS = {f"alert {rule['alert']}": rule["expr"] for rule in RULES}


def parsed(expr: str) -> Any:
    """Raises where Prometheus would refuse."""
    return promql_parser.parse(expr.replace('"$run"', '".*"'))


def selectors(expr: str) -> Iterator[Any]:
    found = list[Any]()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(parsed(expr), pre_visit=visit)
    yield from found


def unknown(expr: str) -> list[str]:
    """What an expression names that no run exports: metrics, or labels of theirs."""
    wrong = list[str]()
    for selector in selectors(expr):
        name = (selector.name or "").removeprefix("ray_")
        if not (selector.name or "").startswith("ray_") or name not in GAUGES:
            wrong.append(str(selector.name))
            continue
        labels, _ = GAUGES[name]
        wrong += [each.name for each in selector.matchers.matchers if each.name not in ("run", *labels)]
    return wrong


@pytest.mark.parametrize("expr", [*QUERIES.values(), *ALERTS.values()], ids=[*QUERIES, *ALERTS])
def test_an_expression_names_what_runs_export(expr: str) -> None:
    assert list(selectors(expr))
    assert unknown(expr) == []


def test_a_wrong_expression_is_found() -> None:
    assert unknown("ray_dpo_lost > 1") == ["ray_dpo_lost"]
    assert unknown("dpo_loss") == ["dpo_loss"]
    assert unknown('ray_dpo_loss{kind="final"}') == ["kind"]
    with pytest.raises(ValueError, match="unclosed|unexpected|invalid"):
        parsed("max by (run) (ray_dpo_loss")


def test_every_gauge_is_shown() -> None:
    shown = {selector.name.removeprefix("ray_") for expr in QUERIES.values() for selector in selectors(expr)}
    alerts = {selector.name.removeprefix("ray_") for expr in ALERTS.values() for selector in selectors(expr)}
    assert GAUGES.keys() - shown - alerts == {"dpo_epoch", "dpo_trained_tokens", "dpo_checkpoint_step"}


def test_grafana_can_read_the_dashboard() -> None:
    assert {"title", "uid", "schemaVersion", "time", "templating", "annotations", "panels"} <= DASHBOARD.keys()
    assert "id" not in DASHBOARD  # A dashboard that is imported gets its own.
    assert len(DASHBOARD["uid"]) <= 40
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}
    assert {name for expr in QUERIES.values() for name in re.findall(r"\$(\w+)", expr)} <= variables.keys()
    taken = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {"type", "title", "fieldConfig", "options", "targets"} <= panel.keys()
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names) > 0


def test_prometheus_can_read_the_rules() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        promql_parser.parse_duration(rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        # Every alert says of which run it is, and so must keep that label.
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert "by (run)" in rule["expr"]


def test_prometheus_finds_ray() -> None:
    config = yaml.safe_load((CLUSTER / "monitoring/prometheus.yaml").read_text())
    ((file,),) = (each["files"] for scrape in config["scrape_configs"] for each in scrape["file_sd_configs"])
    assert Path(file).name == ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    (rules,) = config["rule_files"]
    assert (CLUSTER / "monitoring" / rules).exists()
    (endpoint,) = yaml.safe_load((CLUSTER / "kuberay/pod-monitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    policy = yaml.safe_load((CLUSTER / "kuberay/network-policy.yaml").read_text())["spec"]
    assert endpoint["port"] == "metrics"
    assert [{"protocol": "TCP", "port": "metrics"}] in [each.get("ports") for each in policy["ingress"]]
