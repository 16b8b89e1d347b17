"""The files that make clusters, against the installed Ray and KubeRay's published fields."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

ROOT = Path(__file__).resolve().parents[1]
RAY_UP = ("cluster.yaml", "cluster-onprem.yaml")
KUBERAY = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")
FIELDS: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "tests" / "kuberay_v1_fields.yaml").read_text(encoding="utf-8")
)


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")))


# Files for `ray up`


@pytest.fixture(params=RAY_UP)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)[0]


def accept(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def start_commands(cluster: dict[str, Any]) -> Iterator[str]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        yield cluster[key][-1]


def options_of(command: str) -> dict[str, Any]:
    """The options of a `ray start`, read as Ray's own command line reads them."""
    from ray.scripts.scripts import start

    words = shlex.split(command.partition("ray start ")[2])
    parsed: dict[str, Any] = start.make_context("ray start", words).params
    return parsed


def test_ray_up_accepts_them(cluster: dict[str, Any]) -> None:
    prepared = accept(cluster)
    assert sum(kind["min_workers"] for kind in prepared["available_node_types"].values()) >= 2
    with pytest.raises(Exception, match="not_a_key"):
        accept(cluster | {"not_a_key": 1})
    with pytest.raises(Exception, match="'soon' is not of type"):
        accept(cluster | {"idle_timeout_minutes": "soon"})


def test_ray_up_refuses_a_node_type_without_resources() -> None:
    cluster = read("cluster.yaml")[0]
    del cluster["available_node_types"]["gpu"]["resources"]
    with pytest.raises(Exception, match="resources"):
        accept(cluster)


def test_ray_start_knows_every_option(cluster: dict[str, Any]) -> None:
    for command in start_commands(cluster):
        assert options_of(command)["object_store_memory"] <= 2 * 2**30
        with pytest.raises(Exception, match="No such option"):
            options_of(command + " --object-store-memry=1")


def test_ray_knows_every_setting_of_health_checks(cluster: dict[str, Any]) -> None:
    head, worker = start_commands(cluster)
    used = set(re.findall(r"RAY_(health_check_\w+)=", head))
    assert len(used) == 4 and "health_check" not in worker, "it is the head that checks"
    manifests = " ".join((ROOT / name).read_text(encoding="utf-8") for name in KUBERAY)
    assert set(re.findall(r"RAY_(health_check_\w+)", manifests)) == used
    server = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    program = server.read_bytes()
    assert all(name.encode() in program for name in used)
    assert b"health_check_no_such_setting" not in program


def test_only_ssh_is_open_and_ray_asks_for_a_token(cluster: dict[str, Any]) -> None:
    assert "security_group" not in cluster["provider"], "Ray's own opens SSH and nothing else"
    head, _ = start_commands(cluster)
    assert options_of(head)["dashboard_host"] == "127.0.0.1"
    assert all("RAY_AUTH_MODE=token" in command for command in start_commands(cluster))
    assert any(target.endswith("/.ray/auth_token") for target in cluster["file_mounts"])
    assert any("chmod 600" in command for command in cluster["setup_commands"])


def test_the_head_on_aws_works_for_no_one_and_is_not_on_spot() -> None:
    cluster = read("cluster.yaml")[0]
    nodes = cluster["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in nodes["head"]["node_config"]
    assert "GPU" not in nodes["cpu"]["resources"], "nodes for Ray Data alone"
    assert sum(kind.get("max_workers", 0) for kind in nodes.values()) <= cluster["max_workers"]


def test_the_machines_on_premise_are_counted() -> None:
    cluster = read("cluster-onprem.yaml")[0]
    assert len(cluster["provider"]["worker_ips"]) == cluster["min_workers"]
    head, _ = start_commands(cluster)
    assert options_of(head)["num_cpus"] == options_of(head)["num_gpus"] == 0


# Manifests for KubeRay


def problems(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Every way in which `value` is not of `kind`, a type of the field list or of Kubernetes."""
    if isinstance(kind, list):
        yield from _each(value, kind[0], where)
    elif isinstance(kind, dict):
        if value not in kind["enum"]:
            yield f"{where}: {value!r} is none of {kind['enum']}"
    elif kind in FIELDS:
        yield from _fields(value, FIELDS[kind], where)
    elif kind.startswith("V1") or kind.startswith("CoreV1"):
        yield from _fields(value, kubernetes_fields(kind), where)
    elif match := re.fullmatch(r"List\[(\w+)\]", kind):
        yield from _each(value, match[1], where)
    elif kind == "map" or kind.startswith("Dict[str, "):
        if not isinstance(value, dict) or not all(
            isinstance(each, str) for pair in value.items() for each in pair
        ):
            yield f"{where}: {value!r} does not map strings to strings"
    else:
        types = {
            "string": str, "str": str, "boolean": bool, "bool": bool, "integer": int, "int": int,
            "number": (int, float), "object": (int, str),
        }  # fmt: skip
        number = isinstance(value, bool) and kind not in ("boolean", "bool")
        if not isinstance(value, types[kind]) or number:
            yield f"{where}: {value!r} is no {kind}"


def kubernetes_fields(kind: str) -> dict[str, str]:
    """Names as in manifests, and types, of a type of Kubernetes."""
    import kubernetes.client

    model = getattr(kubernetes.client, kind)
    return {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}


def _each(value: Any, kind: str, where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{where}: {value!r} is no list"
        return
    for index, each in enumerate(value):
        yield from problems(each, kind, f"{where}[{index}]")


def _fields(value: Any, fields: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no mapping"
        return
    for name, each in value.items():
        if name in fields:
            yield from problems(each, fields[name], f"{where}.{name}")
        else:
            yield f"{where}: no field {name}"


def all_problems(documents: list[dict[str, Any]]) -> list[str]:
    kinds = [
        document["kind"] if document["kind"] in FIELDS else f"V1{document['kind']}"
        for document in documents
    ]
    return [p for d, kind in zip(documents, kinds, strict=True) for p in problems(d, kind, kind)]


def cluster_spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    spec = documents[0]["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def groups(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    spec = cluster_spec(documents)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.fixture(params=KUBERAY)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return read(request.param)


def test_every_field_is_one_of_kuberay_or_kubernetes(manifests: list[dict[str, Any]]) -> None:
    assert all_problems(manifests) == []


@pytest.mark.parametrize(
    ("path", "key", "value", "said"),
    [
        ((), "autoscaling", True, "no field autoscaling"),
        (("authOptions",), "mode", "tokens", "none of"),
        (("headGroupSpec",), "rayStartParams", {"num-cpus": 0}, "strings"),
        (("workerGroupSpecs", 0), "minReplicas", "2", "no integer"),
        (("headGroupSpec", "template", "spec"), "volume", [], "no field volume"),
        (
            ("headGroupSpec", "template", "spec", "containers", 0, "readinessProbe"),
            "httpget", {}, "no field httpget",
        ),
        (
            ("headGroupSpec", "template", "spec", "containers", 0, "resources"),
            "limits", {"cpu": 4}, "strings",
        ),
    ],
)  # fmt: skip
def test_a_wrong_field_is_found(
    manifests: list[dict[str, Any]], path: tuple[Any, ...], key: str, value: Any, said: str
) -> None:
    node = cluster_spec(manifests)
    for step in path:
        node = node[step]
    node[key] = value
    found = all_problems(manifests)
    assert found and said in found[0]


def test_ray_start_knows_every_parameter(manifests: list[dict[str, Any]]) -> None:
    for group in groups(manifests):
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        assert options_of("ray start " + " ".join(words))["object_store_memory"]


def test_shared_memory_holds_the_object_store(manifests: list[dict[str, Any]]) -> None:
    for group in groups(manifests):
        pod = group["template"]["spec"]
        volumes = {each["name"]: each["emptyDir"] for each in pod["volumes"]}
        mounts = pod["containers"][0]["volumeMounts"]
        (shared,) = [volumes[m["name"]] for m in mounts if m["mountPath"] == "/dev/shm"]
        assert shared["medium"] == "Memory"
        size = int(shared["sizeLimit"].removesuffix("Gi")) * 2**30
        assert size > int(group["rayStartParams"]["object-store-memory"])


def test_pods_have_no_rights_and_ray_asks_for_a_token(manifests: list[dict[str, Any]]) -> None:
    assert cluster_spec(manifests)["authOptions"] == {"mode": "token"}
    templates = [group["template"] for group in groups(manifests)]
    if "submitterPodTemplate" in manifests[0]["spec"]:
        templates.append(manifests[0]["spec"]["submitterPodTemplate"])
    for template in templates:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
    for group in groups(manifests):
        (container,) = group["template"]["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} < set(container)


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether Kubernetes' selector of labels selects a pod with `labels`."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for rule in selector.get("matchExpressions", []):
        name = rule["key"]
        wanted &= {
            "In": labels.get(name) in rule.get("values", []),
            "DoesNotExist": name not in labels,
        }[rule["operator"]]
    return wanted


def admits(documents: list[dict[str, Any]], source: dict[str, str], target: dict[str, str]) -> set:
    """Ports of `target` that a pod with labels `source` reaches; {"all"} for any."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    selected = [policy for policy in policies if matches(policy["podSelector"], target)]
    assert selected, "a pod that no policy selects is open to all"
    ports: set = set()
    for rule in (rule for policy in selected for rule in policy["ingress"]):
        if any(matches(peer["podSelector"], source) for peer in rule["from"]):
            ports |= {each["port"] for each in rule.get("ports", [])} or {"all"}
    return ports


def test_only_the_cluster_and_the_submitter_reach_the_head(
    manifests: list[dict[str, Any]],
) -> None:
    # KubeRay's own labels, and those of the templates.
    own = {"ray.io/cluster": manifests[0]["metadata"]["name"]}
    head_group, worker_group, *_ = groups(manifests)

    def labels(group: dict[str, Any], kind: str) -> dict[str, str]:
        return (
            own
            | {"ray.io/node-type": kind}
            | group["template"].get("metadata", {}).get("labels", {})
        )

    head, worker = labels(head_group, "head"), labels(worker_group, "worker")
    template = manifests[0]["spec"].get("submitterPodTemplate", {})
    submitter = template.get("metadata", {}).get("labels", {"renee-ray/submitter": "true"})
    assert "all" in admits(manifests, worker, head) & admits(manifests, head, worker)
    assert "all" in admits(manifests, worker, worker)
    assert admits(manifests, submitter, head) == {8265}
    assert admits(manifests, submitter, worker) == set()
    assert admits(manifests, {"app": "other"}, head) == set()
    assert admits(manifests, {"app": "other"}, worker) == set()
    assert admits(manifests, {"app.kubernetes.io/name": "kuberay-operator"}, head) == {8265}


def test_versions_are_those_that_ci_installs(manifests: list[dict[str, Any]]) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    version = re.search(r"^ray==([\d.]+)$", pins, re.MULTILINE)
    assert version and cluster_spec(manifests)["rayVersion"] == version[1]
    dockerfile = (ROOT / "kuberay" / "Dockerfile").read_text(encoding="utf-8")
    assert f"FROM rayproject/ray:{version[1]}-py312-gpu" in dockerfile


def test_the_entrypoint_of_the_rayjob_is_a_command_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from renee_ray.cli.submit import _check_job

    monkeypatch.chdir(ROOT)
    spec = read("kuberay/rayjob.yaml")[0]["spec"]
    python, script, *arguments = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / script).is_file()
    assert _check_job(Path(script).stem, tuple(arguments)) is None, "a recipe travels in the image"
    replicas = spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    assert f"num_workers={replicas}" in arguments
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}
