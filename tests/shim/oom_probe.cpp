// SPDX-License-Identifier: Apache-2.0
// Loaded by test_native_module.py: torch's Cholesky factorisation then runs out of memory, as on a
// full device, so that the exception starts below the shipped module.
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace {

void run_out_of_memory(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_WITH(OutOfMemoryError, false, "device memory is full (on purpose)");
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("linalg_cholesky_ex",
               torch::CppFunction::makeFromBoxedFunction<&run_out_of_memory>());
}
