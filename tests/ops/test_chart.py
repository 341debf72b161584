"""The chart: it renders what it says, the same with Helm 4 and 3, and refuses what cannot work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from redraft_server.config import TrafficLogConfig
from scripts.chart_docs import CHART, OWN_SETTINGS, README, SCHEMA, documented_values, render_readme, render_schema
from tests.ops.charts import Helm, HelmFailed, environment, kinds, one, pod_specs
from tests.ops.values_sets import BUCKETS, REFUSED, VALUES

VALUES_TEXT = (CHART / "values.yaml").read_text()


@pytest.mark.parametrize("name", VALUES)
def test_lints(helm: Helm, name: str) -> None:
    helm.lint(VALUES[name])


@pytest.mark.parametrize("name", VALUES)
def test_renders_the_same_twice(helm4: Helm, name: str) -> None:
    """Helm 3 renders the same as Helm 4: tests/ops/test_schemas.py."""
    assert helm4.template(VALUES[name]) == helm4.fresh_template(VALUES[name])


@pytest.mark.parametrize("why", REFUSED)
def test_refuses(helm: Helm, why: str) -> None:
    values, message = REFUSED[why]
    with pytest.raises(HelmFailed) as refusal:
        helm.template(values)
    assert message in str(refusal.value)


def test_helm_installs_without_a_cluster(helm4: Helm) -> None:
    """The notes name commands for objects that exist."""
    values = {"storage": BUCKETS, "retraining": {"cron": {"enabled": True}}}
    text = helm4.run("install", "r", str(CHART), "--dry-run=client", "--values", helm4.values_file(values))
    notes = text.partition("NOTES:")[2]
    assert len(re.findall(r"^  (kubectl|helm) ", notes, re.M)) == 4
    assert "deployment/r-redraft" in notes
    assert "--from=cronjob/r-redraft-retrain" in notes
    assert "dns:///r-redraft-headless.default:50051" in notes


@pytest.mark.parametrize("name", VALUES)
def test_every_pod_is_locked_down(helm4: Helm, name: str) -> None:
    for spec in pod_specs(helm4.render(VALUES[name])):
        environment(spec)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_names_are_unique_and_valid(helm4: Helm) -> None:
    long = "a-release-with-a-name-that-is-quite-long-already"
    values: dict[str, Any] = {"fullnameOverride": "a" * 40, "storage": {}, "retraining": {"runNow": "x"}}
    values["storage"] = {key: {"type": "newClaim"} for key in ("modelCache", "trafficLog", "registry", "work")}
    manifests = helm4.render(values, "--set", "retraining.cron.enabled=true")
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    # A CronJob adds 11 characters to the names of its Jobs
    assert all(len(name) <= (52 if kind == "CronJob" else 63) for kind, name in names)
    assert long[:40] in helm4.run("template", long, str(CHART))


def test_drain_fits_into_the_grace_period(helm4: Helm) -> None:
    drain = {"preStopSeconds": 7, "delaySeconds": 3, "graceSeconds": 100, "marginSeconds": 20}
    spec = one(helm4.render({"server": {"drain": drain}}), "Deployment")["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == 130
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    values = environment(spec)
    assert (values["REDRAFT_SERVER__DRAIN__DELAY_S"], values["REDRAFT_SERVER__DRAIN__GRACE_S"]) == ("3", "100")


def test_probes_ask_what_answers(helm4: Helm) -> None:
    """gRPC health in plain text; under TLS the kubelet cannot ask it, and /readyz says the same."""
    plain = pod_specs(helm4.render({}))[0]["containers"][0]
    secure = pod_specs(helm4.render(VALUES["mutual TLS"]))[0]["containers"][0]
    assert plain["readinessProbe"]["grpc"] == {"port": 50051, "service": "redraft.v1.GenerationService"}
    assert secure["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    for container in (plain, secure):
        assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
        startup = container["startupProbe"]
        assert startup["failureThreshold"] * startup["periodSeconds"] == 900


def test_headless_service_reaches_every_server(helm4: Helm) -> None:
    manifests = helm4.render({"server": {"replicas": 2}})
    service = one(manifests, "Service", "r-redraft-headless")["spec"]
    pod = one(manifests, "Deployment")["spec"]["template"]
    assert service["clusterIP"] == "None"
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    named = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    # A headless name resolves to the Pods: no port is translated
    assert all(named[port["targetPort"]] == port["port"] for port in service["ports"])


def test_budget_only_where_a_server_can_be_spared(helm4: Helm) -> None:
    assert "PodDisruptionBudget" not in kinds(helm4.render({}))
    assert "PodDisruptionBudget" in kinds(helm4.render({"server": {"replicas": 2}}))


def test_autoscaling_owns_the_number_of_servers(helm4: Helm) -> None:
    manifests = helm4.render(VALUES["autoscaling"])
    assert "replicas" not in one(manifests, "Deployment")["spec"]
    scaler = one(manifests, "HorizontalPodAutoscaler")["spec"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "redraft_requests_waiting"
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)


@pytest.mark.parametrize(
    ("values", "spool_bytes"),
    [
        ({"storage": BUCKETS}, TrafficLogConfig().spool_bytes),
        ({"storage": BUCKETS, "server": {"config": {"traffic_log": {"spool_bytes": 2**33}}}}, 2**33),
        (
            {"server": {"configFromSecret": {"traffic_log.url": {"name": "s", "key": "k"}}}},
            TrafficLogConfig().spool_bytes,
        ),
        ({"storage": {"trafficLog": {"type": "newClaim"}}}, None),
        ({}, None),
    ],
)
def test_spool_has_a_volume_that_it_cannot_overflow(
    helm4: Helm, values: dict[str, Any], spool_bytes: int | None
) -> None:
    """Beyond the limit of an emptyDir, the Pod is evicted."""
    spec = one(helm4.render(values), "Deployment")["spec"]["template"]["spec"]
    limits = [volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "spool"]
    mounts = [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "spool"]
    assert [int(limit) - 2**26 for limit in limits] == ([] if spool_bytes is None else [spool_bytes])
    directory = environment(spec).get("REDRAFT_SERVER__TRAFFIC_LOG__SPOOL_DIR")
    assert mounts == ([] if directory is None else [directory])
    assert (directory is None) == (spool_bytes is None)


def test_gpu_is_a_limit_beside_the_others(helm4: Helm) -> None:
    values = {
        "server": {"gpu": {"count": 2, "resourceName": "amd.com/gpu"}, "resources": {"limits": {"memory": "8Gi"}}}
    }
    container = pod_specs(helm4.render(values))[0]["containers"][0]
    assert container["resources"] == {"limits": {"memory": "8Gi", "amd.com/gpu": "2"}}


def test_network_policy_lets_in_who_is_listed(helm4: Helm) -> None:
    manifests = helm4.render(VALUES["network policy"])
    server = one(manifests, "NetworkPolicy", "r-redraft")["spec"]
    assert server["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": "chat"}}}]
    assert one(manifests, "NetworkPolicy", "r-redraft-trainer")["spec"]["ingress"] == []
    for policy in (m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"):
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 443}
    selected = server["podSelector"]["matchLabels"].items()
    assert selected <= one(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"].items()


def test_values_are_documented_and_the_page_is_current() -> None:
    assert render_readme(README.read_text(), VALUES_TEXT) == README.read_text(), "run: python -m scripts.chart_docs"
    documented = {name for name, _, _ in documented_values(VALUES_TEXT)}
    assert set(_leaves(yaml.safe_load(VALUES_TEXT), documented)) <= documented


def _leaves(values: Any, documented: set[str], path: str = "") -> list[str]:
    """Dotted names; a mapping that is documented as a whole, with nothing inside, is one."""
    whole = path in documented and not any(name.startswith(f"{path}.") for name in documented)
    if whole or not isinstance(values, dict) or not values:
        return [path]
    return [leaf for key, value in values.items() for leaf in _leaves(value, documented, f"{path}.{key}".lstrip("."))]


def test_schema_is_current_and_closed() -> None:
    assert render_schema(SCHEMA.read_text()) == SCHEMA.read_text(), "run: python -m scripts.chart_docs"
    free = {"global", "affinity", "podSecurityContext", "securityContext", "valueFrom"}

    def check(schema: Any, name: str) -> None:
        if not isinstance(schema, dict):
            return
        if schema.get("type") == "object" and name not in free:
            assert "additionalProperties" in schema, f"{name} takes anything"
        for key, part in schema.get("properties", {}).items():
            check(part, key)

    check(json.loads(SCHEMA.read_text()), "")


def test_own_settings_exist() -> None:
    from redraft_server.config import ServerConfig

    for setting in OWN_SETTINGS:
        group, _, name = setting.partition(".")
        assert name in type(getattr(ServerConfig(), group)).model_fields, setting


def test_files_are_small() -> None:
    for path in Path(CHART, "templates").rglob("*"):
        assert path.is_dir() or len(path.read_text().splitlines()) < 200, path
