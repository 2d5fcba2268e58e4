#include "ops/cpu/kernels_table.h"

namespace rodin {

const Kernels& kernels_avx2() { return kKernels; }

}  // namespace rodin
