#include "ops/cpu/kernels_table.h"

namespace rodin {

const Kernels& kernels_portable() { return kKernels; }

}  // namespace rodin
