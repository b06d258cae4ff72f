# Everything a developer types. Each target first makes .venv and installs the pinned versions into
# it; a second run installs nothing, because the stamp is newer than the two files it depends on.

PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
PY     := $(VENV)/bin/python
RUN    := $(PY) -m pliant
# One thread a worker: two workers with two threads each on two cores are slower than this.
TESTS  := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --maxprocesses 8 --dist worksteal

# The oldest supported transformers, as pyproject.toml states it.
OLDEST := $(shell sed -n 's/.*"transformers>=\(.*\)".*/\1/p' pyproject.toml)
# Which pins do not hold, and what is installed besides: `make oldest` sets both.
UNPINNED  := ^$$
INSTALLED :=

# A .venv whose interpreter is gone, or that was installed from another folder, is made again.
ifneq ($(shell cat $(STAMP) 2>/dev/null; $(PY) -c 'print(1)' 2>/dev/null),$(CURDIR) 1)
$(shell rm -f $(STAMP))
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(STAMP) ## two tiny language models answer questions; ends with a page to open
	@$(RUN) demo

.PHONY: test
test: $(STAMP) ## every test, on every architecture
	@$(TESTS)

# Where benchmarks.routing_real finds its labels; without it that benchmark is left out.
DATA :=

.PHONY: real
real: $(STAMP) ## fetch SmolLM2 and MiniLM (180 MB); then the tests and benchmarks on them, an hour or more
	@$(RUN) models get smollm2-135m minilm
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m real tests/real
	@for benchmark in score_generate cpx_training early_exit gradient_step; do \
	  $(PY) -m benchmarks.$$benchmark --model smollm2-135m || exit 1; done
	@if [ -n "$(DATA)" ]; then $(PY) -m benchmarks.routing_real --data $(DATA); \
	  else echo "routing_real: left out; give the folder of the labels, make real DATA=..."; fi

.PHONY: gpu
gpu: $(STAMP) ## on a machine with a GPU: checks and timings in bf16, in eight minutes
	@$(PY) -m benchmarks.gpu --out benchmarks/results $(if $(MODEL),--model $(MODEL))

.PHONY: attack
attack: $(STAMP) ## thousands of bad command lines, kills, broken servers and forged files, ten minutes
	@OMP_NUM_THREADS=1 $(PY) -m tests.attacks

.PHONY: lint
lint: $(STAMP) ## ruff, the type checker and the direction of imports
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest -q -p no:cacheprovider tests/test_imports.py

.PHONY: format
format: $(STAMP) ## mend what ruff can mend
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: check
check: lint test ## what CI runs: lint and test

.PHONY: architectures
architectures: $(STAMP) ## build every architecture small and write docs/architectures.md
	@$(PY) -m pliant.survey docs/architectures.md

.PHONY: docs
docs: $(STAMP) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "open site/index.html"

.PHONY: oldest
oldest: ## try the oldest supported transformers, in an environment of its own
	@$(MAKE) --no-print-directory oldest-tests VENV=.venv-oldest \
	  UNPINNED='^(transformers|tokenizers|huggingface-hub)==' INSTALLED='transformers==$(OLDEST)'

# The quick set of architectures, without two: DeepSeek-V4 is younger than that version, and its
# RWKV does not run in bf16. Its Trainer cannot resume two processes on a CPU.
oldest-tests: $(STAMP)
	@$(TESTS) tests/adapters tests/cli tests/loading tests/training \
	  -k 'not two_processes'
	@$(TESTS) tests/contracts -k '(fp32 or bf16) and not deepseek_v4 and not rwkv'

.PHONY: clean
clean: ## remove everything that can be made again
	rm -rf .venv .venv-* build dist site out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Pliant needs Python 3.11 or later, and '$(PYTHON)' is not. Name one: make PYTHON=python3.12 ..." >&2; \
	  exit 2; }
	@rm -f $(STAMP)
	@if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "installing what constraints.txt pins (some minutes the first time, nothing the next)"
	@grep -vE '$(UNPINNED)' constraints.txt > $(VENV)/constraints.txt || true
	@$(PY) -m pip install -qq --disable-pip-version-check -c $(VENV)/constraints.txt \
	  -e '.[dev]' $(INSTALLED)
	@echo '$(CURDIR)' > $(STAMP)
