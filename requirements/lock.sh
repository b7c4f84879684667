#!/bin/sh
# Writes the two lock files anew from pyproject.toml: names, versions and hashes, nothing else.
# Run it with `uv` on the PATH (pip install uv) after a change of the dependencies.
set -eu
cd "$(dirname "$0")/.."
python3 - > requirements/.dev.in <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["project"]["dependencies"], *project["dependency-groups"]["dev"], sep="\n")
PY
trap 'rm -f requirements/.dev.in' EXIT
lock() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}
lock requirements/.dev.in -o requirements/dev.txt
lock pyproject.toml -c requirements/dev.txt -o requirements/runtime.txt
