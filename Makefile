PYTHON ?= python3
OLDEST_TRANSFORMERS := 5.3.0

VENV := .venv
OLDEST := .venv-oldest
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo bench test test-oldest lint clean

help:
	@echo "make demo         MiniLM to 2048 tokens: time, memory, and a classifier that truncation cannot learn (a few minutes)"
	@echo "make bench        quick runs of the benchmarks, into runs/bench (a few minutes)"
	@echo "make test         lint and the whole test suite, in a virtual environment of its own"
	@echo "make test-oldest  what touches Transformers, on the oldest release admitted ($(OLDEST_TRANSFORMERS))"
	@echo "make clean        remove both virtual environments and what the demo wrote"

# The pinned versions need it; hf-skein itself does not.
NEWER = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11: make PYTHON=python3.11 ...")'

$(VENV)/.installed-test: pyproject.toml constraints.txt
	$(NEWER)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,hub-kernel]"
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(NEWER)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

# The same pins, but for Transformers and the two packages that it pins itself. Without `kernels`, whose present versions
# the oldest Transformers cannot import.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(NEWER)
	$(PYTHON) -m venv $(OLDEST)
	sed -e 's/^transformers==.*/transformers==$(OLDEST_TRANSFORMERS)/' -e '/^huggingface_hub==/d' -e '/^tokenizers==/d' \
		constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/.installed-demo
	$(VENV)/bin/python scripts/demo.py

# Small runs, on this project's own documents for want of a text; docs/results.md has the commands of the records.
bench: $(VENV)/.installed-demo
	mkdir -p runs/bench
	cat README.md docs/*.md > runs/bench/text.txt
	$(VENV)/bin/python scripts/benchmark_speed.py --text runs/bench/text.txt --head-dim 64 --lengths 1024 4096 \
		--output runs/bench/speed
	$(VENV)/bin/python scripts/benchmark_fidelity.py --text runs/bench/text.txt --settings none --setting default: \
		--lengths 512 2048 --output runs/bench/fidelity
	$(VENV)/bin/python scripts/benchmark_figure1.py --text runs/bench/text.txt --lengths 1024 --features 32 128 \
		--num-texts 1 --output runs/bench/figure1
	$(VENV)/bin/python scripts/check_framework.py --text runs/bench/text.txt --length 256 --draws 50 \
		--columns 8 32 128 --output runs/bench/framework

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist worksteal tests/test_registration.py tests/test_model_families.py \
		tests/test_convert_positions.py tests/test_convert_checkpoint.py tests/test_verify.py tests/test_longformer.py \
		tests/test_finetune_classification.py tests/test_hub.py tests/test_baselines.py

clean:
	rm -rf $(VENV) $(OLDEST) demo-output
