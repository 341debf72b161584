"""Keeps the chart in step with what it describes: its schema with `ServerConfig`, its README with values.yaml.

python scripts/chart_docs.py             # rewrite helm/redraft/values.schema.json and README.md

The schema is written by hand except for `server.config`, which is the server's own schema, less the settings that
the chart gives itself, and for `required`: the keys of values.yaml. They are missing only from values that are kept
from an older chart (`helm upgrade --reuse-values`), which the templates would stumble over.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from redraft_server.config import ServerConfig

CHART = Path(__file__).parent.parent / "helm" / "redraft"
SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"

OWN_SETTINGS = {
    "model.cache_dir",
    "grpc.host",
    "grpc.port",
    "grpc.tls_cert",
    "grpc.tls_key",
    "grpc.tls_client_ca",
    "auth.keys_file",
    "metrics.enabled",
    "metrics.host",
    "metrics.port",
    "traffic_log.url",
    "traffic_log.spool_dir",
    "registry.url",
    "drain.delay_s",
    "drain.grace_s",
}
"""Set from other values of the chart, since Services, probes, volumes and the grace period depend on them."""

_SECRET_SETTINGS = {"traffic_log.url", "registry.url"}
"""Of these, the ones that may come from a Secret."""

_BEGIN, _END = "<!-- values: made by scripts/chart_docs.py from values.yaml -->\n", "<!-- end of values -->"


def render_schema(text: str) -> str:
    """values.schema.json with the generated parts made anew."""
    schema = json.loads(text)
    server = schema["properties"]["server"]["properties"]
    groups, names = _config_groups()
    server["config"] = {"type": "object", "additionalProperties": False, "properties": groups}
    key = {"$ref": "#/definitions/secretKey"}
    server["configFromSecret"]["properties"] = dict.fromkeys(sorted(names | _SECRET_SETTINGS), key)
    _require(schema, yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _require(schema: dict[str, Any], values: dict[str, Any]) -> None:
    schema["required"] = sorted(values)
    for name, value in values.items():
        part = schema["properties"][name]
        # Groups and settings of the server may all be left out
        if isinstance(value, dict) and value and "properties" in part and name != "config":
            _require(part, value)


def _config_groups() -> tuple[dict[str, Any], set[str]]:
    """The server's settings as JSON schema by group, and the dotted names of all of them."""
    schema = ServerConfig.model_json_schema()
    groups: dict[str, Any] = {}
    names: set[str] = set()
    for group, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        settings = {
            name: _setting(value)
            for name, value in definition["properties"].items()
            if f"{group}.{name}" not in OWN_SETTINGS
        }
        if settings:
            groups[group] = {"type": "object", "additionalProperties": False, "properties": settings}
            names |= {f"{group}.{name}" for name in settings}
    return groups, names


def _setting(schema: dict[str, Any]) -> dict[str, Any]:
    """One setting. To Helm `null` means "remove this key", so the string unsets a setting, as for the server."""
    kept = {key: value for key, value in schema.items() if key not in ("default", "title", "format")}
    if "anyOf" in kept:
        kept["anyOf"] = [{"const": "null"} if part == {"type": "null"} else _setting(part) for part in kept["anyOf"]]
    if "description" in kept:
        kept["description"] = " ".join(kept["description"].split())
    return kept


def render_readme(text: str, values: str) -> str:
    """README.md with the table of values made anew."""
    head, rest = text.split(_BEGIN)
    _, tail = rest.split(_END)
    rows = [
        f"| `{name}` | {_default(default)} | {_escaped(meaning)} |"
        for name, default, meaning in documented_values(values)
    ]
    return (
        f"{head}{_BEGIN}\n| value | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + f"\n\n{_END}{tail}"
    )


def _default(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) <= 60 else "see values.yaml"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def documented_values(text: str) -> list[tuple[str, Any, str]]:
    """(dotted name, default, meaning) of each key of values.yaml that has a comment `# -- meaning` above it."""
    values = yaml.safe_load(text)
    found: list[tuple[str, Any, str]] = []
    parents: list[tuple[int, str]] = []
    meaning = ""
    for line in text.splitlines():
        comment = re.match(r"\s*# -- (.*)", line)
        key = re.match(r"(\s*)([A-Za-z][A-Za-z0-9_]*):", line)
        if comment:
            meaning = comment[1]
        elif key:
            indent = len(key[1])
            parents = [(depth, name) for depth, name in parents if depth < indent] + [(indent, key[2])]
            if meaning:
                path = [name for _, name in parents]
                found.append((".".join(path), _lookup(values, path), meaning))
                meaning = ""
    return found


def _lookup(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def main() -> None:
    SCHEMA.write_text(render_schema(SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    README.write_text(render_readme(README.read_text(encoding="utf-8"), values), encoding="utf-8")


if __name__ == "__main__":
    main()
