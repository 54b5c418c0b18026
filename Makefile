# make adapter: a LoRA adapter from PROMPT="one sentence", by the generator in the package.
# make demo: the whole way on the real model.   make test: lint, types, every test.   make docs: docs/ as a site, in site/.
# TORCH_INDEX names a package index to take PyTorch's CPU build from.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/demo.yaml
PROMPT ?= Name the capital of the country that the city is in, in quotation marks.
OUT ?= runs/adapter
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt

.PHONY: adapter demo test lint docs clean
adapter: $(VENV)/.installed
	$(VENV)/bin/ltdi generate "$(PROMPT)" --out $(OUT)

demo: $(VENV)/.installed
	$(VENV)/bin/ltdi collect $(RECIPE)
	$(VENV)/bin/accelerate launch --config_file recipes/accelerate/one.yaml recipes/train_generator.py $(RECIPE)
	$(VENV)/bin/ltdi evaluate $(RECIPE)

test: $(VENV)/.installed-test lint
	$(VENV)/bin/python -m pytest -q

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The variable silences a notice that Material for MkDocs has a successor.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# torch goes first and pinned: a bare requirement would take a CUDA build of several GB.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs site
