# make demo | test | test-eval | lint | figures | bench | gpu: each sets up what it needs in .venv.

PYTHON ?= python3
RUN := .venv/bin/python

demo: .venv/run
	$(RUN) demo.py

test: lint
	$(RUN) -m pytest -n 2

test-eval: .venv/eval
	$(RUN) -m pytest tests/test_lm_eval.py

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Runs the notebook and prints what its cells print.
figures: .venv/dev
	MPLBACKEND=Agg $(RUN) -c "import nbformat, nbclient; n = nbformat.read('plot_results.ipynb', as_version=4); \
	nbclient.NotebookClient(n).execute(); \
	print(*(o.text for c in n.cells for o in c.get('outputs', []) if o.get('name') == 'stdout'), sep='', end='')"

bench: .venv/run
	for part in step scale moe tokenize loader hellaswag sample; do $(RUN) -m bench $$part || exit; done

# Nine minutes on a GPU: results/gpu/DEVICE/report.md. `make gpu MINUTES=30` measures more.
MINUTES ?= 9
gpu: .venv/run
	$(RUN) -m bench gpu --minutes $(MINUTES)

# A .venv of Python 3.11 or newer is kept, whoever made it (uv leaves out pip, hence ensurepip); any other is made anew.
NEW_ENOUGH := -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null
.venv/run: requirements.txt
	@$(RUN) $(NEW_ENOUGH) || $(PYTHON) $(NEW_ENOUGH) || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(RUN) $(NEW_ENOUGH) || $(PYTHON) -m venv --clear .venv
	$(RUN) -m pip --version || $(RUN) -m ensurepip
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/eval: .venv/dev requirements-eval.txt
	.venv/bin/pip install --disable-pip-version-check -r requirements-eval.txt
	touch $@

.PHONY: demo test test-eval lint figures bench gpu
