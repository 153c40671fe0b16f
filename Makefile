# From a fresh clone: `make demo` runs the main job on the embedded models, `make test` the tests. Both set everything up.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format typecheck clean

# Both models at once, a core each: most of the time goes into lm-eval's own start-up.
DEMO := OMP_NUM_THREADS=1 $(BIN)/lm_eval --model mamba_amp --tasks icl_gap_mini --batch_size 64 --model_args

DEMO_STUDY := mamba-studies/demo

demo: $(INSTALLED)
	@log=$$(mktemp); $(DEMO) pretrained=mini-2 >$$log 2>&1 & \
	$(DEMO) pretrained=mini; status=$$?; wait $$! || status=1; cat $$log; rm -f $$log; exit $$status
	@rm -rf $(DEMO_STUDY)
	@OMP_NUM_THREADS=1 $(BIN)/mamba-study run divergence-mini -o $(DEMO_STUDY) --device cpu
	@OMP_NUM_THREADS=1 $(BIN)/mamba-study report $(DEMO_STUDY)

# Two workers with a thread each: most tests wait for Python, few for arithmetic.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

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
