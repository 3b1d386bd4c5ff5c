# make demo | test | test-eval | lint | figures | bench: each sets up what it needs in .venv.

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

figures: .venv/dev
	MPLBACKEND=Agg $(RUN) -c "import nbformat, nbclient; n = nbformat.read('plot_results.ipynb', as_version=4); \
	nbclient.NotebookClient(n).execute(); \
	print(*(o.text for c in n.cells for o in c.get('outputs', []) if o.get('name') == 'stdout'), sep='', end='')"

bench: .venv/run
	for part in step scale moe tokenize loader hellaswag sample; do $(RUN) -m bench $$part || exit; done

.venv/run: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/eval: .venv/dev requirements-eval.txt
	.venv/bin/pip install --disable-pip-version-check -r requirements-eval.txt
	touch $@

.PHONY: demo test test-eval lint figures bench
