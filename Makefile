PYTHON ?= python3
BIN := .venv/bin
RESULTS := gpu-results

.PHONY: setup demo test check format e2e gpu docs settings labels drawing

setup: .venv/installed

.venv/installed: pyproject.toml
	@echo 'installing into .venv: PyTorch is large, this takes a few minutes the first time'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch .venv/installed

demo: setup
	$(BIN)/aligndet demo

test: setup
	OMP_NUM_THREADS=1 ALIGNDET_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

e2e: setup
	OMP_NUM_THREADS=1 ALIGNDET_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m 'e2e or matrix'

# Another environment, where nothing can be installed, and another place: make gpu BIN=/path/to/bin RESULTS=/path
gpu: $(BIN)/python3
	sh tests/gpu/run.sh $(abspath $(BIN))/python3 $(abspath $(RESULTS))

.venv/bin/python3: .venv/installed

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'open site/index.html, or serve it while writing: $(BIN)/python -m mkdocs serve'

drawing: setup
	$(BIN)/python docs/draw_modules.py

settings: setup
	$(BIN)/python docs/write_settings.py

labels: setup
	PYTHONPATH=tests $(BIN)/python docs/write_labels.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell aligndet_cli tests examples docs README.md CHANGELOG.md CONTRIBUTING.md

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
