"""Where settings come from: flags over environment over a YAML file over the defaults of `config.py`.

```
redraft-server --config server.yaml --grpc.port 0        # flags
REDRAFT_SERVER__GRPC__PORT=0 redraft-server              # environment: __ between group and name
```
A name that the schema does not know is refused in all three. `null` unsets an optional setting.
"""

from __future__ import annotations

import argparse
import difflib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict, SettingsError

from redraft.errors import ConfigError
from redraft_server.config import ServerConfig

PROGRAM = "redraft-server"
ENV_PREFIX = "REDRAFT_SERVER__"
_NULL = "null"

_DESCRIPTION = """\
Serve a language model over gRPC with lossless speculative decoding.

example:
  redraft-server --model.target demo
  redraft-server --model.target Qwen/Qwen3-1.7B --model.draft Qwen/Qwen3-0.6B --grpc.host 0.0.0.0

Every setting is also a key of the --config file and an environment variable:
  --grpc.port 50051    is    grpc: {port: 50051}    is    REDRAFT_SERVER__GRPC__PORT=50051
A flag wins over the environment, the environment over the file. null unsets an optional setting.
--print-config writes the settings in effect, explained, as such a file."""


class ConfigErrors(ConfigError):
    """Every problem of a configuration at once; `problems` has one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the command line asked for."""

    config: ServerConfig
    print_config: bool


class _Settings(ServerConfig, BaseSettings):
    """The schema as pydantic-settings wants it. Only the sources use it, so a `ServerConfig` reads no environment."""

    model_config = SettingsConfigDict(extra="forbid")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigErrors([f"{message} (see {PROGRAM} --help)"])


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Invocation:
    """Read every source and validate the whole.

    `environ` defaults to the process's. `--help` and `--version` print and raise SystemExit(0).

    Raises:
        ConfigErrors: with one line per problem, each naming the key, where it was set, and what to do.
    """
    environ = os.environ if environ is None else environ
    parser, cli = _build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    problems = [_unknown_flag(flag, parser) for flag in unknown if flag.startswith("-")]
    if unknown and not problems:
        problems = [f"unexpected argument {unknown[0]!r}: settings are given as --group.name value"]
    if problems:
        raise ConfigErrors(problems)
    sources = {
        "flag": _from_flags(cli, arguments),
        "environment": _from_environment(environ),
        "file": _from_file(Path(arguments.config)) if arguments.config is not None else {},
    }
    merged: dict[str, Any] = {}
    for values in reversed(sources.values()):
        merged = _merge(merged, values)
    try:
        config = ServerConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigErrors([_explain(detail, sources) for detail in error.errors()]) from None
    return Invocation(config=config, print_config=arguments.print_config)


def to_yaml(config: ServerConfig) -> str:
    """The settings in effect as a file for --config, each under its explanation."""
    lines = []
    for group_name, group in ServerConfig.model_fields.items():
        values: BaseModel = getattr(config, group_name)
        assert group.annotation is not None
        lines += [f"# {line}" for line in _wrap(group.annotation.__doc__ or "", 98)]
        lines.append(f"{group_name}:")
        dumped = values.model_dump(mode="json")
        for name, field in type(values).model_fields.items():
            lines += [f"  # {line}" for line in _wrap(field.description or "", 96)]
            lines += [f"  {line}" for line in yaml.safe_dump({name: dumped[name]}).splitlines()]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _build_parser() -> tuple[_Parser, CliSettingsSource[_Parser]]:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--config FILE] [--GROUP.NAME VALUE ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="read settings from this YAML file")
    parser.add_argument("--print-config", action="store_true", help="write the settings in effect as YAML and exit")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {metadata.version('redraft')}")
    source: CliSettingsSource[_Parser] = CliSettingsSource(
        _Settings,
        root_parser=parser,
        cli_prog_name=PROGRAM,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str=_NULL,
        cli_use_class_docs_for_groups=True,
    )
    for action in parser._actions:  # argparse offers no public way to list them
        # An unset setting's description says what happens then; "None" would only blur it.
        action.help = (action.help or "").replace(" (default: None)", "").replace(" (default: null)", "")
    return parser, source


def _from_flags(cli: CliSettingsSource[_Parser], arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        return cli(parsed_args=arguments)()
    except SettingsError as error:
        way_out = "in a list, put what has a comma or begins with a bracket between double quotes"
        raise ConfigErrors([f"flags: {error}; {way_out}"]) from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = [name for name in environ if name.upper().startswith(ENV_PREFIX)]
    groups = ServerConfig.model_fields
    problems = [
        f"{name}: no such setting{_suggest(name.upper(), list(_environment_names()))}"
        for name in names
        if name[len(ENV_PREFIX) :].lower().split("__")[0] not in groups
    ]
    if problems:
        raise ConfigErrors(problems)
    source = EnvSettingsSource(_Settings, env_prefix=ENV_PREFIX, env_nested_delimiter="__")
    # The source took os.environ on construction; only what was passed in counts.
    source.env_vars = {name.lower(): None if environ[name] == _NULL else environ[name] for name in names}
    try:
        return source()
    except SettingsError as error:
        raise ConfigErrors([f'{ENV_PREFIX}*: {error}; a list is given as JSON, such as ["email"]']) from None


def _environment_names() -> Iterator[str]:
    for path in _known_paths():
        yield ENV_PREFIX + path.replace(".", "__").upper()


def _known_paths() -> Iterator[str]:
    for group_name, group in ServerConfig.model_fields.items():
        assert isinstance(group.annotation, type)
        assert issubclass(group.annotation, BaseModel)
        for name in group.annotation.model_fields:
            yield f"{group_name}.{name}"


def _from_file(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigErrors([f"--config {path}: cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigErrors([f"--config {path}: is not valid YAML{line}"]) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigErrors([f"--config {path}: must be a mapping of groups, such as `grpc: {{port: 50051}}`"])
    # A group whose every line is commented out reads as None.
    return {str(group): {} if values is None else values for group, values in loaded.items()}


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(detail: Any, sources: Mapping[str, dict[str, Any]]) -> str:
    """One line for one of pydantic's findings."""
    location = tuple(str(part) for part in detail["loc"])
    path = ".".join(location)
    origin = _origin(location, sources)
    if detail["type"] == "extra_forbidden":
        return f"{path}: no such setting{_suggest(path, [*_known_paths(), *ServerConfig.model_fields])}{origin}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error":  # a check across settings: the message names them
        return message if not path or message.startswith(path) else f"{path}: {message}"
    message = message[0].lower() + message[1:]
    return f"{path}: {message}, not {textwrap.shorten(repr(detail['input']), 60)}{origin}"


def _origin(location: Sequence[str], sources: Mapping[str, dict[str, Any]]) -> str:
    spelled = {
        "flag": f"--{'.'.join(location)}",
        "environment": ENV_PREFIX + "__".join(location).upper(),
        "file": "the --config file",
    }
    for source, values in sources.items():
        node: Any = values
        for part in location:
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            return f" (set by {spelled[source]})"
    return ""


_ABSENT = object()


def _unknown_flag(flag: str, parser: argparse.ArgumentParser) -> str:
    name = flag.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    return f"{name}: no such flag{_suggest(name, known)}"


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; {PROGRAM} --help lists all"


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width)
