# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first when it
# is missing or older than what it is made from.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test tools lint bench soak container clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## the whole job on an embedded Hub: push, merge, verify, pull request
	@$(BIN)/merge-adapter demo $(ARGS)

# The tests of the bot's page want a browser, some of the Action's Git LFS; without them they are skipped with that
# reason.
tools:
	@for tool in chromium git-lfs; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	  [ -z "$$missing" ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
	  || { apt-get update -qq && apt-get install -qq --yes --no-install-recommends $$missing; } >/dev/null || true

test: $(STAMP) lint tools  ## lint, types, every test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

bench: $(STAMP)  ## timings and memory, into docs/performance.md
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(STAMP)  ## kill the bot at random moments over 100 jobs, and count the pull requests (half an hour)
	$(BIN)/python scripts/soak.py $(ARGS)

container: $(STAMP)  ## build the image without Docker and merge a model inside it (root, Debian, minutes)
	$(BIN)/python scripts/container/build.py $(ARGS)

clean:  ## remove what make made
	rm -rf $(VENV) build dist .cache
