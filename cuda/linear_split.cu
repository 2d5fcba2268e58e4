// Linear layers of few tokens with FP8 weights, at the memory's speed: the weights go from shared memory into
// wgmma as the copies brought them, without an instruction that widens them.
//
// An input has 8 significant bits, e4m3 has 4. For each token and block of kBlockK inputs, v = x * 2^n with
// the largest |v| in [2^7, 2^8) is split into high = e4m3(v) and low = e4m3(16 (v - high)): high + low / 16
// is v for all inputs within 2^-13 of the block's largest, and v to 2^-22 of the largest below that. Weights
// are the 64 rows of an instruction, high and low of a token two of its columns:
//   out[t][r] = sum over blocks of w_scale * 2^-n * (sum_k w[r][k] high[t][k] + sum_k w[r][k] low[t][k] / 16),
// inner sums by the tensor core (which keeps about 14 bits below the largest of 32 products), outer ones in
// float32. A token's arithmetic depends neither on the number of tokens nor on its place among them.
//
// A unit is 64 rows of weights (gated: 32 of gate and the same 32 of up) and a tile of kTokens tokens. Blocks,
// about as many as there are multiprocessors, walk over units. Warps: 0 to 3 and 4 to 7 are two warpgroups that
// take even and odd blocks of inputs; 8 to 11 split inputs; a thread of warp 12 brings weights. A ring of
// stages, each of 64 x kBlockK weights and the tile's split inputs, runs on from unit to unit. Barriers of a
// stage: full (bytes arrived, inputs written), empty (four warps have read it). Weights do not depend on the
// kernel ahead: what can be known of them is on its way before that has ended.
//
// Matrices of few rows have 2 or 4 segments of inputs, by their shape alone. Where there is one unit for each
// cluster, its blocks take a segment each or several; sums of all segments and warpgroups meet in the first
// block's shared memory and are added in rising order there.
#include <algorithm>

#include "cuda/hopper.cuh"

namespace rodin::cuda {
namespace {

constexpr int kUnitRows = kSplitRows;
constexpr int kStageWeights = kUnitRows * kBlockK;  // bytes
constexpr int kConsumerWarps = 8;
constexpr int kConverterWarps = 4;
constexpr int kHalfWarps = 2 * kConverterWarps;
constexpr int kThreads = 32 * (kConsumerWarps + kConverterWarps + 1);
constexpr int kMaxStages = 16;
constexpr int kSumPitch = 72;  // floats from one token to the next
constexpr int kHalfShared = 112 << 10;  // so that two blocks fit on a multiprocessor
constexpr int kWholeShared = 225 << 10;
constexpr int kMaxSegments = 4;

struct Layout {
  int inputs, factors, sums, barriers, bytes;  // offsets from the stages' base; weights are first
};

__host__ __device__ constexpr Layout layout_of(int tokens, bool is_gated, int stages, int segments) {
  Layout l = {};
  l.inputs = stages * kStageWeights;
  l.factors = l.inputs + stages * 2 * tokens * kBlockK;
  l.sums = l.factors + stages * (is_gated ? 2 : 1) * tokens * 4;
  l.barriers = l.sums + 2 * segments * tokens * kSumPitch * 4;
  l.bytes = l.barriers + (2 * stages + 1) * 8 + 1024;  // 1024: to align the base
  return l;
}

// ---- units ----------------------------------------------------------------------------------------------

struct Unit {
  int first;  // in the order of the plan, or the first token
  int count;
  int expert;
  int io;
  int row0;
  int begin, end;  // blocks of inputs that this block of threads takes
};

// The units of this block of threads, one after the other. What belongs to the plan is read once it is there.
template <int kTokens, bool kGated>
struct Units {
  static constexpr int kRows = kGated ? kUnitRows / 2 : kUnitRows;
  const SplitParams& p;
  int rank;  // in the cluster
  int turn = 0;
  int total = -1;  // -1: not known yet

  __device__ Units(const SplitParams& params, int cluster_rank) : p(params), rank(cluster_rank) {}

  __device__ int row_units(int io) const { return (p.max_rows[io] + kRows - 1) / kRows; }

  __device__ bool next(Unit& unit) {
    // Every other turn runs backwards, so that who began with a long unit gets no second one of the longer
    // kind.
    const int stride = gridDim.x / p.cluster, own = blockIdx.x / p.cluster;
    const int i = turn * stride + (turn % 2 ? stride - 1 - own : own);
    ++turn;
    if (p.map_table[0] != nullptr) {
      // The shared expert first: which weights it has is known.
      const int shared_rows = row_units(1), shared = p.num_shared_tiles * shared_rows;
      if (i < shared) {
        unit.io = 1;
        unit.expert = p.num_experts;
        unit.first = i / shared_rows * kTokens;
        unit.count = min(kTokens, p.num_tokens - unit.first);
        unit.row0 = i % shared_rows * kRows;
      } else {
        const int rows = row_units(0);
        if (total < 0) {
          if (!p.is_plan_ready) wait_for_predecessor();
          total = shared + (*p.plan.num_tiles - p.num_shared_tiles) * rows;
        }
        if (i >= total) return false;
        const MoeTile tile = p.plan.tiles[(i - shared) / rows];
        unit.io = 0;
        unit.expert = tile.expert;
        unit.first = tile.first;
        unit.count = tile.count;
        unit.row0 = (i - shared) % rows * kRows;
      }
    } else {
      const int tiles = (p.num_tokens + kTokens - 1) / kTokens;
      const int rows0 = row_units(0), row_unit = i / tiles;
      if (row_unit >= rows0 + row_units(1)) return false;
      unit.io = row_unit >= rows0;
      unit.expert = 0;
      unit.first = i % tiles * kTokens;
      unit.count = min(kTokens, p.num_tokens - unit.first);
      unit.row0 = (row_unit - (unit.io ? rows0 : 0)) * kRows;
    }
    const int blocks = num_blocks(unit.io);
    unit.begin = segment_begin(first_segment(unit.io), unit.io, blocks);
    unit.end = segment_begin(end_segment(unit.io), unit.io, blocks);
    return true;
  }
  __device__ int num_blocks(int io) const { return (p.cols[io] + kBlockK - 1) / kBlockK; }
  __device__ int first_segment(int io) const { return rank * p.segments[io] / p.cluster; }
  __device__ int end_segment(int io) const { return (rank + 1) * p.segments[io] / p.cluster; }
  __device__ int segment_begin(int segment, int io, int blocks) const {
    return segment * blocks / p.segments[io];
  }
  __device__ const WeightView& weight(const Unit& unit, int which) const {
    return p.table[0] != nullptr ? p.table[which][unit.expert] : p.weight[kGated ? which : unit.io];
  }
  __device__ int row_of(const Unit& unit, int token) const {
    const bool is_ordered = p.map_table[0] != nullptr && unit.io == 0;
    return is_ordered ? p.plan.order[unit.first + token] : unit.first + token;
  }
};

struct Ring {
  uint32_t base;
  uint32_t barriers;  // full [stages], empty [stages]
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int count) {
    stage += count;
    if (stage >= stages) stage -= stages, parity ^= 1;
  }
  __device__ uint32_t weights() const { return base + stage * kStageWeights; }
  __device__ uint32_t full() const { return barriers + stage * 8; }
  __device__ uint32_t empty() const { return barriers + (stages + stage) * 8; }
};

// ---- weights --------------------------------------------------------------------------------------------

template <int kTokens, bool kGated>
__device__ __forceinline__ void bring(const SplitParams& p, Ring ring, int rank) {
  Units<kTokens, kGated> units(p, rank);
  Unit unit;
  while (units.next(unit)) {
    const bool is_grouped = p.map_table[0] != nullptr;
    const TensorMap* const map0 = is_grouped ? p.map_table[0] + unit.expert : p.maps + (kGated ? 0 : unit.io);
    const TensorMap* const map1 = is_grouped ? p.map_table[1] + unit.expert : p.maps + 1;
    if (is_grouped) {
      map_fence(map0);
      if constexpr (kGated) map_fence(map1);
    }
    for (int block = unit.begin; block < unit.end; ++block) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), kStageWeights);
      copy_box(ring.weights(), map0, block * kBlockK, unit.row0, ring.full());
      if constexpr (kGated)
        copy_box(ring.weights() + kStageWeights / 2, map1, block * kBlockK, unit.row0, ring.full());
      ring.advance(1);
    }
  }
}

// ---- inputs ---------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_eight(const bf16* row, int k, int cols, bool is_aligned) {
  if (row == nullptr || k >= cols) return make_uint4(0, 0, 0, 0);
  // Not through the read-only path: the kernel before this one may have written them while this one ran.
  if (k + 8 <= cols && is_aligned) return *reinterpret_cast<const uint4*>(row + k);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(row);
  uint32_t words[4] = {};  // [4]
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (k + i < cols) words[i / 2] |= static_cast<uint32_t>(bits[k + i]) << (i % 2 * 16);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Two e4m3 values of two f16, `low` of the pair in the low byte.
__device__ __forceinline__ uint32_t e4m3_of_half(__half2 pair) {
  uint16_t out;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(out) : "r"(*reinterpret_cast<const uint32_t*>(&pair)));
  return out;
}

// High and low parts of two inputs times `power`.
__device__ __forceinline__ void split_pair(uint32_t pair, float power, uint32_t& high, uint32_t& low) {
  const __half2 v = __floats2half2_rn(low_float(pair) * power, high_float(pair) * power);
  high = e4m3_of_half(v);
  const uint32_t back = half_of_e4m3(high);
  const __half2 rest = __hsub2(v, *reinterpret_cast<const __half2*>(&back));
  low = e4m3_of_half(__hmul2(rest, __float2half2_rn(16.0f)));
}

// Half a warp takes one block of inputs of one token at a time, a lane 8 of them. Where tiles have fewer
// tokens than there are half-warps, groups of `p.groups` half-warps take neighbouring stages.
template <int kTokens, bool kGated>
__device__ __forceinline__ void convert(const SplitParams& p, Ring ring, int rank, const Layout& layout) {
  constexpr int kItems = (kTokens + kHalfWarps - 1) / kHalfWarps;  // tokens of a half-warp in a stage
  constexpr int kScales = kGated ? 2 : 1;
  const int half_warp = threadIdx.x / 16 - 2 * kConsumerWarps, lane = threadIdx.x % 16;
  const int groups = kTokens >= kHalfWarps ? kHalfWarps : p.groups, step = kHalfWarps / groups;
  const int slot = half_warp % groups;
  wait_for_predecessor();
  if (p.is_successor_held) let_successor_begin();

  Units<kTokens, kGated> units(p, rank);
  Unit unit = {};
  const bf16* rows[kItems] = {};  // [kItems]
  const float* scales = nullptr;
  int blocks_per_scale = 1;
  int position = half_warp / groups, unit_position = 0, length = 0;  // in the stream of stages
  bool is_there = true;
  uint4 x[kItems];  // [kItems] of `position`
  float scale = 0;
  const auto load = [&] {
    while (is_there && position - unit_position >= length) {
      unit_position += length;
      is_there = units.next(unit);
      if (!is_there) break;
      length = unit.end - unit.begin;
      const LinearIo& io = p.io[unit.io];
      const int divisor = p.map_table[0] != nullptr && unit.io == 0 ? p.x_divisor : 1;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int token = slot + i * kHalfWarps;
        rows[i] = token < unit.count
                      ? static_cast<const bf16*>(io.x) + units.row_of(unit, token) / divisor * io.x_stride
                      : nullptr;
      }
      const WeightView& weight = units.weight(unit, kGated ? lane % 2 : 0);
      const int row = min(unit.row0, p.max_rows[unit.io] - 1);
      scales = weight.scale + row / weight.block_rows * weight.scale_cols;
      blocks_per_scale = weight.blocks_per_scale;
    }
    if (!is_there) return;
    const int block = unit.begin + position - unit_position;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      x[i] = load_eight(rows[i], block * kBlockK + lane * 8, p.cols[unit.io], p.is_x_aligned);
    scale = __ldg(scales + (blocks_per_scale == 1 ? block : block / blocks_per_scale));
  };
  ring.advance(position);
  load();
  while (__any_sync(kAllLanes, is_there)) {
    const bool is_now = is_there;
    const int count = unit.count;
    const float weight_scale = scale;
    uint4 now[kItems];  // [kItems]
#pragma unroll
    for (int i = 0; i < kItems; ++i) now[i] = x[i];
    position += step;
    load();
    if (is_now) barrier_wait(ring.empty(), ring.parity ^ 1);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (kItems > 1 && i * kHalfWarps >= count) break;  // the same in both halves: one group
      const uint32_t pairs[4] = {now[i].x, now[i].y, now[i].z, now[i].w};  // [4]
      uint32_t most = 0;  // magnitudes of bf16 rise with their bits
#pragma unroll
      for (int j = 0; j < 4; ++j) most = max(most, max(pairs[j] & 0x7fffu, pairs[j] >> 16 & 0x7fffu));
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2)
        most = max(most, __shfl_xor_sync(kAllLanes, most, offset));
      const uint32_t exponent = max(most >> 7, 8u);
      const float power = __uint_as_float((261 - exponent) << 23);
      // An infinity or a NaN makes the whole block NaN.
      const float inverse = __uint_as_float(exponent == 255 ? 0x7fffffffu : (exponent - 7) << 23);
      uint32_t high[4], low[4];  // [4]
#pragma unroll
      for (int j = 0; j < 4; ++j) split_pair(pairs[j], power, high[j], low[j]);
      const int token = slot + i * kHalfWarps;
      if (is_now && token < count) {
        // Row 2 token and 2 token + 1 of 128 bytes; 16-byte words change places within 8 rows (hopper.cuh).
        const uint32_t inputs = ring.base + layout.inputs + ring.stage * (2 * kTokens * kBlockK);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int row = 2 * token + part;
          const uint32_t to = inputs + row * kBlockK + (lane / 2 ^ row % 8) * 16 + lane % 2 * 8;
          const uint32_t(&bytes)[4] = part ? low : high;
          asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(bytes[0] | bytes[1] << 16),
                       "r"(bytes[2] | bytes[3] << 16)
                       : "memory");
        }
        if (lane < kScales) {
          const uint32_t to =
              ring.base + layout.factors + ((ring.stage * kScales + lane) * kTokens + token) * 4;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(weight_scale * inverse) : "memory");
        }
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (is_now && lane == 0) barrier_arrive(ring.full());
    ring.advance(step);
  }
}

// ---- products -------------------------------------------------------------------------------------------

__device__ __forceinline__ float load_shared(uint32_t from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
  return value;
}

template <int kTokens>
__device__ __forceinline__ void multiply(float (&acc)[kTokens], const Ring& ring, const Layout& layout) {
  const uint64_t a = matrix_descriptor(ring.weights());
  const uint64_t b = matrix_descriptor(ring.base + layout.inputs + ring.stage * (2 * kTokens * kBlockK));
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_m64k32_e4m3(acc, a + 2 * step, b + 2 * step, step != 0);
  products_commit();
}

// total += factor * sum; token 4 j + t has its high and low sums in columns 8 j + 2 t and the next.
template <int kTokens>
__device__ __forceinline__ void promote(float (&total)[kTokens / 4][2], const float (&acc)[kTokens],
                                        uint32_t factors) {
#pragma unroll
  for (int j = 0; j < kTokens / 4; ++j) {
    const float factor = load_shared(factors + (4 * j + threadIdx.x % 4) * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = fmaf(acc[4 * j + 2 * half + 1], 0.0625f, acc[4 * j + 2 * half]);
      total[j][half] = fmaf(factor, sum, total[j][half]);
    }
  }
}

__device__ __forceinline__ void consumer_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumerWarps) : "memory");
}

template <int kTokens, bool kGated>
__device__ __forceinline__ void store_unit(const SplitParams& p, const Units<kTokens, kGated>& units,
                                           const Unit& unit, uint32_t sums) {
  constexpr int kRows = kGated ? kUnitRows / 2 : kUnitRows;
  const int num_sums = 2 * p.segments[unit.io];
  const float* const bias = p.table[0] == nullptr ? p.weight[kGated ? 0 : unit.io].bias : nullptr;
  for (int o = threadIdx.x; o < kRows * unit.count; o += 32 * kConsumerWarps) {
    const int token = o / kRows, row = unit.row0 + o % kRows;
    if (row >= p.max_rows[unit.io]) continue;
    const uint32_t at = sums + (token * kSumPitch + o % kRows) * 4;
    float value = 0, up = 0;
    for (int i = 0; i < num_sums; ++i) {
      value += load_shared(at + i * kTokens * kSumPitch * 4);
      if constexpr (kGated) up += load_shared(at + (i * kTokens * kSumPitch + kRows) * 4);
    }
    if (bias) value += bias[row];
    if constexpr (kGated) value = value / (1.0f + expf(-value)) * up;
    const LinearIo& io = p.io[unit.io];
    static_cast<bf16*>(io.out)[units.row_of(unit, token) * io.out_stride + row] = __float2bfloat16_rn(value);
  }
}

template <int kTokens, bool kGated>
__device__ __forceinline__ void consume(const SplitParams& p, Ring ring, int rank, const Layout& layout,
                                        uint32_t done) {
  constexpr int kScales = kGated ? 2 : 1;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t sums = ring.base + layout.sums;
  uint32_t to_sums = sums, to_done = done;  // of the cluster's first block
  if (p.cluster > 1) {
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(to_sums) : "r"(sums));
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(to_done) : "r"(done));
  }
  const auto factors_of = [&](const Ring& at) {
    return ring.base + layout.factors + (at.stage * kScales + (kGated ? warp / 2 : 0)) * kTokens * 4;
  };
  const auto release = [&](const Ring& at) {
    __syncwarp();
    if (lane == 0) barrier_arrive(at.empty());
  };
  Units<kTokens, kGated> units(p, rank);
  wait_for_predecessor();
  Unit unit;
  float acc0[kTokens], acc1[kTokens];  // [kTokens]
  while (units.next(unit)) {
    const int blocks = units.num_blocks(unit.io);
    for (int segment = units.first_segment(unit.io); segment < units.end_segment(unit.io); ++segment) {
      const int begin = units.segment_begin(segment, unit.io, blocks);
      const int end = units.segment_begin(segment + 1, unit.io, blocks);
      float total[kTokens / 4][2] = {};  // [kTokens / 4, row half]
      Ring own = ring;
      own.advance(group);
      int block = begin + group;
      for (; block + 2 < end; block += 4) {
        Ring second = own;
        second.advance(2);
        barrier_wait(own.full(), own.parity);
        products_begin();
        multiply<kTokens>(acc0, own, layout);
        barrier_wait(second.full(), second.parity);
        multiply<kTokens>(acc1, second, layout);
        products_wait<1>();
        promote<kTokens>(total, acc0, factors_of(own));
        release(own);
        products_wait<0>();
        promote<kTokens>(total, acc1, factors_of(second));
        release(second);
        own = second;
        own.advance(2);
      }
      if (block < end) {
        barrier_wait(own.full(), own.parity);
        products_begin();
        multiply<kTokens>(acc0, own, layout);
        products_wait<0>();
        promote<kTokens>(total, acc0, factors_of(own));
        release(own);
      }
      for (int left = end - begin; left > 0; left -= ring.stages) ring.advance(min(left, ring.stages));
      const uint32_t to = to_sums + (2 * segment + group) * kTokens * kSumPitch * 4;
#pragma unroll
      for (int j = 0; j < kTokens / 4; ++j) {
        const int token = 4 * j + lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (token >= unit.count) continue;
          const uint32_t at = to + (token * kSumPitch + 16 * warp + lane / 4 + 8 * half) * 4;
          if (p.cluster > 1) {
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(total[j][half]) : "memory");
          } else {
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(total[j][half]) : "memory");
          }
        }
      }
    }
    if (p.cluster > 1) {  // the only unit
      __syncwarp();
      if (lane == 0) {
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(to_done) : "memory");
      }
      if (rank != 0) return;
      asm volatile(
          "{\n.reg .pred done;\nagain:\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
          "@!done bra again;\n}\n" ::"r"(done)
          : "memory");
      store_unit<kTokens, kGated>(p, units, unit, sums);
      return;
    }
    consumer_barrier();
    store_unit<kTokens, kGated>(p, units, unit, sums);
    consumer_barrier();  // everybody has read what the next unit overwrites
  }
}

template <int kTokens, bool kGated>
__global__ void __launch_bounds__(kThreads, kTokens <= 16 ? 2 : 1)
    split_kernel(const __grid_constant__ SplitParams p) {
  extern __shared__ __align__(16) char shared[];
  const Layout layout =
      layout_of(kTokens, kGated, p.num_stages, max(p.segments[0], p.segments[1]));
  Ring ring;
  ring.stages = p.num_stages;
  ring.base = (shared_address(shared) + 1023) / 1024 * 1024;
  ring.barriers = ring.base + layout.barriers;
  const uint32_t done = ring.barriers + 2 * p.num_stages * 8;
  if (!p.is_successor_held) let_successor_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.num_stages; ++i) {
      barrier_init(ring.barriers + i * 8, 1 + (kTokens >= kHalfWarps ? kHalfWarps : p.groups));
      barrier_init(ring.barriers + (p.num_stages + i) * 8, kConsumerWarps / 2);
    }
    barrier_init(done, kConsumerWarps * p.cluster);
    barrier_init_fence();
  }
  __syncthreads();
  int rank = 0;
  if (p.cluster > 1) {  // nobody writes to a block that has not begun
    rank = blockIdx.x % p.cluster;
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  const int warp = threadIdx.x / 32;
  if (warp < kConsumerWarps) {
    consume<kTokens, kGated>(p, ring, rank, layout, done);
  } else if (warp < kConsumerWarps + kConverterWarps) {
    convert<kTokens, kGated>(p, ring, rank, layout);
  } else if (threadIdx.x % 32 == 0) {
    bring<kTokens, kGated>(p, ring, rank);
  }
}

// ---- launches -------------------------------------------------------------------------------------------

// Segments of inputs of a matrix: so many that four units of 64 rows or two nearly fill 132 multiprocessors.
// A function of the shape alone, because sums depend on it.
int segments_of(int rows, int cols) {
  const int64_t units = ceil_div(rows, kUnitRows), blocks = ceil_div(cols, kBlockK);
  if (units <= 33 && blocks >= 4) return 4;
  return units <= 66 && blocks >= 2 ? 2 : 1;
}

template <int kTokens, bool kGated>
void launch(SplitParams p, cudaStream_t stream) {
  constexpr int kRows = kGated ? kUnitRows / 2 : kUnitRows;
  const bool is_grouped = p.map_table[0] != nullptr;
  const int64_t tiles = is_grouped ? p.max_tiles - p.num_shared_tiles : ceil_div(p.num_tokens, kTokens);
  const int64_t units = tiles * ceil_div(p.max_rows[0], kRows) +
                        (is_grouped ? p.num_shared_tiles : tiles) * ceil_div(p.max_rows[1], kRows);
  p.cluster = 1;
  for (int io = 0; io < 2; ++io) {
    p.segments[io] = kGated || is_grouped ? 1 : segments_of(std::max(p.max_rows[io], 1), p.cols[io]);
  }
  const bool has_second = p.max_rows[1] != 0;
  if (!has_second) p.segments[1] = p.segments[0];
  const int least = std::min(p.segments[0], p.segments[1]);
  while (p.cluster < least && units * p.cluster * 2 <= p.num_multiprocessors) p.cluster *= 2;
  p.groups = 1;
  while (p.groups < kHalfWarps && p.groups < std::min(p.most_tokens, kTokens)) p.groups *= 2;
  const int most = kTokens <= 16 ? kHalfShared : kWholeShared;
  const int segments = std::max(p.segments[0], p.segments[1]);
  p.num_stages = kMaxStages;
  while (layout_of(kTokens, kGated, p.num_stages, segments).bytes > most) --p.num_stages;
  const int64_t grid = p.cluster > 1 ? units * p.cluster : std::min<int64_t>(units, p.num_multiprocessors);

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(p.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = layout_of(kTokens, kGated, p.num_stages, segments).bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = p.cluster > 1 ? 2 : 1;
  RODIN_CUDA(cudaLaunchKernelEx(&config, split_kernel<kTokens, kGated>, p), " of split_kernel");
}

template <int kTokens>
void launch_tokens(const SplitParams& p, cudaStream_t stream) {
  p.is_gated ? launch<kTokens, true>(p, stream) : launch<kTokens, false>(p, stream);
}

template <int kTokens>
void prepare() {
  for (const void* kernel : {reinterpret_cast<const void*>(split_kernel<kTokens, true>),
                             reinterpret_cast<const void*>(split_kernel<kTokens, false>)}) {
    const int bytes = kTokens <= 16 ? kHalfShared : kWholeShared;
    RODIN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), " to ", bytes);
  }
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
