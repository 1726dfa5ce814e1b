# Every target sets up what it needs: uv, where it is not on PATH, and the locked environment.

UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --locked --no-sync
PORT ?= 8080
DURATION ?= 1800

# Compiled as they are installed, so that nobody waits for it later.
export UV_COMPILE_BYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo local serve notebook test soak lint format lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.uv/bin/uv:
	@echo "Installing uv into .uv"
	@python3 -m venv .uv && .uv/bin/pip install --quiet 'uv>=0.13'

setup: $(filter .uv/bin/uv,$(UV)) ## Install the locked environment into .venv
	@$(UV) sync --locked --quiet

demo: setup ## Predict Titanic passengers, from table to table, on local servers
	@$(RUN) mlsys demo

local: setup ## Keep the local servers up, with the sample tables and model in them
	@$(RUN) mlsys local

serve: setup ## Serve on PORT (8080), with the settings of the environment or .env
	@$(RUN) mlsys serve --port $(PORT)

notebook: setup ## Open the notebooks in JupyterLab, with the servers and the service up
	@$(UV) sync --locked --quiet --group lab
	@$(RUN) mlsys local -- jupyter lab notebooks

test: setup ## Run the tests against local servers, and report coverage
	@$(RUN) pytest --cov $(ARGS)

soak: setup ## Disturb and kill runs for DURATION (1800) seconds, and count their rows
	@$(RUN) python -m tests.faults.soak --seconds $(DURATION) --report soak.json

lint: setup ## Check style, imports and the lock file
	@$(UV) lock --check --quiet
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) lint-imports

format: setup ## Mend what lint can mend by itself
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

lock: setup ## Update every dependency to its newest version
	@$(UV) lock --upgrade
