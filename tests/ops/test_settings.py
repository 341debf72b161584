"""What the chart tells the programs, by the programs' own parsers: a wrong name fails here, not in a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from redraft_client.cli import app as client_app
from redraft_server.settings import load_config
from redraft_training.__main__ import app as trainer_app
from redraft_training.settings import load_settings
from tests.ops.charts import Helm, Manifest, environment, one, pod_specs
from tests.ops.values_sets import BUCKETS, VALUES

SERVER = "REDRAFT_SERVER__"


def server_environment(manifests: list[Manifest], secrets: dict[str, str]) -> dict[str, str]:
    """The server's settings; a value from a Secret is looked up by key."""
    spec = one(manifests, "Deployment", _name(manifests))["spec"]["template"]["spec"]
    found = {}
    for name, value in environment(spec).items():
        if name.startswith(SERVER):
            found[name] = value if isinstance(value, str) else secrets[value["secretKeyRef"]["key"]]
    return found


def _name(manifests: list[Manifest]) -> str:
    servers = [m for m in manifests if m["kind"] == "Deployment"]
    return str(next(m["metadata"]["name"] for m in servers if not m["metadata"]["name"].endswith("-trainer")))


@pytest.mark.parametrize("name", VALUES)
def test_server_accepts_every_setting(helm4: Helm, name: str) -> None:
    manifests = helm4.render(VALUES[name])
    config = load_config([], server_environment(manifests, {"path": "/weights/draft"})).config
    spec = one(manifests, "Deployment", _name(manifests))["spec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}
    assert ports == {"grpc": config.grpc.port, "metrics": config.metrics.port}
    assert config.grpc.host == config.metrics.host == "0.0.0.0"
    assert spec["containers"][0]["args"] == ["server"]
    # Whatever is a path is mounted
    mounted = [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]]
    paths = [config.grpc.tls_cert, config.grpc.tls_key, config.grpc.tls_client_ca, config.auth.keys_file]
    paths += [Path(url) for url in (config.traffic_log.url, config.registry.url) if url and url.startswith("/")]
    paths += [config.traffic_log.spool_dir]
    for path in paths:
        assert path is None or any(path.is_relative_to(mount) for mount in mounted), path


def test_every_setting_of_the_values_arrives(helm4: Helm) -> None:
    """Also integers that Helm holds as floating point, and `null`."""
    config = load_config([], server_environment(helm4.render(VALUES["another model, many settings"]), {})).config
    wanted: dict[str, Any] = VALUES["another model, many settings"]["server"]["config"]
    for group, settings in wanted.items():
        for name, value in settings.items():
            assert getattr(getattr(config, group), name) == (None if value == "null" else value), name
    assert config.logging.format == "json"


def test_setting_from_a_secret_arrives(helm4: Helm) -> None:
    config = load_config([], server_environment(helm4.render(VALUES["extras"]), {"path": "/weights/draft"})).config
    assert config.model.draft == "/weights/draft"


def test_large_integers_keep_their_digits(helm4: Helm, helm3: Helm) -> None:
    for helm in (helm4, helm3):
        text = helm.run("template", "r", str(_chart()), "--set", "server.config.engine.kv_cache_tokens=123456789")
        assert 'value: "123456789"' in text


def _chart() -> Path:
    from tests.ops.charts import CHART

    return CHART


def parse(app: typer.Typer, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The subcommand and its parameters. Raises click's error for what the program would refuse."""
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    return arguments[0], command.make_context(arguments[0], list(arguments[1:])).params


@pytest.mark.parametrize(
    "name", ["CronJob on object storage", "trainer loop on new claims", "run now on existing claims"]
)
def test_trainer_accepts_its_arguments(helm4: Helm, name: str) -> None:
    manifests = helm4.render(VALUES[name])
    trainers = [spec for spec in pod_specs(manifests) if spec["containers"][0]["name"] == "trainer"]
    assert len(trainers) == 1
    container = trainers[0]["containers"][0]
    assert container["args"][0] == "train"
    subcommand, given = parse(trainer_app, container["args"][1:])
    assert subcommand == ("loop" if "loop" in name else "run")
    settings = load_settings(
        None,
        given["set_"] or [],
        **{key: given[key] for key in ("target", "traffic", "registry", "work_dir")},
    )
    server = load_config([], server_environment(manifests, {})).config
    # The two must mean the same log, registry and target
    assert (settings.traffic, settings.registry, settings.target) == (
        server.traffic_log.url,
        server.registry.url,
        server.model.target,
    )
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts[str(settings.work_dir)] is False
    if str(settings.traffic).startswith("/"):
        assert mounts[str(settings.traffic)] is True
        assert mounts[str(settings.registry)] is False


@pytest.mark.parametrize("name", ["retention on object storage", "retention on a claim"])
def test_retention_accepts_its_arguments_and_is_the_only_one(helm4: Helm, name: str) -> None:
    manifests = helm4.render(VALUES[name])
    cron = one(manifests, "CronJob")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    spec = cron["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["args"][:3] == ["train", "traffic", "expire"]
    traffic: Any = typer.main.get_command(trainer_app).commands["traffic"]  # type: ignore[attr-defined]
    expire = traffic.commands["expire"]
    given = expire.make_context("expire", list(container["args"][3:])).params
    server = load_config([], server_environment(manifests, {})).config
    assert given == {"log": server.traffic_log.url, "days": 7.5 if "object" in name else 30.0}
    assert server.traffic_log.retention_days is None
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == ({"/tmp": False} if "object" in name else {"/tmp": False, "/var/lib/redraft/traffic": False})
    assert spec["serviceAccountName"] == "r-redraft"
    # Only what it needs: no token of the model hub
    assert {"HF_TOKEN", "HF_HOME"}.isdisjoint(environment(spec))
    assert ("AWS_SECRET_ACCESS_KEY" in environment(spec)) == ("object" in name)
    rules = cron["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[1]["onExitCodes"]["containerName"] == container["name"]


def test_patterns_and_tenants_arrive_as_they_are(helm4: Helm) -> None:
    config = load_config([], server_environment(helm4.render(VALUES["retention on object storage"]), {})).config
    assert config.traffic_log.redact == ("email", "card")
    assert config.traffic_log.redact_patterns == (r"(?i)project <x>, \d{2,4}",)
    assert config.traffic_log.exclude_tenants == ("acme", "")


def test_further_arguments_reach_the_trainer(helm4: Helm) -> None:
    spec = one(helm4.render(VALUES["CronJob on object storage"]), "CronJob")["spec"]["jobTemplate"]["spec"]
    args = spec["template"]["spec"]["containers"][0]["args"]
    _, given = parse(trainer_app, args[1:])
    assert load_settings(None, given["set_"], traffic="t", registry="r", work_dir=Path("w")).distill.epochs == 2


def test_retraining_job_treats_each_exit_code_right(helm4: Helm) -> None:
    """0, 3 and 4 are done, 2 is not tried again, 1 is; tests/ops/test_image.py runs the image's part of it."""
    from redraft_training.commands.common import Exit

    cron = one(helm4.render(VALUES["CronJob on object storage"]), "CronJob")["spec"]
    job = cron["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    done = environment(pod)["REDRAFT_DONE_CODES"].split()
    assert {int(code) for code in done} == {Exit.REFUSED, Exit.NOT_ENOUGH_DATA}
    evicted, refused = job["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (evicted["action"], refused["action"]) == ("Ignore", "FailJob")
    assert refused["onExitCodes"]["values"] == [Exit.USAGE]
    assert refused["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 2
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["timeZone"] == "Europe/Zurich"


def test_a_run_now_is_another_job_when_it_changes(helm4: Helm) -> None:
    """A Job cannot be changed in place: `helm upgrade` would fail."""

    def job(word: str, image: str) -> str:
        values = {"storage": BUCKETS, "retraining": {"runNow": word}, "image": {"tag": image}}
        return str(one(helm4.render(values), "Job")["metadata"]["name"])

    names = {job("a", "1"), job("b", "1"), job("a", "2")}
    assert len(names) == 3
    assert job("a", "1") in names


@pytest.mark.parametrize("name", ["default", "TLS", "mutual TLS", "digest, names and accounts"])
def test_helm_test_calls_the_client_as_it_is(
    helm4: Helm, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = helm4.render(VALUES[name])
    pod = one(manifests, "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    container = pod["spec"]["containers"][0]
    assert container["args"][0] == "client"
    # The client wants the certificates to exist: here below a folder of ours
    arguments = [str(tmp_path / text[1:]) if text.startswith("/etc/") else text for text in container["args"][1:]]
    for path in map(Path, arguments):
        if path.is_relative_to(tmp_path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    subcommand, given = parse(client_app, arguments)
    assert (subcommand, given["max_new_tokens"], given["chat"]) == ("generate", 8, False)
    service = one(manifests, "Service", f"{_name(manifests)}-headless")
    assert given["address"] == f"dns:///{service['metadata']['name']}.ns:{service['spec']['ports'][0]['port']}"
    assert (given["tls_ca"] is not None) == ("TLS" in name)
    assert (given["tls_cert"] is not None) == (name == "mutual TLS")
