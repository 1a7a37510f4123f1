# One command a job; each sets itself up on a fresh machine and reinstalls nothing the second time.
#   make train APP=text_to_sql [CONFIG=gpu DATA=<folder> MODEL=<folder or hub id> TASK= SEED= RUN= FRESH=1 GPUS=2 SET="key=value ..."]

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
APP ?= text_to_sql
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Offline unless a real model is asked for by hub id.
export HF_HUB_OFFLINE := $(if $(filter-out tiny,$(CONFIG)),0,1)
export OMP_NUM_THREADS ?= 1

EXTRAS = $(shell sed -n 's/^ *extras=(\(.*\)),$$/\1/p' apps/$(APP)/app.py 2>/dev/null | tr ',' '\n' | tr -d '" ' | grep . | sort -u | paste -sd, -)
OPTIONS = --app $(APP) $(if $(CONFIG),--config $(CONFIG)) $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") \
          $(if $(TASK),--task $(TASK)) $(if $(SEED),--seed $(SEED)) $(if $(RUN),--run "$(RUN)") $(if $(SET),--set '$(SET)')
RUN_CORE = $(BIN)/python -P -m core.main

.PHONY: help setup train eval predict report check apps recipes family docs new test test-slow lint results bench clean
help:  ## print these lines
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.app-$(APP)  ## create .venv and install what APP needs

train: .venv/.app-$(APP)  ## train APP, or go on with the run; prints a before/after table and writes a report
	$(RUN_CORE) train $(OPTIONS) $(if $(FRESH),--fresh) $(if $(GPUS),--gpus $(GPUS))

eval: .venv/.app-$(APP)  ## score a run's model (RUN=), any MODEL, or stored forecasts (MODEL=x.zarr) on held-out rows (SPLIT=), without training
	$(RUN_CORE) eval $(OPTIONS) $(if $(SPLIT),--split $(SPLIT))

predict: .venv/.app-$(APP)  ## answer INPUT= with a run's model, into OUTPUT=: JSON lines; folders of pictures; an analysis, into forecasts
	$(RUN_CORE) predict $(OPTIONS) --input "$(INPUT)" --output "$(OUTPUT)"

report: .venv/.app-$(APP)  ## write a finished run's report.html again
	$(RUN_CORE) report $(OPTIONS)

check: .venv/.app-$(APP)  ## score APP's gold answers and the attacks on its rewards; loads no model
	$(RUN_CORE) check $(OPTIONS)

apps: .venv/.app-$(APP)  ## list the apps
	@$(RUN_CORE) apps

recipes: .venv/.app-$(APP)  ## list the recipes: what each changes, sets and needs, its source and grade; NAME= describes one
	@$(RUN_CORE) recipes $(if $(NAME),--name $(NAME))

docs: .venv/.app-$(APP)  ## write docs/recipes.md from the recipes
	$(RUN_CORE) recipes --write docs/recipes.md

new: .venv/.app-$(APP)  ## write the two files of a new app, APP=its name
	$(RUN_CORE) new --app $(APP)

test: .venv/.dev  ## the default tests: no network, no GPU, under ten minutes on two cores
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

test-slow: .venv/.dev  ## the longer tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

lint: .venv/.dev  ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

results: .venv/.app-$(APP)  ## rerun every number in APP's README into results/APP.json (about an hour)
	$(BIN)/python -P benchmarks/results.py --app $(APP) $(if $(TASK),--task $(TASK))

family: .venv/.dev  ## compare all recipes: results/arena.* and results/mechanisms.* (about an hour; goes on where it stopped)
	$(BIN)/python -P benchmarks/arena.py
	$(BIN)/python -P benchmarks/mechanisms.py

bench: .venv/.dev  ## the measured claims of benchmarks/
	@for script in benchmarks/bench_*.py; do [ -e "$$script" ] || continue; $(BIN)/python -P "$$script" || exit 1; done

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info

.venv/.created:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "Python 3.11-3.13 is needed; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.app-$(APP): .venv/.created pyproject.toml requirements.lock
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c requirements.lock -e ".[train$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@touch $@

.venv/.dev: .venv/.created pyproject.toml requirements.lock
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c requirements.lock -e ".[train,sql,flow,air,dev]"
	@touch $@

comma := ,
