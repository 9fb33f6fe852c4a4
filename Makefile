# Two commands: `make report` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Containers often set it, and then every process compiles torch, pandas and matplotlib anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: report test test-long cubins lab check lock clean help

help:            ## show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

# Three at once, of those that are not timed, so that two cores have work to the end.
report: $(VENV)/.ready       ## run the studies that are not up to date, write reports/report.html
	$(BIN)/mambabyte sweep --executor local --workers 3
	$(BIN)/mambabyte report

# A process a core; tests of one file share what it prepares, so they stay together, and files begin
# in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder

# Types are checked beside the tests, on a core that would wait; what is found is said behind them.
test: $(VENV)/.test          ## lint, types and tests
	$(BIN)/ruff check .
	@$(BIN)/mypy > $(VENV)/types.txt 2>&1 & types=$$!; trap "kill $$types" INT TERM; \
	$(PYTEST); tests=$$?; \
	wait $$types; checked=$$?; cat $(VENV)/types.txt; exit $$((tests ? tests : checked))

test-long: $(VENV)/.test     ## the tests that take minutes
	$(PYTEST) -m 'long and not gpu'

check: $(VENV)/.test         ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/mypy

cubins: $(VENV)/.test        ## compile the machine code that comes with the package: minutes
	$(BIN)/python -m mambabyte.ops.build.catalogue

lab: $(VENV)/.lab            ## JupyterLab on the notebooks, same environment; make lab ARGS=--no-browser
	$(BIN)/jupyter lab --config=notebooks/lab_config.py $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) notebooks

lock:            ## pin every package of the two commands with its hashes (needs uv)
	echo setuptools | uv pip compile pyproject.toml - --extra test --generate-hashes --universal \
	  --python-version 3.11 --constraint constraints.txt --no-header --no-annotate \
	  --no-emit-index-url --quiet --upgrade --output-file requirements.lock

clean:                       ## delete the environment and what was generated
	rm -rf $(VENV) reports/runs reports/report.html reports/report-evidence

# Where byte code is not kept, each process compiles torch's modules anew, which takes ten seconds.
export PYTHONDONTWRITEBYTECODE :=

# LOCKED=1: the very files of requirements.lock, by their hashes, and no others. Python compiles a
# module when it is first imported: to compile all that torch and transformers have takes a minute.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile

define install
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),$(PIP) --require-hashes --requirement requirements.lock)
	$(PIP) --constraint constraints.txt --editable '.$(1)' $(if $(LOCKED),--no-deps --no-build-isolation)
endef
NEEDED := pyproject.toml constraints.txt $(if $(LOCKED),requirements.lock)

# Each stamp is newer than what it was made from, so nothing is installed twice; what the tests need
# holds what the report needs.
$(VENV)/.ready: $(NEEDED)
	$(call install)
	@touch $@

$(VENV)/.test: $(NEEDED)
	$(call install,[test])
	@touch $(VENV)/.ready $@

$(VENV)/.lab: $(VENV)/.ready
	$(PIP) --constraint constraints.txt --editable '.[lab]'
	@touch $@
