#!/usr/bin/env bash
# Generate the Python stubs core/redraft/v1 from proto/. Run by `make proto`; needs the "dev" extra.
#   scripts/proto.sh [OUT]   OUT: root under which redraft/v1/ is written; default core
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-core}"
python="${PYTHON:-.venv/bin/python}"
# protoc finds the mypy-protobuf plugin on the path.
PATH="$(dirname "$(command -v "$python")"):$PATH"
mkdir -p "$out/redraft/v1"
"$python" -m grpc_tools.protoc -I proto \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
  proto/redraft/v1/*.proto
