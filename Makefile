# Everything a newcomer needs is `make run` and `make test`; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CI runs every test that can run; at home the slow ones wait for `make test MARKERS=`.
MARKERS ?= $(if $(CI),,not slow)
# Processes that test, a file each; every one needs 2.5 GB. Tests in a browser wait most of the time, so that three keep
# two cores busy. One that dies ends the run and its test is named: started again, it would wait for ever (pytest-xdist
# 3.8, whose `loadfile` gives it no work). What fails among the others is run again alone, since a busy machine can make
# a test in a browser late; both runs are printed.
JOBS ?= 3
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "$(MARKERS)"

.DEFAULT_GOAL := help
.PHONY: help run test docs lint format types experiments ui test-ui minimum clean

help: ## List all targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(VENV)/installed ## Run the main job on the built-in galaxies: train, rank, label, train again, report
	$(BIN)/python -m anomalymatch.run +experiment=demo_quick

test: $(VENV)/installed ## Run the tests (MARKERS= runs the slow ones too)
	$(PYTEST) -n $(JOBS) --dist loadfile --max-worker-restart=0 --durations=20 || { \
		test $$? -eq 1 && echo "What failed beside other tests is run again alone." && \
		$(PYTEST) --last-failed --last-failed-no-failures none; }

docs: $(VENV)/installed ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "open docs/_build/html/index.html"

lint: $(VENV)/installed ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/installed ## Check types alone
	$(BIN)/mypy

experiments: $(VENV)/installed ## Measure the tables of experiments/README.md again (needs ANOMALYMATCH_DATA)
	$(BIN)/python experiments/probe_miniimagenet.py
	$(BIN)/python experiments/probe_draws.py
	$(BIN)/python experiments/galaxyzoo1.py
	$(BIN)/python experiments/warm_start.py
	$(BIN)/python experiments/speed.py
	$(BIN)/python experiments/throughput.py
	$(BIN)/python experiments/throughput.py --sizes 64 84 128 150 224
	$(BIN)/python experiments/startup.py
	$(BIN)/python experiments/labelling_speed.py
	$(BIN)/python experiments/labelling_browser.py
	$(BIN)/python experiments/labelling_people.py
	$(BIN)/python experiments/labelling_yield.py
	$(BIN)/python experiments/clustering.py
	$(BIN)/python experiments/clustering.py --classifier --datasets neu_steel magnetic_tile magnetic_tile_defects
	$(BIN)/python experiments/msc_cifar10.py
	$(BIN)/python experiments/cold_start.py
	$(BIN)/python experiments/msc_transfer.py
	$(BIN)/python experiments/discovery_coverage.py
	$(BIN)/python experiments/benchmark.py
	$(BIN)/python experiments/final_head.py
	$(BIN)/python experiments/adaptation.py --epochs 0 8 --crops 5 model.weights=bundled adapt.image_size=128 "augment.zoom=[0.75,1.3]"
	$(BIN)/python experiments/adaptation.py --name adaptation_20 --epochs 0 20 --first 10 --crops 5 model.weights=bundled adapt.image_size=128 "augment.zoom=[0.75,1.3]"
	$(BIN)/python experiments/adaptation.py --name adaptation_40 --epochs 0 40 --first 10 --crops 5 model.weights=bundled adapt.image_size=128 "augment.zoom=[0.75,1.3]"
	$(BIN)/python experiments/adaptation.py --name adaptation_methods --methods simclr vicreg byol dino --epochs 0 2 5 10 20 model.weights=bundled adapt.image_size=64 "augment.zoom=[0.75,1.3]"
	$(BIN)/python experiments/adaptation.py --name adaptation_seed1 --methods simclr --epochs 20 model.weights=bundled adapt.image_size=64 "augment.zoom=[0.75,1.3]" seed=1
	$(BIN)/python experiments/adaptation.py --name adaptation_seed2 --methods simclr --epochs 20 model.weights=bundled adapt.image_size=64 "augment.zoom=[0.75,1.3]" seed=2
	$(BIN)/python experiments/adaptation.py --name adaptation_photographs --tasks hourglass piano --epochs 0 2 model.weights=bundled model.image_size=84 adapt.image_size=64
	$(BIN)/python experiments/patch_head.py --tasks crack blowhole
	$(BIN)/python experiments/probe_variants.py
	$(BIN)/python experiments/configured_sizes.py --trainings 99
	$(BIN)/python experiments/mean_scoring.py
	$(BIN)/python experiments/all_labels.py
	$(BIN)/python experiments/int8.py
	$(BIN)/python experiments/cascade.py
	$(BIN)/python experiments/rounds.py
	$(BIN)/python experiments/candidates.py
	$(BIN)/python experiments/candidates.py --galaxies
	$(BIN)/python experiments/reads.py
	$(BIN)/python experiments/large_images.py
	$(BIN)/python experiments/result_plots.py

ui: $(VENV)/installed ## Open the labelling page on the built-in galaxies
	$(BIN)/python -m anomalymatch.label

test-ui: $(VENV)/installed ## Test the page in a real browser, which is installed if there is none
	command -v chromium >/dev/null || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest -q -m ui

minimum: ## Write constraints-minimum.txt again: the stated minima, and what they need (needs uv)
	{ echo "# The minima that pyproject.toml states, and what they need: make minimum. CI runs a job with them."; \
	uv pip compile --quiet --resolution lowest-direct --python-version 3.11 --no-annotate --no-header pyproject.toml; \
	} > constraints-minimum.txt

clean: ## Remove the environment, caches and build products; runs are kept
	rm -rf $(VENV) build dist docs/_build docs/tutorials/_notebooks docs/reference/commands docs/reference/configuration
	rm -rf docs/reference/configuration.md .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
