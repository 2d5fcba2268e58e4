// The intrinsics' headers of some compilers leave unused lanes undefined on purpose and warn about it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "ops/cpu/kernels_table.h"

namespace rodin {

const Kernels& kernels_avx512() { return kKernels; }

}  // namespace rodin
