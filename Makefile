PYTHON ?= python3
BIN := .venv/bin

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

# Another environment, where nothing can be installed: make gpu BIN=/path/to/bin
gpu: $(BIN)/python3
	mkdir -p gpu-results
	OMP_NUM_THREADS=1 ALIGNDET_OFFLINE=1 PYTHONPATH=. $(BIN)/python3 -m pytest -m gpu tests/gpu -n0 --tb=short --durations=10 \
		--junitxml=gpu-results/tests.xml > gpu-results/tests.txt 2>&1; tests=$$?; tail -n 30 gpu-results/tests.txt; \
	OMP_NUM_THREADS=1 ALIGNDET_OFFLINE=1 PYTHONPATH=. $(BIN)/python3 tests/benchmarks/gpu.py --minutes 6 --output gpu-results \
		&& exit $$tests

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
