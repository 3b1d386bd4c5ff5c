# make demo | test | test-eval | lint | figures | bench | gpu: each sets up what it needs in .venv.
# make test PYTHON=python3.13: the same with that Python, in an environment of its own, .venv-python3.13.

PYTHON ?= python3
VENV := .venv$(if $(filter command,$(origin PYTHON)),-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python

# Dense, MoE and balanced MoE, two seeds each, on the text of Python's own standard library: no download, a few minutes.
DEMO := --data_root data/bytes --vocab_size 257 --n_layer 2 --n_head 4 --n_embd 128 --stride 1 --T 64 --B 16 \
	--total_batch_size 1024 --max_steps 450 --warmup_steps 50 --max_lr 4e-3 --val_loss_every 75 --val_tokens 16384 \
	--hellaswag_every 0 --sample_from_model_every 0 --device cpu
demo: $(VENV)/run
	$(RUN) fineweb.py --stdlib --tokenizer bytes --out data/bytes
	$(RUN) sweep.py --variants only_moe aux_only no_moe --seeds 1 2 --jobs 2 $(DEMO) --logs_dir logs/demo
	$(RUN) compare.py logs/demo --baseline no_moe
	$(RUN) sample.py --checkpoint logs/demo/aux_only_seed_1 --prompt "class " --max_new_tokens 300 --temperature 0.7
	$(RUN) routes.py --checkpoint logs/demo/aux_only_seed_1 --out routes/demo
	FIGURES=demo $(MAKE) --no-print-directory figures
	@echo "next: edit Args in train_single_gpu.py and train, or pass flags:"
	@echo "  $(RUN) train_single_gpu.py --name mine $(DEMO) --top_k 1 --gate softmax"
	@echo "  $(RUN) compare.py logs"
	@echo "  routes/demo: which expert takes which token; docs/add_a_trick.md: your own router"

test: lint
	$(RUN) -m pytest -n 2 --dist worksteal

# lm-evaluation-harness on an exported model.
test-eval: $(VENV)/dev
	$(RUN) -m pip install -q --disable-pip-version-check "lm-eval[hf]==0.4.13"
	$(RUN) -m pytest tests/test_lm_eval.py

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(RUN) tests/test_imports.py

# Runs the notebook: results/ and your own logs/ as figures.
figures: $(VENV)/dev
	MPLBACKEND=Agg $(RUN) -c "import nbformat, nbclient; n = nbformat.read('plot_results.ipynb', as_version=4); \
	nbclient.NotebookClient(n).execute(); \
	print(*(o.text for c in n.cells for o in c.get('outputs', []) if o.get('name') == 'stdout'), sep='', end='')"

bench: $(VENV)/run
	$(RUN) bench.py step --tokens 2048 --rounds 5
	$(RUN) bench.py scale --rounds 5

# The first quarter of an hour on a GPU (docs/gpu.md), most wanted first; each result is in $(GPU) at once.
B ?= 64
GPU := results/gpu/$(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr -cs 'A-Za-z0-9\n' _)
GPU_RUN := train_single_gpu.py --data_root data/stdlib --B $(B) --max_steps 60 --warmup_steps 20 --val_loss_every 30 \
	--hellaswag_every 0 --sample_from_model_every 0 --logs_dir $(GPU) --checkpoint_dir checkpoints/gpu --resume auto
gpu: $(VENV)/dev
	mkdir -p $(GPU)
	-$(RUN) -m pytest tests/test_gpu.py -rf -k "only_moe or grouped" 2>&1 | tee $(GPU)/tests.txt
	-$(RUN) bench.py step --variants top2 dense --out $(GPU)
	$(RUN) fineweb.py --stdlib --tokenizer gpt2 --max_tokens 20000000 --out data/stdlib
	-$(RUN) $(GPU_RUN) --name dense --n_exp 1
	-$(RUN) $(GPU_RUN) --name top2 --n_exp 8 --use_aux_loss
	$(RUN) bench.py report --out $(GPU) | tee $(GPU)/report.txt
	-$(RUN) -m pytest tests/test_gpu.py -rf 2>&1 | tee $(GPU)/tests.txt
	-$(RUN) bench.py step --tokens 16384 --out $(GPU)/all
	-$(RUN) bench.py step --variants dense top2 --tokens 16384 --imbalanced --out $(GPU)/imbalanced

# A .venv of Python 3.11 or newer is kept, whoever made it (uv leaves out pip, hence ensurepip); any other is made anew.
NEW_ENOUGH := -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null
INSTALL := -m pip install -q --disable-pip-version-check
$(VENV)/run: requirements.txt
	@$(RUN) $(NEW_ENOUGH) || $(PYTHON) $(NEW_ENOUGH) || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(RUN) $(NEW_ENOUGH) || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip --version > /dev/null || $(RUN) -m ensurepip
	@echo "installing requirements.txt into $(VENV) (a few minutes the first time)"
	@$(RUN) $(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	@$(RUN) $(INSTALL) -r requirements-dev.txt
	@touch $@

.PHONY: demo test test-eval lint figures bench gpu
