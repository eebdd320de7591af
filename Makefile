# demo: train and compare (under ten minutes)   test: the CPU tests   long: those of half a minute and more
# check: format, lint, types, direction of imports
# docs: the site, into site/; a link or a name that is not there fails   bench: timings
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OUT ?= out/demo

.PHONY: demo test long check docs bench format

demo: $(STAMP)
	$(BIN)/arcflow demo --out $(OUT)

# Shapes are checked in the slow part alone: a third of collecting and a quarter of the fast tests. CI checks them in all.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --jaxtyping-packages= -m "not slow and not long and not gpu"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not long and not gpu"
	$(BIN)/pip install -q -c constraints.txt --no-deps --upgrade --target .venv/quantized torchao bitsandbytes gguf optimum-quanto
	PYTHONPATH=.venv/quantized $(BIN)/python -m pytest tests/families/test_quantized.py tests/docs/test_guides.py

long: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt --upgrade --target .venv/ray 'ray[serve,data]>=2.60,<3'
	PYTHONPATH=.venv/ray $(BIN)/python -m pytest tests/on_ray -m "long and not gpu"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long and not gpu"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.exact_step
	$(BIN)/python -m benchmarks.transformer_time
	$(BIN)/python -m benchmarks.iteration

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pins keep every machine on the tested versions; nothing here needs torchvision.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
