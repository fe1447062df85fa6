# Everything in a virtual environment of its own. `make atlas` makes the quickstart atlas; `make test` runs the tests.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: atlas test chaos peers setup clean

atlas: setup ## set up, then run the quickstart study end to end
	$(RUN)/mind-atlas run quickstart

test: setup ## set up, then lint, check types and run the tests
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/pytest -n 2 --dist loadfile

chaos: setup ## every fault of docs/reliability.md, and its table; KILLS=5 for fewer kills
	MIND_ATLAS_KILLS=$(or $(KILLS),50) $(RUN)/pytest -m chaos tests/pipelines/test_chaos.py

# None of what is compared uses torchvision, which nnsight brings; its wheel for CUDA cannot be loaded beside a CPU torch.
peers: ## compare with the other libraries themselves, in a virtual environment of its own
	$(MAKE) setup VENV=.venv-peers
	.venv-peers/bin/pip install -q -c constraints.txt -e '.[peers]'
	.venv-peers/bin/pip uninstall -q -y torchvision
	.venv-peers/bin/pytest tests/peers

setup: $(VENV)/ready

# The CPU build of torch: from where pip already finds it, or from PyTorch's own CPU wheels by way of uv, which knows
# where they are. Without this, a machine without a GPU would download several gigabytes of CUDA libraries.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install -q --upgrade pip
	@if command -v nvidia-smi >/dev/null; then $(RUN)/pip install -q torch==$(TORCH); \
	else $(RUN)/pip install -q torch==$(TORCH)+cpu 2>/dev/null \
	  || { $(RUN)/pip install -q uv && $(RUN)/uv pip install -q --python $(RUN)/python --torch-backend cpu torch==$(TORCH); }; fi
	$(RUN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
