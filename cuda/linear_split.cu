// Linear layers of few tokens with FP8 weights, at the memory's speed: the weights go from shared memory into
// wgmma as the copies brought them, without an instruction that widens them.
//
// An input has 8 significant bits, e4m3 has 4: it comes as two e4m3 values and a power of two for each token
// and kBlockK inputs (quantize.cu), x = 2^n (high + low / 16). Weights are the 64 rows of an instruction,
// high and low of a token two of its columns:
//   out[t][r] = sum over blocks of w_scale * 2^n * (sum_k w[r][k] high[t][k] + sum_k w[r][k] low[t][k] / 16),
// inner sums by the tensor core (which keeps about 14 bits below the largest of 32 products), outer ones in
// float32. A token's arithmetic depends neither on the number of tokens nor on its place among them.
//
// A unit is 64 rows of weights (gated: 32 of gate and the same 32 of up) and a tile of kTokens tokens. As
// many blocks as there are multiprocessors walk over units. Warps 0 to 3 and 4 to 7 are two warpgroups that
// take even and odd blocks of inputs, their sums meet in shared memory; warp 8 brings weights, warp 9 inputs
// and scales into a ring of stages that runs on from unit to unit. Barriers of a stage: full (both have
// expected their bytes, these and the weights' scales are there), empty (the four warps that take it have
// read it). Weights do not depend on the kernel ahead: they are on their way before that has ended.
#include <algorithm>

#include "cuda/hopper_narrow.cuh"
#include "cuda/read_once.cuh"
#include "cuda/split_units.cuh"

namespace rodin::cuda {
namespace {

constexpr int kConsumerWarps = 8;
constexpr int kThreads = 32 * (kConsumerWarps + 2);
constexpr int kMaxStages = 16;
constexpr int kHalfShared = 112 << 10;  // so that two blocks fit on a multiprocessor
constexpr int kWholeShared = 225 << 10;

// ---- copies ---------------------------------------------------------------------------------------------

// The first stages' weights come while the kernel ahead runs.
template <int kTokens, bool kGated>
__device__ __forceinline__ void bring_weights(const SplitParams& p, SplitRing ring) {
  const bool is_grouped = p.map_table[0] != nullptr;
  int num_brought = 0;
  const uint64_t policy = read_once_policy();
  SplitUnits<kTokens, kGated> units(p);
  SplitUnit unit;
  while (units.next(unit)) {
    const TensorMap* const map0 = is_grouped ? p.map_table[0] + unit.expert : p.maps + (kGated ? 0 : unit.io);
    const TensorMap* const map1 = is_grouped ? p.map_table[1] + unit.expert : p.maps + 1;
    if (is_grouped) {
      map_fence(map0);
      if constexpr (kGated) map_fence(map1);
    }
    const int cols = units.num_blocks(unit) * kBlockK;
    for (int col = 0; col < cols; col += kBlockK) {
      if (num_brought++ == ring.stages) wait_for_predecessor();
      // One thread waits and the others for it: threads that left a loop of waiting one after the other would
      // each elect one of their own.
      if (threadIdx.x % 32 == 0) barrier_wait(ring.empty(), ring.parity ^ 1);
      __syncwarp();
      if (is_elected()) {
        barrier_expect(ring.full(), kSplitStageWeights);
        copy_box_once(ring.weights(), map0, col, unit.row0, ring.full(), policy);
        if constexpr (kGated)
          copy_box_once(ring.weights() + kSplitStageWeights / 2, map1, col, unit.row0, ring.full(), policy);
      }
      ring.advance();
    }
  }
  wait_for_predecessor();
}

// Inputs and their scales; lane i writes the weights' scales of every 32nd block of inputs, which it holds
// one round and one unit ahead.
template <int kTokens, bool kGated>
__device__ __forceinline__ void bring_inputs(const SplitParams& p, SplitRing ring,
                                             const SplitLayout& layout) {
  constexpr int kBytes = 2 * kTokens * kBlockK + input_scale_bytes(kTokens);
  const int lane = threadIdx.x % 32;
  const bool is_grouped = p.map_table[0] != nullptr;
  SplitUnits<kTokens, kGated> units(p);
  SplitUnit unit, ahead;
  const float* scales[2];       // [2] of the unit ahead
  float next[2] = {}, held[2];  // [2]
  int per_scale = 1;
  const auto load_scales = [&](int block, int num_blocks) {
#pragma unroll
    for (int which = 0; which < (kGated ? 2 : 1); ++which)
      if (block + lane < num_blocks) next[which] = __ldg(scales[which] + (block + lane) / per_scale);
  };
  const auto look_ahead = [&] {
    if (!units.next(ahead)) return false;
#pragma unroll
    for (int which = 0; which < (kGated ? 2 : 1); ++which) {
      const WeightView& weight =
          is_grouped ? p.table[which][ahead.expert] : p.weight[kGated ? which : ahead.io];
      scales[which] =
          weight.scale + min(ahead.row0, p.max_rows[ahead.io] - 1) / weight.block_rows * weight.scale_cols;
      per_scale = weight.blocks_per_scale;
    }
    load_scales(0, units.num_blocks(ahead));
    return true;
  };
  bool is_there = look_ahead();
  wait_for_predecessor();
  while (is_there) {
    unit = ahead;
    const int num_blocks = units.num_blocks(unit);
    for (int block = 0; block < num_blocks; ++block) {
      if (block % 32 == 0) {
        held[0] = next[0], held[1] = next[1];
        if (block + 32 < num_blocks) {
          load_scales(block + 32, num_blocks);
        } else {
          is_there = look_ahead();
        }
      }
      if (lane == 0) barrier_wait(ring.empty(), ring.parity ^ 1);
      __syncwarp();
      if (lane == block % 32) {
        asm volatile(
            "st.shared.v2.f32 [%0], {%1, %2};" ::"r"(ring.base + layout.weight_scales + ring.stage * 8),
            "f"(held[0]), "f"(held[1])
            : "memory");
        barrier_arrive(ring.full());
      }
      __syncwarp();
      if (is_elected()) {
        barrier_expect(ring.full(), kBytes);
        copy_box(ring.base + layout.inputs + ring.stage * (2 * kTokens * kBlockK), p.x + unit.io,
                 block * kBlockK, 2 * unit.first, ring.full());
        copy_box(ring.base + layout.input_scales + ring.stage * input_scale_pitch(kTokens),
                 p.x_scale + unit.io, unit.first / 4 * 4, block, ring.full());
      }
      ring.advance();
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------

__device__ __forceinline__ float load_shared(uint32_t from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
  return value;
}

template <int kTokens>
__device__ __forceinline__ void multiply(float (&acc)[kTokens], const SplitRing& ring,
                                         const SplitLayout& layout) {
  const uint64_t a = matrix_descriptor(ring.weights());
  const uint64_t b = matrix_descriptor(ring.base + layout.inputs + ring.stage * (2 * kTokens * kBlockK));
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_m64k32_e4m3(acc, a + 2 * step, b + 2 * step, step != 0);
  products_commit();
}

// Scales of a stage's products: of the weights times those of tokens 4 j + t. They are read before the
// products are waited for: long before the stage is given back.
template <int kTokens>
__device__ __forceinline__ void load_factors(float (&factors)[kTokens / 4], uint32_t input_scales,
                                             uint32_t weight_scale) {
  const float scale = load_shared(weight_scale);
#pragma unroll
  for (int j = 0; j < kTokens / 4; ++j) factors[j] = scale * load_shared(input_scales + 16 * j);
}

// total += factor * sum; token 4 j + t has its high and low sums in columns 8 j + 2 t and the next.
template <int kTokens>
__device__ __forceinline__ void promote(float (&total)[kTokens / 4][2], float (&acc)[kTokens],
                                        const float (&factors)[kTokens / 4]) {
#pragma unroll
  for (int i = 0; i < kTokens; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // nothing reads them before
#pragma unroll
  for (int j = 0; j < kTokens / 4; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = fmaf(acc[4 * j + 2 * half + 1], 0.0625f, acc[4 * j + 2 * half]);
      total[j][half] = fmaf(factors[j], sum, total[j][half]);
    }
}

__device__ __forceinline__ void consumer_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumerWarps) : "memory");
}

// Both warpgroups' sums of a unit, added, to where they belong.
template <int kTokens, bool kGated>
__device__ __forceinline__ void store_unit(const SplitParams& p, const SplitUnit& unit, uint32_t sums) {
  constexpr int kRows = kGated ? kSplitRows / 2 : kSplitRows;
  constexpr int kGroupBytes = kTokens * kSplitSumPitch * 4;
  const int local_row = threadIdx.x % kRows, row = unit.row0 + local_row;
  if (row >= p.max_rows[unit.io]) return;
  const float* const bias = p.table[0] == nullptr && !kGated ? p.weight[unit.io].bias : nullptr;
  const int32_t* const order = p.map_table[0] != nullptr && !kGated && unit.io == 0 ? p.plan.order : nullptr;
  const LinearIo& io = p.io[unit.io];
  for (int token = threadIdx.x / kRows; token < unit.count; token += 32 * kConsumerWarps / kRows) {
    const uint32_t at = sums + (token * kSplitSumPitch + local_row) * 4;
    float value = load_shared(at) + load_shared(at + kGroupBytes);
    if constexpr (kGated) {
      const float up = load_shared(at + kRows * 4) + load_shared(at + kGroupBytes + kRows * 4);
      value = value / (1.0f + expf(-value)) * up;
    }
    if (bias) value += bias[row];
    const int64_t to = order ? order[unit.first + token] : unit.first + token;
    static_cast<bf16*>(io.out)[to * io.out_stride + row] = __float2bfloat16_rn(value);
  }
}

template <int kTokens, bool kGated>
__device__ __forceinline__ void consume(const SplitParams& p, SplitRing ring, const SplitLayout& layout) {
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);  // which the compiler takes as uniform
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t sums = ring.base + layout.sums;
  const uint32_t own_sums =
      sums + (group * kTokens * kSplitSumPitch + lane % 4 * kSplitSumPitch + 16 * warp + lane / 4) * 4;
  const auto load = [&](float (&factors)[kTokens / 4], const SplitRing& at, int first) {
    load_factors<kTokens>(
        factors,
        ring.base + layout.input_scales + at.stage * input_scale_pitch(kTokens) + (first % 4 + lane % 4) * 4,
        ring.base + layout.weight_scales + at.stage * 8 + (kGated ? warp / 2 * 4 : 0));
#pragma unroll
    for (int j = 0; j < kTokens / 4; ++j) asm volatile("" : "+f"(factors[j])::"memory");
  };
  const auto release = [&](const SplitRing& at) {
    __syncwarp();
    if (lane == 0) barrier_arrive(at.empty());
  };
  wait_for_predecessor();
  SplitUnits<kTokens, kGated> units(p);
  SplitUnit unit;
  float acc0[kTokens], acc1[kTokens];  // [kTokens]
  while (units.next(unit)) {
    const int num_blocks = units.num_blocks(unit);
    float total[kTokens / 4][2] = {};  // [kTokens / 4, row half]
    SplitRing own = ring;
    own.advance(group);
    int block = group;
    // Two at a time where there are registers for it.
    float factors0[kTokens / 4], factors1[kTokens / 4];  // [kTokens / 4]
    for (; kTokens <= 16 && block + 2 < num_blocks; block += 4) {
      SplitRing second = own;
      second.advance(2);
      barrier_wait(own.full(), own.parity);
      products_begin();
      multiply<kTokens>(acc0, own, layout);
      load(factors0, own, unit.first);
      barrier_wait(second.full(), second.parity);
      products_begin();
      multiply<kTokens>(acc1, second, layout);
      load(factors1, second, unit.first);
      products_wait<1>();
      promote<kTokens>(total, acc0, factors0);
      release(own);
      products_wait<0>();
      promote<kTokens>(total, acc1, factors1);
      release(second);
      own = second;
      own.advance(2);
    }
    for (; block < num_blocks; block += 2, own.advance(2)) {
      barrier_wait(own.full(), own.parity);
      products_begin();
      multiply<kTokens>(acc0, own, layout);
      load(factors0, own, unit.first);
      products_wait<0>();
      promote<kTokens>(total, acc0, factors0);
      release(own);
    }
    for (int left = num_blocks; left > 0; left -= ring.stages) ring.advance(min(left, ring.stages));
#pragma unroll
    for (int j = 0; j < kTokens / 4; ++j) {
      if (4 * j + lane % 4 >= unit.count) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(own_sums + (4 * j * kSplitSumPitch + 8 * half) * 4),
                     "f"(total[j][half])
                     : "memory");
      }
    }
    consumer_barrier();
    store_unit<kTokens, kGated>(p, unit, sums);
    consumer_barrier();  // everybody has read what the next unit overwrites
  }
}

template <int kTokens, bool kGated>
__global__ void __launch_bounds__(kThreads, kTokens <= 16 ? 2 : 1)
    split_kernel(const __grid_constant__ SplitParams p) {
  extern __shared__ __align__(16) char shared[];
  const SplitLayout layout = split_layout(kTokens, p.num_stages);
  SplitRing ring;
  ring.stages = p.num_stages;
  ring.base = (shared_address(shared) + 1023) / 1024 * 1024;
  ring.barriers = ring.base + layout.barriers;
  let_successor_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.num_stages; ++i) {
      barrier_init(ring.barriers + i * 8, 3);
      barrier_init(ring.barriers + (p.num_stages + i) * 8, kConsumerWarps / 2);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (warp < kConsumerWarps) {
    consume<kTokens, kGated>(p, ring, layout);
  } else if (warp == kConsumerWarps) {
    bring_weights<kTokens, kGated>(p, ring);
  } else {
    bring_inputs<kTokens, kGated>(p, ring, layout);
  }
}

// ---- launches -------------------------------------------------------------------------------------------

template <int kTokens>
constexpr int kMostShared = kTokens <= 16 ? kHalfShared : kWholeShared;

template <int kTokens, bool kGated>
void launch(SplitParams p, cudaStream_t stream) {
  constexpr int kRows = kGated ? kSplitRows / 2 : kSplitRows;
  const bool is_grouped = p.map_table[0] != nullptr;
  const int64_t tiles = is_grouped ? p.max_tiles - p.num_shared_tiles : ceil_div(p.num_tokens, kTokens);
  const int64_t units = tiles * ceil_div(p.max_rows[0], kRows) +
                        (is_grouped ? p.num_shared_tiles : tiles) * ceil_div(p.max_rows[1], kRows);
  p.num_stages = kMaxStages;
  // An even number: within a unit a stage belongs to one of the warpgroups. One that ran ahead would
  // otherwise come to a stage that the other has not had yet, where its parity would let it pass.
  while (split_layout(kTokens, p.num_stages).bytes > kMostShared<kTokens>) p.num_stages -= 2;
  launch_overlapped(split_kernel<kTokens, kGated>,
                    dim3(static_cast<unsigned>(std::min<int64_t>(units, p.num_multiprocessors))), kThreads,
                    split_layout(kTokens, p.num_stages).bytes, stream, p, "split_kernel");
}

template <int kTokens>
void launch_tokens(const SplitParams& p, cudaStream_t stream) {
  p.is_gated ? launch<kTokens, true>(p, stream) : launch<kTokens, false>(p, stream);
}

template <int kTokens>
void prepare() {
  raise_shared_limit(split_kernel<kTokens, true>, kMostShared<kTokens>);
  raise_shared_limit(split_kernel<kTokens, false>, kMostShared<kTokens>);
}

}  // namespace

void run_linear_split(const SplitParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.max_rows[0] == 0) return;
  switch (params.tile_tokens) {
    case 4:
      return launch_tokens<4>(params, stream);
    case 8:
      return launch_tokens<8>(params, stream);
    case 16:
      return launch_tokens<16>(params, stream);
    case 32:
      return launch_tokens<32>(params, stream);
    default:
      fail("no kernel for tiles of ", params.tile_tokens, " tokens");
  }
}

void prepare_linear_split() {
  prepare<4>();
  prepare<8>();
  prepare<16>();
  prepare<32>();
}

}  // namespace rodin::cuda
