# From a fresh clone: `make demo` runs the main job on the embedded models, `make test` the tests. Both set everything up.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format typecheck clean

demo: $(INSTALLED)
	@for checkpoint in mini mini-2; do \
		$(BIN)/lm_eval --model mamba_amp --model_args pretrained=$$checkpoint --tasks icl_gap_mini --batch_size 64 || exit 1; \
	done

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt buildtools/pth_backend.py buildtools/startup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
