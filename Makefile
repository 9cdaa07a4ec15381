# Everything runs in a virtual environment of its own, made on first use and remade when the requirements change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/digits
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadgroup

.PHONY: demo test test-slow test-gpu lint clean-venv

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed ## SIMS on handwritten digits, end to end
	$(BIN)/sims run digits --out $(OUT)

test: $(VENV)/.installed ## the tests that take minutes in all
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-slow: $(VENV)/.installed ## the tests that take longer, kill-and-compare among them
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed ## half precision, compilation and waiting, where there is a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean-venv:
	rm -rf $(VENV)
