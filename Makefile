# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set everything up on a fresh machine; everything they make is in .venv and build.

PYTHON ?= python3
VENV ?= .venv
# The torch to build against. On a machine that should use another one: make test TORCH=torch==2.9.1
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
# Several sources are compiled as one, which is quicker. OFF suits whoever edits one file after another.
UNITY ?= ON
# Test processes; each may start a ComfyUI of its own (3 GB).
WORKERS ?= 2
COMFYUI_DIR ?= $(HOME)/ComfyUI
export COMFYUI_DIR

PY := $(VENV)/bin/python
# Deterministic tests, and no OpenMP spinning on small machines.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test test-native test-python configure module build bench lint format schemas sanitize fuzz coverage clang clean

demo: module
	$(PY) tools/demo.py

test: build test-native test-python

test-native: build
	$(TEST_ENV) build/tests/native/lacuna_native_tests --gtest_brief=1
	$(TEST_ENV) build/tests/nodes/lacuna_nodes_tests --gtest_brief=1

test-python: build $(VENV)/.host-packages
	$(TEST_ENV) $(PY) -m pytest tests -n $(WORKERS) --dist loadfile --durations=20

configure: $(VENV)/.packages
	@mkdir -p build
	$(VENV)/bin/cmake -S . -B build -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DLACUNA_WERROR=ON -DCMAKE_UNITY_BUILD=$(UNITY) > build/configure.log 2>&1 || \
	  (cat build/configure.log; false)

module: configure
	$(VENV)/bin/cmake --build build -j $(JOBS) --target lacuna_module

build: configure
	$(VENV)/bin/cmake --build build -j $(JOBS)

# Debian packages are installed only where they are missing and this user may.
$(VENV)/.packages: tools/requirements.txt tools/install_debian_packages.sh
	sh tools/install_debian_packages.sh $(PYTHON)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet -r tools/requirements.txt
	touch $@

# What a ComfyUI checkout needs, only when there is one to test against.
$(VENV)/.host-packages: $(VENV)/.packages tests/comfyui/requirements.txt tests/comfyui/requirements-nodeps.txt
	if [ -f "$(COMFYUI_DIR)/main.py" ]; then \
	  $(PY) -m pip install --quiet -r tests/comfyui/requirements.txt && \
	  $(PY) -m pip install --quiet --no-deps -r tests/comfyui/requirements-nodeps.txt && touch $@; \
	fi

bench: module
	$(VENV)/bin/cmake -S . -B build -DLACUNA_BENCHMARKS=ON > build/configure.log
	$(VENV)/bin/cmake --build build -j $(JOBS) --target lacuna_bench_closed_form lacuna_bench_fusion lacuna_bench_evaluation
	$(PY) benchmarks/run.py --binaries build/benchmarks

CXX_FILES = $(shell git ls-files 'native/*.h' 'native/*.cpp' 'nodes/*.h' 'nodes/*.cpp' 'plugin/*.h' 'plugin/*.cpp' \
              'tests/*.h' 'tests/*.cpp' 'benchmarks/*.h' 'benchmarks/*.cpp')

lint: $(VENV)/.packages
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.packages
	$(VENV)/bin/clang-format -i $(CXX_FILES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The committed copies of the nodes' texts: for while the binary is missing, and for translators.
schemas: module
	$(PY) tools/write_schemas.py

sanitize: $(VENV)/.packages
	$(VENV)/bin/cmake -S . -B build-sanitize -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_BUILD_TYPE=Debug -DLACUNA_SANITIZE=ON
	$(VENV)/bin/cmake --build build-sanitize -j $(JOBS)
	$(TEST_ENV) build-sanitize/tests/native/lacuna_native_tests --gtest_brief=1
	$(TEST_ENV) build-sanitize/tests/nodes/lacuna_nodes_tests --gtest_brief=1

# libFuzzer on everything that reads what strangers wrote. Found inputs go to build-fuzz/<target>; seeds to keep to tests/fuzz/seeds.
FUZZ_SECONDS ?= 120
FUZZ_TARGETS ?= concepts preserve prompts safetensors bundle workflow widgets
fuzz: $(VENV)/.packages
	CC=clang CXX=clang++ $(VENV)/bin/cmake -S . -B build-fuzz -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_BUILD_TYPE=Debug -DLACUNA_FUZZ=ON
	$(VENV)/bin/cmake --build build-fuzz -j $(JOBS) --target $(addprefix fuzz_,$(FUZZ_TARGETS))
	for target in $(FUZZ_TARGETS); do \
	  echo "== $$target"; mkdir -p build-fuzz/$$target; \
	  $(TEST_ENV) ASAN_OPTIONS=detect_leaks=0 build-fuzz/tests/fuzz/fuzz_$$target build-fuzz/$$target tests/fuzz/seeds/$$target \
	    -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=4096 -artifact_prefix=build-fuzz/$$target- -print_final_stats=1 \
	    2> build-fuzz/$$target.log || { tail -60 build-fuzz/$$target.log; exit 1; }; \
	  grep number_of_executed_units build-fuzz/$$target.log; \
	done

coverage: $(VENV)/.packages
	$(VENV)/bin/cmake -S . -B build-coverage -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_BUILD_TYPE=Debug -DLACUNA_COVERAGE=ON
	$(VENV)/bin/cmake --build build-coverage -j $(JOBS) --target lacuna_native_tests
	$(TEST_ENV) build-coverage/tests/native/lacuna_native_tests --gtest_brief=1
	$(VENV)/bin/gcovr -r . --filter native/ build-coverage --print-summary

# Compiles and links everything with clang; minutes, so that CI leaves it to whoever touches C++.
clang: $(VENV)/.packages
	$(VENV)/bin/cmake -S . -B build-clang -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_CXX_COMPILER=clang++ -DLACUNA_WERROR=ON \
	  -DCMAKE_UNITY_BUILD=$(UNITY) -DLACUNA_BENCHMARKS=ON
	$(VENV)/bin/cmake --build build-clang -j $(JOBS)

clean:
	rm -rf build build-sanitize build-fuzz build-coverage build-clang
