# From a fresh clone: `make demo` runs the main job on the embedded models, `make test` the tests. Both set everything up.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INTERPRETER := $(VENV)/interpreter

.PHONY: demo test test-triton lint format typecheck clean

# Both models at once, a core each: most of the time goes into lm-eval's own start-up.
DEMO := OMP_NUM_THREADS=1 $(BIN)/lm_eval --model mamba_amp --tasks icl_gap_mini --batch_size 64 --model_args

DEMO_STUDY := mamba-studies/demo

# Workers with a thread each: most tests wait for Python, few for arithmetic. On two cores a third worker computes while
# others wait for processes that they have started, and so does Triton's interpreter, of which we hear at the end.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile
# The Triton kernels in Triton's interpreter, with the numpy that it needs in front of ours.
TRITON_TESTS := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER) $(BIN)/python -m pytest -n 2 tests/triton

demo: $(INSTALLED)
	@log=$$(mktemp); $(DEMO) pretrained=mini-2 >$$log 2>&1 & \
	$(DEMO) pretrained=mini; status=$$?; wait $$! || status=1; cat $$log; rm -f $$log; exit $$status
	@rm -rf $(DEMO_STUDY)
	@OMP_NUM_THREADS=1 $(BIN)/mamba-study run divergence-mini -o $(DEMO_STUDY) --device cpu
	@OMP_NUM_THREADS=1 $(BIN)/mamba-study report $(DEMO_STUDY)

ifeq ($(shell uname -sm),Linux x86_64)
test: $(INSTALLED) $(INTERPRETER)/.installed
	@log=$$(mktemp); $(TRITON_TESTS) >$$log 2>&1 & \
	$(TESTS); status=$$?; wait $$! || status=1; cat $$log; rm -f $$log; exit $$status
else
test: $(INSTALLED)
	$(TESTS)
	@echo "The Triton kernels are not tested here: Triton has wheels for Linux only."
endif

test-triton: $(INSTALLED) $(INTERPRETER)/.installed
	$(TRITON_TESTS)

$(INTERPRETER)/.installed: tests/triton/requirements.txt
	$(PYTHON) -c "import shutil; shutil.rmtree('$(INTERPRETER)', ignore_errors=True)"
	$(BIN)/python -m pip install --quiet --no-deps --target $(INTERPRETER) --requirement $<
	touch $@

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
