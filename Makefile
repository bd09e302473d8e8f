# fusedgpt's commands; `make` alone lists them.
#   PYTHON=...  an interpreter that already has everything: no .venv is made
#   ARGS=...    more flags for the program behind the target, e.g. make test ARGS="tests/data -x"

LINK := build/link
# `python -m` would put this folder on sys.path, and `import kernels` in transformers would find ours instead of Hugging Face's.
export PYTHONSAFEPATH := 1
export MYPYPATH := $(LINK)

ifdef PYTHON
prepare := @:
export PYTHONPATH := $(CURDIR)/$(LINK)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON := .venv/bin/python
prepare := @python3 tools/setup_env.py
endif

.PHONY: help train test check bench gpu kernels-report clean

help:
	@echo 'make train   trains a small GPT on the embedded corpus, about two minutes on two CPU cores: runs/tales'
	@echo 'make test    all tests'
	@echo 'make check   ruff and mypy'
	@echo 'make bench   what is faster, by how much, on this machine: operators, step, memory, start-up, text; 3 minutes on a CPU'
	@echo 'make gpu     on a machine with a GPU: parity, tests, sanitizer and timings, within eight minutes: bench/results/'
	@echo 'make kernels-report  every kernel compiled for four architectures, no GPU needed: registers, spills, shared memory'
	@echo 'make clean   removes .venv, caches and build output, never runs/'
	@echo 'The first of them makes .venv and installs what it needs; PYTHON=... uses an interpreter that has everything.'
	@echo 'ARGS="..." adds flags, e.g. make train ARGS="--steps 100".'

train: $(LINK)/fusedgpt
	$(prepare)
	$(PYTHON) -m fusedgpt.gpt train --preset tales --out runs/tales $(ARGS)

test: $(LINK)/fusedgpt
	$(prepare) test parquet
	$(PYTHON) -m pytest $(ARGS)

check: $(LINK)/fusedgpt
	$(prepare) test parquet
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy -p fusedgpt.gpt -p fusedgpt.data -p fusedgpt.kernels -p fusedgpt.bench

bench: $(LINK)/fusedgpt
	$(prepare) bench
	$(PYTHON) -m fusedgpt.bench all $(ARGS)

gpu: $(LINK)/fusedgpt
	$(prepare) test parquet
	$(PYTHON) -m fusedgpt.bench gpu $(ARGS)

# ARGS="--json FILE" writes it as JSON too
kernels-report: $(LINK)/fusedgpt
	$(prepare)
	$(PYTHON) -m fusedgpt.bench.gpu.kernels_report $(ARGS)

# The package is the clone itself, whatever its folder is called: this link gives it its name, for mypy and for PYTHON=.
$(LINK)/fusedgpt:
	@mkdir -p $(LINK) && ln -sfn ../.. $@

clean:
	rm -rf .venv .venv.old .venv.lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./runs -prune -o -name __pycache__ -prune -exec rm -rf {} +
