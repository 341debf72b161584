"""Validates manifests strictly against the schemas of Kubernetes and of the Prometheus operator.

Run by tests/ops/test_schemas.py with the Python of build/tools/checks: reads
{"versions": ["1.29", ...], "manifests": [...]} on stdin, writes {"validated": N, "problems": [...]} on stdout.

In one process, with each schema read once: the command line of kubernetes-validate reads megabytes for each manifest.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import typing
from functools import cache
from pathlib import Path
from typing import Any

SCHEMAS = "kubernetes_validate/kubernetes-json-schema"


def main() -> None:
    request = json.load(sys.stdin)
    problems: list[str] = []
    validated = 0
    for manifest in request["manifests"]:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            found = {"": _custom(manifest)}
        else:
            found = {f" for {version}": _native(manifest, version) for version in request["versions"]}
        validated += len(found)
        problems += [f"{name}{where}: {problem}" for where, several in found.items() for problem in several]
    json.dump({"validated": validated, "problems": problems}, sys.stdout)


def _native(manifest: dict[str, Any], version: str) -> list[str]:
    # apps/v1 -> apps-v1, networking.k8s.io/v1 -> networking-v1, as the files are named
    api_version = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", manifest["apiVersion"])
    try:
        validator = _validator(version, f"{manifest['kind'].lower()}-{api_version}")
    except FileNotFoundError:
        return [f"{manifest['apiVersion']} {manifest['kind']} does not exist"]
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]


@cache
def _validator(version: str, name: str) -> Any:
    from jsonschema.validators import Draft202012Validator
    from referencing import Resource

    folder = _folder(version)
    schema = json.loads((folder / f"{name}.json").read_text())
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(folder))


@cache
def _definitions(folder: Path) -> Any:
    from referencing import Registry, Resource

    return Resource.from_contents(json.loads((folder / "_definitions.json").read_text())) @ Registry()


@cache
def _folder(version: str) -> Path:
    root = next(Path(part) / SCHEMAS for part in sys.path if (Path(part) / SCHEMAS).is_dir())
    (folder,) = [
        path for path in root.iterdir() if re.fullmatch(rf"v{re.escape(version)}(\.\d+)?-local-strict", path.name)
    ]
    return folder


def _custom(manifest: dict[str, Any]) -> list[str]:
    """Objects of the Prometheus operator: types by its models, and unknown fields, which the models would let pass."""
    from pydantic import ValidationError

    model = getattr(importlib.import_module("cloudcoil.models.prometheus_operator.v1"), manifest["kind"])
    try:
        model.model_validate(manifest)
    except ValidationError as error:
        return [f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
    return _unknown(manifest["spec"], model.model_fields["spec"].annotation, "spec")


def _unknown(value: Any, annotation: Any, path: str) -> list[str]:
    if isinstance(value, list):
        return [found for item in value for found in _unknown(item, annotation, f"{path}[]")]
    model = _model(annotation)
    if not isinstance(value, dict) or model is None:
        return []
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    found = [f"{path}.{key}: unknown field" for key in value.keys() - fields.keys()]
    for key in value.keys() & fields.keys():
        found += _unknown(value[key], fields[key].annotation, f"{path}.{key}")
    return found


def _model(annotation: Any) -> Any:
    """The pydantic model inside `Annotated[Model | None, ...]`, `list[Model]` and the like."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((model for part in typing.get_args(annotation) if (model := _model(part)) is not None), None)


if __name__ == "__main__":
    main()
