"""Settings: priority of the sources, and errors that name the key and the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from redraft_server.__main__ import main
from redraft_server.config import ServerConfig
from redraft_server.settings import ConfigErrors, load_config, to_yaml


def problems(argv: list[str], environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigErrors) as caught:
        load_config(argv, environ or {})
    return caught.value.problems


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text("grpc: {port: 1001, host: 0.0.0.0}\nengine:\n  prefix_cache: false\nlogging:\n")
    return path


def test_sources_by_priority(config_file: Path) -> None:
    environ = {"REDRAFT_SERVER__GRPC__PORT": "1002", "REDRAFT_SERVER__LIMITS__MAX_N": "3", "OTHER": "x"}
    argv = ["--config", str(config_file), "--grpc.port", "1003"]
    assert load_config([], {}).config.grpc.port == 50051
    assert load_config(argv[:2], {}).config.grpc.port == 1001
    assert load_config(argv[:2], environ).config.grpc.port == 1002
    config = load_config(argv, environ).config
    assert config.grpc.port == 1003
    assert config.grpc.host == "0.0.0.0"
    assert config.limits.max_n == 3
    assert config.engine.prefix_cache is False


def test_a_config_in_code_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_SERVER__GRPC__PORT", "7")
    assert ServerConfig().grpc.port == 50051
    assert load_config([]).config.grpc.port == 7


def test_null_unsets(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("traffic_log: {url: /somewhere, retention_days: 3}\n")
    argv = ["--config", str(path), "--traffic_log.url", "null"]
    log = load_config(argv, {"REDRAFT_SERVER__TRAFFIC_LOG__RETENTION_DAYS": "null"}).config.traffic_log
    assert (log.url, log.retention_days) == (None, None)


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--grpc.prot", "1"], {}, ["--grpc.prot", "did you mean --grpc.port"]),
        (["--grpc.prot=1"], {}, ["--grpc.prot:", "did you mean --grpc.port"]),
        (["--grpc.po", "1"], {}, ["--grpc.po"]),  # no abbreviations
        (["serve"], {}, ["'serve'"]),
        (["--grpc.port"], {}, ["--grpc.port", "expected one argument"]),
        (["--grpc.port", "99999"], {}, ["grpc.port", "65535", "'99999'", "--grpc.port"]),
        (["--model.dtype", "int3"], {}, ["model.dtype", "bfloat16"]),
        (["--model.weights", "int3"], {}, ["model.weights", "int4"]),
        (["--model.weights", "int4", "--model.dtype", "bfloat16"], {}, ["model.weights", "model.dtype"]),
        (["--model.weights", "int8", "--model.device", "cuda"], {}, ["model.weights", "model.device"]),
        (["--model.weights", "int8", "--model.tensor_parallel", "2"], {}, ["model.weights", "one process"]),
        (["--limits.request_timeout_s", "nan"], {}, ["limits.request_timeout_s", "finite"]),
        (
            [],
            {"REDRAFT_SERVER__GRPC__PROT": "1"},
            ["grpc.prot", "did you mean grpc.port", "REDRAFT_SERVER__GRPC__PROT"],
        ),
        ([], {"REDRAFT_SERVER__GRP__PORT": "1"}, ["REDRAFT_SERVER__GRP__PORT", "did you mean", "__GRPC__PORT"]),
        ([], {"REDRAFT_SERVER__GRPC": "abc"}, ["grpc"]),
        ([], {"REDRAFT_SERVER__GRPC__PORT": ""}, ["grpc.port", "integer", "REDRAFT_SERVER__GRPC__PORT"]),
        ([], {"REDRAFT_SERVER__GRPC__PORT__X": "1"}, ["grpc.port"]),
        (["--config", "no/such.yaml"], {}, ["no/such.yaml", "No such file"]),
        (["--grpc.tls_cert", "c.pem"], {}, ["tls_cert", "tls_key"]),
        (["--grpc.tls_client_ca", "c.pem"], {}, ["tls_client_ca", "tls_cert"]),
        (["--speculation.proposer", "draft_model"], {}, ["draft_model", "model.draft"]),
        (["--model.draft", "d", "--speculation.proposer", "none"], {}, ["model.draft", "speculation.proposer"]),
        (["--speculation.ngram_min", "5"], {}, ["ngram_min", "ngram_max"]),
        (["--engine.max_model_len", "99999"], {}, ["engine.max_model_len", "kv_cache_tokens"]),
    ],
)
def test_a_problem_names_its_key(argv: list[str], environ: dict[str, str], words: list[str]) -> None:
    (problem,) = problems(argv, environ)
    assert "\n" not in problem
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("grpc: {prot: 1}", ["grpc.prot", "did you mean grpc.port", "--config file"]),
        ("grcp: {port: 1}", ["grcp", "did you mean grpc"]),
        ("grpc: 5", ["grpc"]),
        ("- grpc", ["mapping"]),
        ("a: [", ["not valid YAML, line 1"]),
        ("grpc: {host: \x01}", ["not valid YAML"]),
    ],
)
def test_a_problem_in_the_file_names_its_key(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(content)
    (problem,) = problems(["--config", str(path)])
    for word in words:
        assert word in problem


def test_every_problem_is_reported() -> None:
    found = problems(["--grpc.port", "-1", "--model.device", "tpu"], {"REDRAFT_SERVER__LIMITS__MAX_N": "0"})
    assert len(found) == 3


def test_giving_a_draft_chooses_the_draft_proposer() -> None:
    assert load_config([], {}).config.speculation.proposer == "ngram"
    config = load_config(["--model.draft", "d", "--speculation.num_speculative_tokens", "6"], {}).config
    assert config.speculation.proposer == "draft_model"
    assert config.speculation.num_speculative_tokens == 6
    explicit = ["--model.draft", "d", "--speculation.proposer", "ngram+draft_model"]
    assert load_config(explicit, {}).config.speculation.proposer == "ngram+draft_model"


def test_printed_config_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "--model.draft", "d", "--grpc.port", "7", "--model.cache_dir", "c"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    config = load_config(["--config", str(path)], {}).config
    assert config == load_config(["--model.draft", "d", "--grpc.port", "7", "--model.cache_dir", "c"], {}).config
    assert to_yaml(config) == path.read_text()


def test_every_setting_is_explained() -> None:
    for group in ServerConfig.model_fields.values():
        assert group.annotation is not None
        assert group.annotation.__doc__
        for name, setting in group.annotation.model_fields.items():
            assert setting.description, name
    written = to_yaml(ServerConfig())
    assert yaml.safe_load(written) == ServerConfig().model_dump(mode="json")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("example:", "REDRAFT_SERVER__GRPC__PORT", "--model.target", "--print-config", "traffic_log"):
        assert word in text
    assert "default: None" not in text
    assert text.index("example:") < text.index("--config FILE ")


def test_a_bad_config_ends_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--grpc.port", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("redraft-server: grpc.port: ")
    assert captured.err.count("\n") == 1


def test_reading_settings_imports_no_torch() -> None:
    code = (
        "import sys; from redraft_server.__main__ import main; "
        "main(['--print-config']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_giving_a_registry_chooses_the_draft_proposer_and_needs_no_draft() -> None:
    config = load_config(["--registry.url", "drafts"], {}).config
    assert (config.speculation.proposer, config.model.draft) == ("draft_model", None)
    (problem,) = problems(["--registry.url", "drafts", "--speculation.proposer", "ngram"])
    assert "registry.url" in problem
    (problem,) = problems(["--speculation.proposer", "draft_model"])
    assert "registry.url" in problem
    (problem,) = problems(["--rollout.max_resident_drafts", "1"])
    assert "rollout.max_resident_drafts" in problem
