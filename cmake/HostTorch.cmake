# SPDX-License-Identifier: Apache-2.0
# Defines host_torch: the LibTorch inside the running interpreter's torch package.
# Not find_package(Torch): it fails on a CUDA torch without a CUDA toolkit, which is what users have.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import os, torch; from torch.utils import cpp_extension as c; \
print(torch.__version__.split('+')[0]); print(os.path.dirname(torch.__file__)); \
print(int(torch.compiled_with_cxx11_abi())); print('|'.join(c.include_paths()))"
  OUTPUT_VARIABLE host_torch_facts
  ERROR_VARIABLE host_torch_error
  RESULT_VARIABLE host_torch_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT host_torch_result EQUAL 0)
  message(FATAL_ERROR "torch cannot be imported by ${Python_EXECUTABLE}. Install torch there first; with pip, build by "
                      "${Python_EXECUTABLE} -m pip install --no-build-isolation .\n${host_torch_error}")
endif()
string(REPLACE "\n" ";" host_torch_facts "${host_torch_facts}")
list(GET host_torch_facts 0 HOST_TORCH_VERSION)
list(GET host_torch_facts 1 HOST_TORCH_DIR)
list(GET host_torch_facts 2 HOST_TORCH_CXX11_ABI)
list(GET host_torch_facts 3 host_torch_includes)
string(REPLACE "|" ";" host_torch_includes "${host_torch_includes}")
if(NOT HOST_TORCH_CXX11_ABI)
  message(FATAL_ERROR "torch ${HOST_TORCH_VERSION} uses the old C++ string ABI, which is not supported.")
endif()
string(REGEX REPLACE "^([0-9]+)\\.([0-9]+).*" "\\1\\2" HOST_TORCH_TAG "${HOST_TORCH_VERSION}")
message(STATUS "torch ${HOST_TORCH_VERSION} in ${HOST_TORCH_DIR}")

add_library(host_torch INTERFACE)
# SYSTEM: torch's own warnings are not ours.
target_include_directories(host_torch SYSTEM INTERFACE ${host_torch_includes})
target_compile_definitions(host_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
find_library(HOST_TORCH_CPU_LIB torch_cpu PATHS "${HOST_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
find_library(HOST_TORCH_LIB torch PATHS "${HOST_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
find_library(HOST_C10_LIB c10 PATHS "${HOST_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
find_library(HOST_TORCH_PYTHON_LIB torch_python PATHS "${HOST_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
# Some CUDA builds of torch export parts of std::filesystem that jump to address 0, so that the C++
# runtime has to be the first library in which its symbols are looked up.
if(UNIX AND NOT APPLE)
  target_link_libraries(host_torch INTERFACE "-Wl,--push-state,--no-as-needed" stdc++ "-Wl,--pop-state")
endif()
target_link_libraries(host_torch INTERFACE "${HOST_TORCH_LIB}" "${HOST_TORCH_CPU_LIB}" "${HOST_C10_LIB}")

add_library(host_torch_python INTERFACE)
target_link_libraries(host_torch_python INTERFACE host_torch "${HOST_TORCH_PYTHON_LIB}")
