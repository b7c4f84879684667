# make demo    the main job on this machine alone: an S3 store, a push, a pull, a table of figures
# make test    everything that judges the code: style, types, layers, tests against real servers
# make check   the same without servers, in seconds
# make bench   against the tools that a person would pick, in the same run
# make docs    the pages that are made from the code
#
# Each does its own set-up. Nothing is installed outside .venv, but for Debian packages when root.

PY := .venv/bin/python
VENV := .venv/.installed
# Two more than there are cores: many tests wait, for retries, limits and servers.
WORKERS ?= $(shell expr $$(nproc) + 2)

.PHONY: demo test check bench docs lint clean

demo: $(VENV)
	$(PY) -m demo.demo

test: $(VENV) lint
	sh tools/setup.sh packages test
	@# As an installation does: hundreds of tests start the command anew, some where nothing is allowed to be cached.
	$(PY) -m compileall -q src tests
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

check: $(VENV) lint
	$(PY) -m pytest -m unit -n $(WORKERS) tests/unit

lint: $(VENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: $(VENV)
	sh tools/setup.sh packages bench
	$(PY) -m bench.bench

docs: $(VENV)
	$(PY) -m tools.pages

clean:
	rm -rf .venv .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info

$(VENV): requirements/dev.txt pyproject.toml tools/setup.sh
	sh tools/setup.sh venv
