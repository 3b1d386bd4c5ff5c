# make demo | test | test-eval | test-slurm | lint | figures | bench | gpu: each sets up what it needs in .venv.
# make test PYTHON=python3.13: the same with that Python, in an environment of its own, .venv-python3.13.

PYTHON ?= python3
VENV := .venv$(if $(filter command,$(origin PYTHON)),-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python

demo: $(VENV)/run
	$(RUN) demo.py

test: lint
	$(RUN) -m pytest -n 2 --dist worksteal --ignore=tests/test_slurm.py

test-eval: $(VENV)/eval
	$(RUN) -m pytest tests/test_lm_eval.py

# A sweep on a SLURM of one node, which the test starts; without SLURM it says how to install it.
test-slurm: $(VENV)/dev
	$(RUN) -m pytest -rs tests/test_slurm.py

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Runs the notebook and prints what its cells print.
figures: $(VENV)/dev
	MPLBACKEND=Agg $(RUN) -c "import nbformat, nbclient; n = nbformat.read('plot_results.ipynb', as_version=4); \
	nbclient.NotebookClient(n).execute(); \
	print(*(o.text for c in n.cells for o in c.get('outputs', []) if o.get('name') == 'stdout'), sep='', end='')"

bench: $(VENV)/run
	for part in step scale moe tokenize loader hellaswag sample; do $(RUN) -m bench $$part || exit; done

# Nine minutes on a GPU: results/gpu/DEVICE/report.md. `make gpu MINUTES=30` measures more.
MINUTES ?= 9
gpu: $(VENV)/run
	$(RUN) -m bench gpu --minutes $(MINUTES)

# A .venv of Python 3.11 or newer is kept, whoever made it (uv leaves out pip, hence ensurepip); any other is made anew.
NEW_ENOUGH := -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null
$(VENV)/run: requirements.txt
	@$(RUN) $(NEW_ENOUGH) || $(PYTHON) $(NEW_ENOUGH) || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(RUN) $(NEW_ENOUGH) || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip --version || $(RUN) -m ensurepip
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/eval: $(VENV)/dev requirements-eval.txt
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements-eval.txt
	touch $@

.PHONY: demo test test-eval test-slurm lint figures bench gpu
