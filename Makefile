# Two commands do everything on a fresh machine: `make compare` and `make test`.
# Each makes the virtual environment if there is none; a second call installs nothing.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What waits most of its time, or is mostly one process at a time: two cores have room for it beside the others' ranks.
BESIDE := tests/faults tests/slurm \
	$(patsubst %,tests/test_%.py,benchmarks calibrate dashboard foresight launch lecture live page plan preflight \
		replay restarts)
# The first of these that is Python 3.11 or later.
PYTHONS := python3 python3.13 python3.12 python3.11 python

.PHONY: compare first-look engines test test-long faults bench foresight pictures gpu setup clean

compare: setup  ## the main job: every strategy on one model, proven against one process
	$(BIN)/lab compare recipes/compare/strategies.toml

first-look: setup  ## the same with four strategies, in under a minute
	$(BIN)/lab compare recipes/compare/first-look.toml

engines: setup  ## the lab's own engine beside DeepSpeed and Accelerate
	$(BIN)/lab compare recipes/compare/engines.toml

test: setup  ## linters, types, and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@mkdir -p runs
	@echo "beside the others, into runs/tests-beside.log: $(BESIDE)"
	@$(BIN)/python -m pytest $(BESIDE) --junit-xml=runs/tests-beside.xml >runs/tests-beside.log 2>&1 & beside=$$!; \
	trap 'kill $$beside' INT TERM; \
	$(BIN)/python -m pytest $(addprefix --ignore ,$(BESIDE)) --junit-xml=runs/tests.xml; status=$$?; \
	wait $$beside || status=1; cat runs/tests-beside.log; exit $$status
	@echo "reports: $(CURDIR)/runs/tests.xml, $(CURDIR)/runs/tests-beside.xml"

test-long: setup  ## what `make test` leaves out: further cases of what it has tested
	$(BIN)/python -m pytest -m long

faults: setup  ## every kind of fault under every strategy, and 200 kills in a row: an hour; writes docs/faults.md
	rm -rf runs/faults
	$(BIN)/python tests/faults/faults.py --out runs/faults --table docs/faults.md

bench: setup  ## the strategies against loops written by hand, in turn
	$(BIN)/python benchmarks/bench.py

foresight: setup  ## what this machine reaches, every strategy on it, and how well one foretells the other
	$(BIN)/python benchmarks/foresight_here.py

pictures: setup  ## those of docs/dashboard.md, of generated records
	$(BIN)/python tests/pictures.py

# Without `setup`: a machine with a GPU may have the packages, and no network.
gpu:  ## first contact with a GPU: parity, memory, the ladder; results go to results/<device>/
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) benchmarks/gpu.py

setup: $(INSTALLED)  ## the virtual environment alone

$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(PYTHONS); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then echo "parallel-lab needs Python 3.11 or later; none of: $(PYTHONS)" >&2; exit 1; fi; \
	if [ ! -x $(BIN)/python ]; then echo "making $(VENV) with $$python"; $$python -m venv $(VENV); fi
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:  ## remove the virtual environment; results under runs/ stay
	rm -rf $(VENV)
