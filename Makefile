# fusedgpt's commands; `make` alone lists them.
#   PYTHON=...  an interpreter that already has everything; no .venv is made
#   ARGS=...    more flags for the program behind the target: make test ARGS="tests/data -x"

LINK := build/link
# `python -m` would put this folder on sys.path, where transformers' `import kernels` would find ours, not Hugging Face's.
export PYTHONSAFEPATH := 1
export MYPYPATH := $(LINK)

ifdef PYTHON
prepare := @:
export PYTHONPATH := $(CURDIR)/$(LINK)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON := .venv/bin/python
prepare := @python3 tools/setup_env.py
endif

.PHONY: help train test check bench gpu kernels-report emulate soak clean

help:
	@echo 'make train   train a small GPT on the embedded corpus into runs/tales; about two minutes on two CPU cores'
	@echo 'make test    run all tests'
	@echo 'make check   run ruff and mypy'
	@echo 'make bench   time operators, training step, memory, start-up and generation on this machine; 3 minutes on a CPU'
	@echo 'make gpu     on a machine with a GPU: parity, tests, sanitizer and timings into bench/results; within eight minutes'
	@echo 'make kernels-report  compile every kernel for four architectures: registers, spills, shared memory; needs no GPU'
	@echo 'make emulate  run what the compiler makes of every kernel in a PTX emulator, in every mode; needs no GPU'
	@echo 'make soak    kill, break and feed damaged files to every command for half an hour; ARGS="--minutes 5" for less'
	@echo 'make clean   remove .venv, caches and build output, never runs/'
	@echo
	@echo 'The first target makes .venv and installs what it needs. PYTHON=... uses an interpreter that has everything.'
	@echo 'ARGS="..." adds flags, for example: make train ARGS="--steps 100"'

train: $(LINK)/fusedgpt
	$(prepare)
	$(PYTHON) -m fusedgpt.gpt train --preset tales $(ARGS)

test: $(LINK)/fusedgpt
	$(prepare) test parquet
	$(PYTHON) -m pytest -n auto --dist worksteal $(ARGS)

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

# ARGS="--json FILE" writes JSON too
kernels-report: $(LINK)/fusedgpt
	$(prepare)
	$(PYTHON) -m fusedgpt.bench kernels-report $(ARGS)

# ARGS="--mutations 5" breaks the kernels instead, and counts what is noticed
emulate: $(LINK)/fusedgpt
	$(prepare)
	$(PYTHON) -m fusedgpt.bench emulate $(ARGS)

# ARGS="--only kills" (or faults, fuzz) runs one part
soak: $(LINK)/fusedgpt
	$(prepare) test
	$(PYTHON) -m fusedgpt.bench soak $(ARGS)

# The package is the clone itself, whatever its folder is called; this link gives it its name, for mypy and for PYTHON=.
$(LINK)/fusedgpt:
	@mkdir -p $(LINK) && ln -sfn ../.. $@

clean:
	rm -rf .venv .venv.old .venv.lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./runs -prune -o -name __pycache__ -prune -exec rm -rf {} +
