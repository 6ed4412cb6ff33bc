"""The cluster files: what Ray and KubeRay accept, what Ray's autoscaler makes of them, and that they hold no secret."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import fillout_defaults, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from dpo_ray.config import load_config
from dpo_ray.orchestration.autoscaler import types_of
from dpo_ray.orchestration.nodes import PLENTY, labels_as_resources
from dpo_ray.orchestration.resources import demands

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")
RECIPES = {path.stem: load_config(str(path)) for path in sorted((ROOT / "jobs").glob("*.yaml"))}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
each_launcher = pytest.mark.parametrize("name", LAUNCHERS)
each_manifest = pytest.mark.parametrize("name", KUBERAY)
each_cluster = pytest.mark.parametrize("name", LAUNCHERS + KUBERAY)


@functools.cache
def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> dict[str, dict[str, Any]]:
    """Specs of all pods that a manifest leads to, by group."""
    spec, cluster = load(name)["spec"], cluster_spec(name)
    templates = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    templates["head"] = cluster["headGroupSpec"]["template"]
    if "submitterPodTemplate" in spec:
        templates["submitter"] = spec["submitterPodTemplate"]
    return {group: template["spec"] for group, template in templates.items()}


@functools.cache
def autoscaling(name: str) -> AutoscalingConfig:
    """A cluster as Ray's autoscaler reads it; fails where Ray's schema does not allow what it says."""
    config = load(name)
    if name in KUBERAY:
        custom_resource = {"metadata": {"name": "it", "namespace": "here"}, "spec": cluster_spec(name)}
        config = _derive_autoscaling_config_from_ray_cr(custom_resource)
    return AutoscalingConfig(config, skip_content_hash=True)


def started(name: str, each: dict[str, float], count: int, labels: dict[str, str] | None = None) -> dict[str, int]:
    """How many nodes of each type Ray's autoscaler would start for `count` of `each`, where there is none."""
    config = autoscaling(name)
    selector = [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in (labels or {}).items()]
    request = ResourceRequestUtil.make(each, label_selectors=[selector] if selector else None)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([request] * count),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@each_launcher
def test_ray_refuses_an_unknown_key(name: str) -> None:
    """What Ray accepts means something: its schema is closed."""
    validate_config(fillout_defaults(load(name)))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(fillout_defaults({**load(name), "idle_timeout": 5}))


@each_cluster
def test_a_recipe_gets_the_nodes_that_are_meant_for_it(name: str) -> None:
    recipe = RECIPES["dpo-llama3-8b-2n8g-fsdp2"]
    (_, workers, policy), (_, _, reference) = demands(recipe)
    assert started(name, policy, workers) == {"policy": math.ceil(workers / 8)}
    assert "reference" in reference
    assert started(name, reference, recipe.reference.most_replicas) == {"reference": 4}
    assert started(name, {"CPU": 1.0}, 20) == {"data": 2}


@each_cluster
def test_no_policy_worker_goes_to_a_spot_node(name: str) -> None:
    types = autoscaling(name).get_node_type_configs()
    on_gpus = {stem: demands(recipe)[0][2] for stem, recipe in RECIPES.items() if recipe.scaling.gpus_per_worker}
    assert len(on_gpus) >= 8
    for stem, each in on_gpus.items():
        room = {group for group, node in types.items() if all(node.resources.get(key, 0) >= each[key] for key in each)}
        assert (stem, room) == (stem, {"policy"})


@each_cluster
def test_nodes_are_found_by_label_before_there_are_any(name: str) -> None:
    for pool in ("data", "policy", "reference"):
        assert started(name, {"CPU": 1.0}, 1, {"pool": pool}) == {pool: 1}
    types = autoscaling(name).get_node_type_configs()
    accelerator = {"ray.io/accelerator-type": types["reference"].labels["ray.io/accelerator-type"]}
    assert started(name, {"GPU": 1.0}, 1, accelerator) == {"reference": 1}


@each_launcher
def test_a_run_knows_what_the_nodes_will_be(name: str) -> None:
    """As it reads the file that `ray up` leaves on the head, and as Ray's autoscaler does."""
    types = {each.name: each for each in types_of(load(name))}
    read = {group: node for group, node in autoscaling(name).get_node_type_configs().items() if group != "head"}
    assert types.keys() == read.keys()
    for group, node in read.items():
        labels = {"ray.io/node-group": group, **node.labels}
        assert types[group].resources == {**node.resources, **labels_as_resources(labels, PLENTY)}
        assert types[group].most == node.max_worker_nodes


@each_cluster
def test_everything_goes_to_zero_when_idle(name: str) -> None:
    config = autoscaling(name)
    types = config.get_node_type_configs()
    workers = {group: types[group] for group in ("data", "policy", "reference")}
    assert len(types) == len(workers) + 1
    assert all(node.min_worker_nodes == 0 < node.max_worker_nodes for node in workers.values())
    limits = [node.idle_timeout_s or config.get_idle_timeout_s() for node in workers.values()]
    assert all(0 < limit <= 600 for limit in limits)


@each_cluster
def test_data_and_reference_are_on_spot_nodes(name: str) -> None:
    if name in KUBERAY:
        found = {
            group: pod["nodeSelector"]["karpenter.sh/capacity-type"]
            for group, pod in pods(name).items()
            if group != "submitter"
        }
        spot = {group for group, kind in found.items() if kind == "spot"}
        taints = {group for group, pod in pods(name).items() if "spot" in str(pod.get("tolerations"))}
        assert taints == spot
    else:
        nodes = {group: node["node_config"] for group, node in load(name)["available_node_types"].items()}
        markets = [{"MarketType": "spot"}, "SPOT"]
        spot = {
            group
            for group, node in nodes.items()
            if node.get("InstanceMarketOptions", node.get("scheduling", {}).get("provisioningModel")) in markets
        }
    assert spot == {"data", "reference"}


@each_cluster
def test_access_comes_from_roles_alone(name: str) -> None:
    if name in KUBERAY:
        accounts = list(yaml.safe_load_all((CLUSTER / "kuberay/service-accounts.yaml").read_text()))
        roles = {each["metadata"]["name"]: each["metadata"]["annotations"] for each in accounts}
        assert all(list(annotations) == ["eks.amazonaws.com/role-arn"] for annotations in roles.values())
        users = {group: pod.get("serviceAccountName") for group, pod in pods(name).items() if group != "submitter"}
        # What may scale the cluster is out of the workers' reach.
        assert all(pod["automountServiceAccountToken"] is False for group, pod in pods(name).items() if group != "head")
        assert set(users.values()) == set(roles)
    else:
        assert "gcp_credentials" not in load(name)["provider"]
        nodes = {group: node["node_config"] for group, node in load(name)["available_node_types"].items()}
        users = {
            group: node["IamInstanceProfile"]["Name"] if name == "aws.yaml" else node["serviceAccounts"][0]["email"]
            for group, node in nodes.items()
        }
    head = users.pop("head")
    assert head.startswith("dpo-ray-head")
    assert len(set(users.values())) == 1
    assert head not in users.values()


@pytest.mark.parametrize("path", [path for path in CLUSTER.rglob("*") if path.is_file()], ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert not re.search("AKIA|aws_secret|private_key|BEGIN |[0-9a-f]{32}|kind: Secret", text)
    assert not re.search(r"(?i)(token|password|secret)[\"']?: *[\"']?[\w+/]{8}", text)


@each_launcher
def test_ray_wants_a_token_that_a_file_holds(name: str) -> None:
    config = load(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    mounted = {remote: local for remote, local in config["file_mounts"].items() if "token" in remote}
    # Where Ray looks for it by itself, in the image's home and in the user's.
    assert mounted == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@each_manifest
def test_kuberay_makes_the_token(name: str) -> None:
    """KubeRay gives it to all containers of Ray from a secret of its own, and wants to know Ray's version for that."""
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH" not in (CLUSTER / name).read_text()


def test_the_dashboard_is_for_its_own_machine_alone() -> None:
    for name in LAUNCHERS:
        start = load(name)["head_start_ray_commands"][-1]
        assert re.findall(r"--dashboard-host=(\S+)", start) == ["127.0.0.1"]
    assert cluster_spec("kuberay/raycluster.yaml")["headGroupSpec"]["rayStartParams"] == {"dashboard-host": "127.0.0.1"}


def test_the_dashboard_of_a_job_is_for_who_submits_it() -> None:
    """KubeRay must see it; the policy lets nobody else do so."""
    assert cluster_spec("kuberay/rayjob.yaml")["headGroupSpec"]["rayStartParams"] == {"dashboard-host": "0.0.0.0"}
    policy = load("kuberay/network-policy.yaml")["spec"]
    ray = {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}
    assert policy["podSelector"] == ray["podSelector"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    own, dashboard, metrics = policy["ingress"]
    assert own == {"from": [ray]}
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]
    operator, submitter = dashboard["from"]
    # What Helm and kustomize both label it with; either installs it into the namespace that it is told.
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert operator["namespaceSelector"] == {}
    assert submitter["podSelector"]["matchLabels"] == {"ray.io/originated-from-crd": "RayJob"}
    assert metrics["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert metrics["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    assert {"to": [ray]} in policy["egress"]


def test_all_name_the_pinned_ray() -> None:
    version = PINS["ray"]
    for name in LAUNCHERS:
        assert load(name)["docker"]["image"] == f"rayproject/ray:{version}-py311-gpu"
    for name in KUBERAY:
        assert cluster_spec(name)["rayVersion"] == version
        images = {container["image"] for pod in pods(name).values() for container in pod["containers"]}
        assert images == {f"registry.example.com/dpo-ray:ray-{version}"}
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.findall("^FROM (.*)", dockerfile, re.MULTILINE) == [f"rayproject/ray:{version}-py311-gpu"]
    assert f" -t registry.example.com/dpo-ray:ray-{version} " in dockerfile


@each_manifest
def test_pods_may_do_little(name: str) -> None:
    options = cluster_spec(name)["autoscalerOptions"]
    for pod in pods(name).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], options]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
    # Nothing outlives a pod, or belongs to its node.
    assert not re.search("persistentVolumeClaim|hostPath|hostNetwork|hostPID|privileged", (CLUSTER / name).read_text())


@each_manifest
def test_ray_is_asked_how_it_is(name: str) -> None:
    for group, pod in pods(name).items():
        for container in pod["containers"] if group != "submitter" else []:
            for probe in ("livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}


@each_manifest
def test_a_worker_that_must_go_may_write_a_checkpoint(name: str) -> None:
    """Ray drains its node when it is told to end, for as long as this variable says."""
    for group in ("data", "policy", "reference"):
        pod = pods(name)[group]
        (drain,) = pod["containers"][0]["env"]
        assert hasattr(ray_constants, drain["name"])
        assert int(drain["value"]) > ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
        assert int(drain["value"]) < pod["terminationGracePeriodSeconds"]


def test_the_head_comes_back_with_its_state() -> None:
    options = cluster_spec("kuberay/raycluster.yaml")["gcsFaultToleranceOptions"]
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "dpo-ray-redis", "key": "password"}}}
    assert options["redisAddress"].endswith(":6379")
    for name in KUBERAY:
        assert cluster_spec(name)["enableInTreeAutoscaling"] is True
        assert cluster_spec(name)["autoscalerOptions"]["version"] == "v2"


def test_a_job_trains_and_takes_its_cluster_away() -> None:
    spec = load("kuberay/rayjob.yaml")["spec"]
    (mount,) = pods("kuberay/rayjob.yaml")["head"]["containers"][0]["volumeMounts"]
    assert spec["entrypoint"] == f"dpo-ray train {mount['mountPath']}/config.yaml"
    assert spec["shutdownAfterJobFinishes"] is True
    assert "configMap" in pods("kuberay/rayjob.yaml")["head"]["volumes"][0]


def test_both_manifests_have_the_same_cluster() -> None:
    cluster, job = (copy.deepcopy(cluster_spec(name)) for name in KUBERAY)
    del cluster["gcsFaultToleranceOptions"]
    for spec in (cluster, job):
        del spec["headGroupSpec"]["rayStartParams"]
    head = job["headGroupSpec"]["template"]["spec"]
    del head["volumes"], head["containers"][0]["volumeMounts"]
    assert job == cluster


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of Kubernetes that refuses what it does not know, as `kubectl apply` does."""
    made = {
        key: {name: closed(each) for name, each in value.items()}
        if key == "properties"
        else closed(value)
        if isinstance(value, dict) and key in ("items", "additionalProperties")
        else value
        for key, value in schema.items()
    }
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def kuberay_schemas() -> dict[str, Any]:
    """What KubeRay's CRDs say of each kind."""
    folder = os.environ.get("DPO_RAY_KUBERAY_CRD")
    if not folder:
        pytest.skip(
            "needs KubeRay's CRDs: set DPO_RAY_KUBERAY_CRD to helm-chart/kuberay-operator/crds of its repository"
        )
    crds = [yaml.load(path.read_text(), yaml.CSafeLoader)["spec"] for path in Path(folder).glob("ray.io_*.yaml")]
    return {
        crd["names"]["kind"]: closed(version["schema"]["openAPIV3Schema"])
        for crd in crds
        for version in crd["versions"]
        if version["name"] == "v1"
    }


@pytest.mark.shared
@each_manifest
def test_kuberay_knows_every_field(name: str, kuberay_schemas: dict[str, Any]) -> None:
    manifest = copy.deepcopy(load(name))
    validator = jsonschema.Draft202012Validator(kuberay_schemas[manifest["kind"]])
    assert not [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    spec["workerGroupSpecs"][0]["maxReplicas"] = "4"
    wrong = [error.message for error in validator.iter_errors(manifest)]
    assert len(wrong) == 2
    assert any("livenessProb" in message for message in wrong)


def test_the_image_is_small_and_nobodys_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    assert steps[-1][0] == "USER"
    assert int(steps[-1][1].split(":")[0]) > 0
    assert not [step for step in steps if step[0] in ("ADD", "ARG", "ENV")]
    installs = [" ".join(step) for step in steps if step[0] == "RUN"]
    assert all(line.startswith("RUN pip install --no-cache-dir -c constraints.txt ") for line in installs)
    copied = {source for step in steps if step[0] == "COPY" for source in step[2:-1]}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert copied == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


def statements(action: str, resource: str) -> Iterator[dict[str, Any]]:
    """What in the policy allows an action on a resource."""
    for statement in json.loads((CLUSTER / "iam-policy.json").read_text())["Statement"]:
        actions, resources = (
            [each] if isinstance(each, str) else each for each in (statement["Action"], statement["Resource"])
        )
        if (
            statement["Effect"] == "Allow"
            and action in actions
            and any(fnmatchcase(resource, each) for each in resources)
        ):
            yield statement


def test_the_policy_allows_what_the_recipes_do_and_no_more() -> None:
    bucket = "arn:aws:s3:::my-bucket"
    recipes = [recipe for recipe in RECIPES.values() if recipe.storage_path.startswith("s3://")]
    reads = {uri for each in recipes for uri in [each.model.path, *(uri for _, uri in each.data.sources)]}
    (kept,) = {recipe.storage_path for recipe in recipes}
    assert len(reads) > 8
    for uri in [*reads, f"{kept}/run/checkpoints/a"]:
        key = uri.removeprefix("s3://my-bucket/")
        assert list(statements("s3:GetObject", f"{bucket}/{key}/file"))
        (listing,) = statements("s3:ListBucket", bucket)
        allowed = listing["Condition"]["StringLike"]["s3:prefix"]
        assert all(any(fnmatchcase(asked, each) for each in allowed) for asked in (key, f"{key}/", key.split("/")[0]))
        for action in ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
            assert bool(list(statements(action, f"{bucket}/{key}/file"))) == uri.startswith(kept)
    for action in ("s3:GetObject", "s3:PutObject"):
        assert not list(statements(action, f"{bucket}/dpo-of-others/file"))
    assert "*" not in re.findall(r'"s3:(\S+?)"', (CLUSTER / "iam-policy.json").read_text())
