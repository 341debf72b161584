"""Renders docs/configuration.md from `ServerConfig`, so that the page cannot differ from the schema.

python scripts/config_docs.py            # rewrite the page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from redraft_server.config import ServerConfig

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

_HEAD = """\
# Configuration of `redraft-server`

<!-- Made by scripts/config_docs.py from server/redraft_server/config.py; edit there. -->

Every setting can be given in three ways. A flag wins over the environment, the environment over the file, the file
over the default:

| | how |
| --- | --- |
| flag | `--grpc.port 50051` |
| environment | `REDRAFT_SERVER__GRPC__PORT=50051` |
| file | `--config server.yaml` with `grpc: {port: 50051}` |

`null` unsets an optional setting. A name that is not below is refused, in all three. `redraft-server --print-config`
writes the settings in effect as such a file, `redraft-server --help` explains them in the terminal. Wrong settings end
the program with status 2 and one line per problem; a model that cannot be served ends it with status 3.

Two variables are not settings: `REDRAFT_CACHE_DIR` is where converted models are kept when `model.cache_dir` is not
set, and `OMP_NUM_THREADS` is the number of CPU threads when `model.threads` is not set.
"""


def render() -> str:
    """The whole page."""
    schema = ServerConfig.model_json_schema()
    defaults = ServerConfig()
    parts = [_HEAD]
    for name in ServerConfig.model_fields:
        group: BaseModel = getattr(defaults, name)
        properties = schema["$defs"][type(group).__name__]["properties"]
        description = " ".join((type(group).__doc__ or "").split())
        parts.append(f"## `{name}`\n\n{description}\n")
        values = group.model_dump(mode="json")
        rows = [_row(name, key, properties[key], values[key]) for key in type(group).model_fields]
        parts.append("\n".join(["| setting | value | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _row(group: str, key: str, schema: dict[str, Any], default: Any) -> str:
    meaning = " ".join(schema.get("description", "").split())
    cells = (f"`{group}.{key}`", _kind(schema), f"`{json.dumps(default)}`", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(schema: dict[str, Any]) -> str:
    """A setting's values in words, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(_kind(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("format") == "path":
        return "path"
    if schema["type"] == "null":
        return "`null`"
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}"
    kind, low, high = schema["type"], schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {low:,.15g} to {high:,.15g}"
    if low is not None:
        return f"{kind}, at least {low:,.15g}"
    if "exclusiveMinimum" in schema:
        return f"{kind}, more than {schema['exclusiveMinimum']:,.15g}"
    return str(kind)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
