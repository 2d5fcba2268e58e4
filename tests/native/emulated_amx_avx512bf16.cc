// The AMX path with its tiles emulated by AVX-512, for machines with AVX512-BF16 and without AMX.
#define RODIN_EMULATED_TILES
#define kernels_amxbf16 kernels_emulated_amx

#include "ops/cpu/kernels_amxbf16.cc"
