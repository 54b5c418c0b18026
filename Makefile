# make demo: the whole way on the real model.   make test: lint, types, every test.
# TORCH_INDEX names a package index to take PyTorch's CPU build from.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/demo.yaml
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt

# Gradio 6.31 asks for pillow<13, so pip would not put it beside the pinned Pillow 13, with which it works: it and
# what it needs are installed by name.
PAGE = brotli fastapi gradio gradio_client groovy hf-gradio httpcore httpx opentelemetry-api orjson pydub \
       python-multipart pytz safehttpx semantic-version starlette tomlkit uvicorn

.PHONY: demo test lint clean
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

# torch goes first and pinned: a bare requirement would take a CUDA build of several GB.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps $(PAGE)
	touch $@

clean:
	rm -rf $(VENV) runs
