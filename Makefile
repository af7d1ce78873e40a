# `make demo` shows what vegc does; `make test` checks that it does. Both make what they need.
# The CPU-only build of torch is much smaller: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_OUT ?= vegc-demo
# Two test processes; one thread each, so that they do not fight over the cores.
WORKERS ?= 2
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PACKAGING = settings.ini setup.py pyproject.toml constraints.txt
NOTEBOOKS = nbs/[0-9]*.ipynb

.PHONY: help demo test check export readme architecture notebooks clean-notebooks lint dev clean

help:
	@echo 'make demo              run the whole road on embedded data (installs into $(VENV))'
	@echo 'make test              every check that CI runs'
	@echo 'make export            notebooks -> vegc/*.py'
	@echo 'make readme            nbs/index.ipynb -> README.md'
	@echo 'make architecture      the picture and tables of docs/architecture.md, from the code'
	@echo 'make notebooks         run the library notebooks anew, in place, and scrub them'
	@echo 'make clean-notebooks   strip counts, times and paths from committed outputs'
	@echo 'make lint              ruff on exported code, tests and scripts'
	@echo 'make dev               install everything a developer needs'

demo: $(VENV)/.installed-demo
	$(BIN)/vegc demo --out $(DEMO_OUT)

dev: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(MAKE) check

# The checks alone, for an environment that is already there. The first that fails ends it.
check:
	@echo '== exported code is up to date'
	$(BIN)/python .ci/exported.py
	@echo '== README is up to date'
	$(BIN)/python .ci/readme.py --check
	@echo '== architecture is up to date'
	$(BIN)/python .ci/architecture.py --check
	@echo '== notebooks are clean'
	$(BIN)/python .ci/scrub.py --check
	@echo '== ruff'
	$(BIN)/ruff check .
	@echo '== library notebooks'
	$(ONE_THREAD) $(BIN)/nbdev-test --n-workers $(WORKERS) --timing
	@echo '== pytest'
	$(ONE_THREAD) MPLBACKEND=Agg $(BIN)/python -m pytest -q -n $(WORKERS) tests

export: $(VENV)/.installed-dev
	$(BIN)/python .ci/export.py

readme: $(VENV)/.installed-dev
	$(BIN)/python .ci/readme.py

architecture: $(VENV)/.installed-dev
	$(BIN)/python .ci/architecture.py

notebooks: $(VENV)/.installed-dev
	for nb in $(NOTEBOOKS); do \
	  $(BIN)/jupyter-nbconvert --log-level WARN --to notebook --execute --inplace $$nb || exit 1; \
	done
	$(BIN)/python .ci/scrub.py $(NOTEBOOKS)

clean-architecture: $(VENV)/.installed-dev
	$(BIN)/python .ci/architecture.py

notebooks: $(VENV)/.installed-dev
	$(BIN)/python .ci/scrub.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

# A stamp a purpose: pip runs again only when what it reads has changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'vegc needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.made $(PACKAGING)
	$(BIN)/python -m pip install -e '.[offline]' -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(PACKAGING)
	$(BIN)/python -m pip install -e '.[dev,offline]' -c constraints.txt
	@touch $(VENV)/.installed-demo $@

clean:
	rm -rf build dist vegc.egg-info $(DEMO_OUT)
