// Linear layers of many tokens in FP8: out[m][n] = sum over blocks of kBlockK inputs of
//   x_scale[m][block] * w_scale[n / 128][block] * sum_k x[m][k] w[n][k],
// the inner sums by wgmma on e4m3, the outer ones in float32 registers. A row's bits differ from those of
// linear_tile.cuh, where activations stay bf16.
//
// A block of three warpgroups walks over units of 128 tokens and 128 outputs, as many blocks as there are
// multiprocessors. One thread of the first warpgroup brings boxes of x, its scales and the weights into a
// ring of shared memory stages; each of the other two computes 64 tokens. Barriers: full (bytes have
// arrived), empty (every warp that computes has read the stage).
//
// Gated: a unit is two passes over K, each of 64 outputs of gate and the same of up, side by side in one
// product; 128 outputs together are what a scale of the next layer's inputs covers, so they leave quantised.
// The scheme (promotion of every block, ring, roles) is that of DeepGEMM.
#include <algorithm>

#include "cuda/hopper.cuh"
#include "cuda/quad_store.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 384;
constexpr int kUnitRows = 128;  // outputs of a unit
constexpr int kStages = 6;
constexpr int kBoxBytes = 64 * kBlockK;
constexpr int kInputBytes = kWgmmaTokens * kBlockK;
constexpr int kWeightBytes = 2 * kBoxBytes;
constexpr int kScaleBytes = kWgmmaScales * 4;
constexpr int kScalePitch = (kScaleBytes + 127) / 128 * 128;
constexpr int kStageBytes = kInputBytes + kWeightBytes + kScaleBytes;
constexpr int kRingBytes = kStages * (kInputBytes + kWeightBytes + kScalePitch);
constexpr int kSharedBytes = kRingBytes + kStages * 16 + 1024;  // 1024: to align the first stage
constexpr int kBand =
    16;  // token tiles that pass over the outputs together, so that both stay in the L2 cache

// What a block computes next.
struct Unit {
  int first;  // row of x
  int count;
  int expert;  // grouped
  int io;
  int row0;  // of the weights
  int rows;
};

struct Units {
  const WgmmaParams& p;
  int tiles;      // of tokens; grouped: of the routed experts
  int counts[2];  // [2] units along the outputs of either io

  __device__ explicit Units(const WgmmaParams& params) : p(params) {
    counts[0] = (p.max_rows[0] + kUnitRows - 1) / kUnitRows;
    counts[1] = (p.max_rows[1] + kUnitRows - 1) / kUnitRows;
    tiles = p.map_table[0] ? *p.plan.num_tiles - p.num_shared_tiles
                           : (p.num_rows + kWgmmaTokens - 1) / kWgmmaTokens;
  }
  __device__ int count() const {
    return tiles * counts[0] + (p.map_table[0] ? p.num_shared_tiles : tiles) * counts[1];
  }
  __device__ Unit at(int i) const {
    if (p.map_table[0]) {
      // The shared expert first: its units take longer.
      const int shared = p.num_shared_tiles * counts[1];
      const int io = i < shared;
      const int index = io ? i : i - shared;
      const MoeTile tile = p.plan.tiles[index / counts[io] + (io ? tiles : 0)];
      return {tile.first, tile.count, tile.expert, io, index % counts[io] * kUnitRows, p.max_rows[io]};
    }
    const int row_units = counts[0] + counts[1];
    const int band = i / (kBand * row_units);
    const int band_tiles = min(kBand, tiles - band * kBand);
    const int in_band = i - band * kBand * row_units;
    const int first = (band * kBand + in_band % band_tiles) * kWgmmaTokens;
    const int row_unit = in_band / band_tiles;
    const int io = row_unit >= counts[0];
    return {first, min(kWgmmaTokens, p.num_rows - first),         0,
            io,    (row_unit - (io ? counts[0] : 0)) * kUnitRows, p.max_rows[io]};
  }
};

struct Ring {
  uint32_t base;      // of the stages
  uint32_t barriers;  // full [kStages], empty [kStages]
  int stage = 0;
  uint32_t parity = 0;

  __device__ uint32_t inputs() const { return base + stage * kInputBytes; }
  __device__ uint32_t weights() const { return base + kStages * kInputBytes + stage * kWeightBytes; }
  __device__ uint32_t scales() const {
    return base + kStages * (kInputBytes + kWeightBytes) + stage * kScalePitch;
  }
  __device__ uint32_t full() const { return barriers + stage * 8; }
  __device__ uint32_t empty() const { return barriers + (kStages + stage) * 8; }
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <bool kGated>
__device__ __forceinline__ void bring(const WgmmaParams& p, Ring ring) {
  const Units units(p);
  const int count = units.count();
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const Unit unit = units.at(i);
    const int num_blocks = (p.cols[unit.io] + kBlockK - 1) / kBlockK;
    for (int pass = 0; pass < (kGated ? 2 : 1); ++pass) {
      const TensorMap* maps[2];  // [2] of the boxes
      int rows[2];               // [2]
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        const int which = kGated ? box : unit.io;
        maps[box] = p.map_table[0] ? p.map_table[kGated ? box : 0] + unit.expert : p.maps + which;
        rows[box] = unit.row0 + 64 * (kGated ? pass : box);
        if (p.map_table[0] && pass == 0) map_fence(maps[box]);
      }
      for (int block = 0; block < num_blocks; ++block) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        barrier_expect(ring.full(), kStageBytes);
        copy_box(ring.inputs(), p.x + unit.io, block * kBlockK, unit.first, ring.full());
        copy_box(ring.scales(), p.x_scale + unit.io, unit.first / 4 * 4, block, ring.full());
#pragma unroll
        for (int box = 0; box < 2; ++box)
          copy_box(ring.weights() + box * kBoxBytes, maps[box], block * kBlockK, rows[box], ring.full());
        ring.advance();
      }
    }
  }
}

// Columns row0 .. row0 + 8 kTiles - 1 of this lane's two rows.
template <int kTiles>
__device__ __forceinline__ void store_bf16(const WgmmaParams& p, const Unit& unit, int local_row, int row0,
                                           const float (&values)[64]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = local_row + 8 * half;
    const bool is_there = row < unit.count;
    bf16* out = nullptr;
    if (is_there) {
      const bool is_ordered = p.map_table[0] != nullptr && unit.io == 0;
      const int64_t at = is_ordered ? p.plan.order[unit.first + row] : unit.first + row;
      out = static_cast<bf16*>(p.outs[unit.io].out) + at * p.outs[unit.io].out_stride;
    }
#pragma unroll
    for (int group = 0; group < kTiles / 4; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * group + i;
        words[i] = pack_bf16(values[4 * j + 2 * half], values[4 * j + 2 * half + 1]);
      }
      transpose_quad(words, t);
      if (is_there) store_words(out, row0 + 32 * group + 8 * t, unit.rows, words);
    }
  }
}

// The unit's 128 columns of this lane's two rows, in e4m3 with a scale for each row.
__device__ __forceinline__ void store_quantized(const QuantizedView& out, const Unit& unit, int local_row,
                                                const float (&first)[32], const float (&second)[64]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        most = max_or_nan(most, fabsf(first[4 * j + 2 * half + c]));
        most = max_or_nan(most, fabsf(second[4 * j + 2 * half + c]));
      }
    most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, 2));
    const float inverse = most == 0 ? 0.0f : 448.0f / most;
    const int row = local_row + 8 * half;
    const int64_t at = unit.first + row;
    const bool is_there = row < unit.count;
    if (is_there && t == 0) out.scale[unit.row0 / kBlockK * out.scale_stride + at] = most / 448.0f;
    uint8_t* to = static_cast<uint8_t*>(out.data) + at * out.stride + unit.row0 + 16 * t;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const auto pair_at = [&](int j) -> uint32_t {
        const float a = pass == 0 ? first[4 * j + 2 * half] : second[4 * j + 2 * half];
        const float b = pass == 0 ? first[4 * j + 2 * half + 1] : second[4 * j + 2 * half + 1];
        return quantize_pair(a * inverse, b * inverse);
      };
      uint32_t words[4];  // columns 16 i + 2 t and 16 i + 8 + 2 t of the pass
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pair_at(2 * i) | pair_at(2 * i + 1) << 16;
      transpose_quad(words, t);
      if (is_there) {
        *reinterpret_cast<uint4*>(to + 64 * pass) =
            make_uint4(__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
                       __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
      }
    }
  }
}

template <bool kGated>
__device__ __forceinline__ void compute(const WgmmaParams& p, Ring ring) {
  const Units units(p);
  const int group = threadIdx.x / 128 - 1;  // of 64 tokens
  const int lane = threadIdx.x % 32;
  const int local_row = 64 * group + threadIdx.x / 32 % 4 * 16 + lane / 4;
  const int count = units.count();
  float acc[64] = {};  // [64]
  for (int unit_at = blockIdx.x; unit_at < count; unit_at += gridDim.x) {
    const Unit unit = units.at(unit_at);
    const int num_blocks = (p.cols[unit.io] + kBlockK - 1) / kBlockK;
    const bool is_busy = 64 * group < unit.count;
    float held[32];  // gated: what the first pass gave
#pragma unroll
    for (int pass = 0; pass < (kGated ? 2 : 1); ++pass) {
      const float* scales[2];  // [2] of the halves' weights
      int blocks_per_scale = 1;
      float next[2];  // [2]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int which = kGated ? half : unit.io;
        const WeightView& weight = p.map_table[0] ? p.table[kGated ? half : 0][unit.expert] : p.weight[which];
        const int row = min(unit.row0 + 64 * (kGated ? pass : half), unit.rows - 1);
        scales[half] = weight.scale + row / weight.block_rows * weight.scale_cols;
        blocks_per_scale = weight.blocks_per_scale;
        next[half] = __ldg(scales[half]);
      }
      float total[64] = {};  // [64]
      for (int block = 0; block < num_blocks; ++block) {
        const float weight_scale[2] = {next[0], next[1]};
        barrier_wait(ring.full(), ring.parity);
        if (is_busy) {
          products_begin();
          const uint64_t a = matrix_descriptor(ring.inputs() + group * kBoxBytes);
          const uint64_t b = matrix_descriptor(ring.weights());
#pragma unroll
          for (int step = 0; step < 4; ++step)
            wgmma_m64n128k32_e4m3(acc, a + 2 * step, b + 2 * step, step != 0);
          products_commit();
          if (block + 1 < num_blocks) {
            const int at = blocks_per_scale == 1 ? block + 1 : (block + 1) / blocks_per_scale;
            next[0] = __ldg(scales[0] + at), next[1] = __ldg(scales[1] + at);
          }
          float factor[2][2];  // [row half, weight half]
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float scale;
            asm volatile("ld.shared.f32 %0, [%1];"
                         : "=f"(scale)
                         : "r"(ring.scales() + (unit.first % 4 + local_row + 8 * half) * 4)
                         : "memory");
            factor[half][0] = scale * weight_scale[0], factor[half][1] = scale * weight_scale[1];
          }
          products_wait<0>();
#pragma unroll
          for (int i = 0; i < 64; ++i) total[i] = fmaf(factor[i / 2 % 2][i / 32], acc[i], total[i]);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(ring.empty());
        ring.advance();
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 32; ++i) total[i] = total[i] / (1.0f + expf(-total[i])) * total[i + 32];
        if (p.out_quantized[0].data == nullptr) {
          store_bf16<8>(p, unit, local_row, unit.row0 + 64 * pass, total);
        } else if (pass == 0) {
#pragma unroll
          for (int i = 0; i < 32; ++i) held[i] = total[i];
        } else {
          store_quantized(p.out_quantized[unit.io], unit, local_row, held, total);
        }
      } else {
        const float* bias = p.map_table[0] ? nullptr : p.weight[unit.io].bias;
        if (bias) {
#pragma unroll
          for (int i = 0; i < 64; ++i) {
            const int col = unit.row0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            total[i] += col < unit.rows ? bias[col] : 0.0f;
          }
        }
        store_bf16<16>(p, unit, local_row, unit.row0, total);
      }
    }
  }
}

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 1) wgmma_kernel(const __grid_constant__ WgmmaParams p) {
  extern __shared__ __align__(16) char shared[];
  Ring ring;
  ring.base = (shared_address(shared) + 1023) / 1024 * 1024;
  ring.barriers = ring.base + kRingBytes;
  let_successor_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(ring.barriers + i * 8, 1);
      barrier_init(ring.barriers + (kStages + i) * 8, 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) bring<kGated>(p, ring);
  } else {
    take_registers<232>();
    compute<kGated>(p, ring);
  }
}

template <bool kGated>
void launch(const WgmmaParams& p, cudaStream_t stream) {
  const int64_t tiles[2] = {
      p.map_table[0] ? p.max_tiles - p.num_shared_tiles : ceil_div(p.num_rows, kWgmmaTokens),
      p.map_table[0] ? p.num_shared_tiles : ceil_div(p.num_rows, kWgmmaTokens)};  // [2]
  const int64_t num_units =
      tiles[0] * ceil_div(p.max_rows[0], kUnitRows) + tiles[1] * ceil_div(p.max_rows[1], kUnitRows);
  launch_overlapped(wgmma_kernel<kGated>,
                    dim3(static_cast<unsigned>(std::min<int64_t>(num_units, p.num_multiprocessors))),
                    kThreads, kSharedBytes, stream, p, "wgmma_kernel");
}

}  // namespace

void run_linear_wgmma(const WgmmaParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  params.is_gated ? launch<true>(params, stream) : launch<false>(params, stream);
}

void prepare_linear_wgmma() {
  raise_shared_limit(wgmma_kernel<true>, kSharedBytes);
  raise_shared_limit(wgmma_kernel<false>, kSharedBytes);
}

}  // namespace rodin::cuda
