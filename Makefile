PYTHON ?= python3
OLDEST_TRANSFORMERS := 5.3.0

VENV := .venv
OLDEST := .venv-oldest
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-oldest lint clean

help:
	@echo "make demo         MiniLM to 2048 tokens: time, memory, and a classifier that truncation cannot learn (5 minutes)"
	@echo "make test         lint and the whole test suite, in a virtual environment of its own"
	@echo "make test-oldest  what touches Transformers, on the oldest release admitted ($(OLDEST_TRANSFORMERS))"
	@echo "make clean        remove both virtual environments and what the demo wrote"

$(VENV)/.installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,hub-kernel]"
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

# The same pins, but for Transformers and the two packages that it pins itself. Without `kernels`, whose present versions
# the oldest Transformers cannot import.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -e 's/^transformers==.*/transformers==$(OLDEST_TRANSFORMERS)/' -e '/^huggingface_hub==/d' -e '/^tokenizers==/d' \
		constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/.installed-demo
	$(VENV)/bin/python scripts/demo.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(VENV)/bin/python -m pytest --numprocesses 2

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --numprocesses 2 tests/test_registration.py tests/test_model_families.py \
		tests/test_convert_positions.py tests/test_convert_checkpoint.py tests/test_verify.py tests/test_longformer.py \
		tests/test_finetune_classification.py tests/test_hub.py

clean:
	rm -rf $(VENV) $(OLDEST) demo-output
