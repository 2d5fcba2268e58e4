// From the residual to the chosen experts' silu(gate) * up, for one token: residual + delta, its norm
// (norm.cuh), the router, the choice of experts (route.cuh), gate and up of them and of the shared expert.
//
// decode_experts_kernel: clusters of 8 blocks, as many as the device runs side by side; 8 warps that multiply
// and one that copies. A block makes the logits of an eighth of the experts and sends them to its cluster, so
// that every block chooses for itself: no launch and no round over device memory between router and experts.
// A unit is 8 rows of gate and the same rows of up, one of each a warp. Units are dealt to blocks in turn:
// the shared expert's come first and are asked for before the kernel ahead has ended, the routed ones' when
// they are chosen. They go through a ring in shared memory.
//
// A row of gate and its row of up are one 16-row tile of the tensor core: row p is the eighth p of gate's
// row, row p + 8 that of up's, column p the eighth p of the inputs, so that the sums are on the diagonals.
// Weights and inputs are f16 (decode_moe.cuh).
#include "cuda/decode_moe.cuh"
#include "cuda/norm.cuh"
#include "cuda/route.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = kNormThreads / 32;  // that multiply
constexpr int kThreads = kNormThreads + 32;
constexpr int kClusterBlocks = 8;
constexpr int kUnitRows = kWarps;
constexpr int kSlots = 3;  // units in the ring
constexpr int kRow = kDecodeMostInputs;
constexpr int kPart = kRow / 8;  // inputs of a row of the tile
constexpr int kNormWords = kRow / (4 * kNormThreads);

struct ExpertRows {
  const char* gate;
  const char* up;
  const float* gate_scale;
  const float* up_scale;
};

struct Scratch {
  uint8_t rows[kSlots][2][kUnitRows * kRow];  // [kSlots, gate and up, kUnitRows, H]
  bf16 normed[kRow];
  ExpertRows table[kDecodeMostExperts + 1];
  float logits[kDecodeMostExperts];
  float route[kDecodeRouteFloats];
  int32_t ids[kDecodeMostChosen];
  float weights[kDecodeMostChosen];
  float norm[kWarps];
  uint64_t full[kSlots], empty[kSlots];
  uint64_t routed;  // all logits are here
  uint64_t chosen;  // ids are
};

struct Unit {
  int expert;  // E: the shared one
  int slot;    // of the token
  int row0;
};

// A block's units: neighbouring ones of the shared expert, then neighbouring ones of the routed experts, so
// that a block reads few pages.
struct Units {
  int each;  // of a routed expert
  int first_shared, num_shared, first_routed, count;

  __device__ __forceinline__ explicit Units(const DecodeExpertsParams& p) {
    const int shared = p.experts.shared_gate.rows / kUnitRows;
    each = p.experts.routed_gate.rows / kUnitRows;
    const int all = shared + each * static_cast<int>(p.route.route.experts_per_token);
    const auto begin_of = [](int total, int block) {
      return static_cast<int>(static_cast<uint32_t>(total * block) / gridDim.x);
    };
    const int block = blockIdx.x;
    first_shared = begin_of(shared, block);
    num_shared = begin_of(shared, block + 1) - first_shared;
    first_routed = begin_of(all, block) - first_shared;
    count = begin_of(all, block + 1) - begin_of(all, block);
  }
  __device__ __forceinline__ Unit at(const DecodeExpertsParams& p, const int32_t* ids, int i) const {
    if (i < num_shared)
      return {static_cast<int>(p.route.route.num_experts), 0, (first_shared + i) * kUnitRows};
    const int index = first_routed + i - num_shared, slot = index / each;
    return {ids[slot], slot, (index - slot * each) * kUnitRows};
  }
};

// Barriers that were initialised with a fence are seen by the cluster behind it; nothing else is.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// `value` to the same place in block `rank` of the cluster, counted at its barrier.
__device__ __forceinline__ void send(uint32_t to, float value, uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 address, remote;\n"
      "mapa.shared::cluster.u32 address, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [address], %1, [remote];\n}\n" ::"r"(to),
      "r"(__float_as_uint(value)), "r"(barrier), "r"(rank)
      : "memory");
}

// The warp that copies.
__device__ __forceinline__ void copy_units(const DecodeExpertsParams& p, Scratch& s, const Units& units) {
  const int lane = threadIdx.x % 32;
  const int num_experts = static_cast<int>(p.route.route.num_experts);
  const DecodeExperts& experts = p.experts;
  const uint32_t bytes = kUnitRows * static_cast<uint32_t>(experts.routed_gate.row_bytes);
  const uint64_t policy = read_once_policy();
  const auto copy = [&](int slot, const char* gate, const char* up, int row0) {
    if (is_elected()) {
      const uint32_t barrier = shared_address(&s.full[slot]), to = shared_address(s.rows[slot]);
      const int64_t at = static_cast<int64_t>(row0 / kUnitRows) * bytes;
      barrier_expect(barrier, 2 * bytes);
      copy_once(to, gate + at, bytes, barrier, policy);
      copy_once(to + kUnitRows * kRow, up + at, bytes, barrier, policy);
    }
    __syncwarp();
  };
  if (lane == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(shared_address(&s.full[i]), 1);
      barrier_init(shared_address(&s.empty[i]), kWarps);
    }
    barrier_init(shared_address(&s.routed), 1);
    barrier_init(shared_address(&s.chosen), 1);
    barrier_init_fence();
    barrier_expect(shared_address(&s.routed), 4 * num_experts);
  }
  __syncwarp();
  cluster_arrive();
  const int num_tables = num_experts + (experts.shared_gate.rows > 0 ? 1 : 0);
  for (int e = lane; e < num_tables; e += 32)
    s.table[e] = {static_cast<const char*>(experts.gate[e].data),
                  static_cast<const char*>(experts.up[e].data), experts.gate[e].scale, experts.up[e].scale};
  cluster_wait();
  const int ahead = min(units.num_shared, kSlots);
  for (int i = 0; i < ahead; ++i)
    copy(i, static_cast<const char*>(experts.shared_gate.data),
         static_cast<const char*>(experts.shared_up.data), units.at(p, s.ids, i).row0);

  RouteKernelParams route = p.route;
  route.logits = s.logits;
  route.plan = {};
  route.expert_ids = s.ids;
  route.expert_weights = s.weights;
  const auto wait_for_logits = [&] {
    wait_for_predecessor();
    __syncthreads();
    __syncthreads();
    barrier_wait(shared_address(&s.routed), 0);
    __syncwarp();
  };
  if (is_route_ungrouped(route.route)) {
    route_ungrouped(route, 0, wait_for_logits);
  } else {
    wait_for_logits();
    route_grouped(route, 0, s.route);
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(shared_address(&s.chosen));
  if (blockIdx.x == 0 && lane < p.route.route.experts_per_token) {
    p.route.expert_ids[lane] = s.ids[lane];
    p.route.expert_weights[lane] = s.weights[lane];
    __threadfence();
  }
  __syncwarp();
  // The kernel behind reads the choice as soon as it begins.
  let_successor_begin();
  int slot = ahead % kSlots;
  for (int i = ahead; i < units.count; ++i) {
    const Unit unit = units.at(p, s.ids, i);
    const ExpertRows& rows = s.table[unit.expert];
    if (i >= kSlots) {
      barrier_wait(shared_address(&s.empty[slot]), (i / kSlots - 1) % 2);
      __syncwarp();
    }
    copy(slot, rows.gate, rows.up, unit.row0);
    if (++slot == kSlots) slot = 0;
  }
}

// residual + delta and its norm, this warp's share of the logits to all blocks of the cluster.
__device__ __forceinline__ void norm_and_route(const DecodeExpertsParams& p, Scratch& s) {
  const NormParams& n = p.norm;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_experts = static_cast<int>(p.route.route.num_experts);
  constexpr int kWords = kRow / 256;  // of 8 inputs
  const int rank = blockIdx.x % kClusterBlocks;
  uint4 router[kWords];  // [kWords] of an expert
  const auto load = [&](int expert) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int col = (i * 32 + lane) * 8;
      router[i] = expert < num_experts && col < n.cols
                      ? load_streaming(static_cast<const char*>(p.router.data) + expert * p.router.row_bytes +
                                       col * 2)
                      : make_uint4(0, 0, 0, 0);
    }
  };
  int expert = rank * kWarps + warp;
  load(expert);
  float4 weight[kNormWords], value[kNormWords], added[kNormWords];  // [kNormWords]
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    if (norm_column(i) < n.cols) weight[i] = load_four(n.weight + norm_column(i));
    if (norm_column(i) >= n.cols) *reinterpret_cast<uint2*>(s.normed + norm_column(i)) = make_uint2(0, 0);
  }
  // Parts behind a row's end meet inputs of zero and must not hold a NaN.
  for (int i = threadIdx.x; n.cols < kRow && i < static_cast<int>(sizeof(s.rows)) / 16; i += kNormThreads)
    reinterpret_cast<uint4*>(s.rows)[i] = make_uint4(0, 0, 0, 0);
  if (n.cols < kRow) shared_fence();
  cluster_arrive();
  cluster_wait();
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    if (norm_column(i) >= n.cols) break;
    value[i] = load_four(static_cast<const float*>(n.x) + norm_column(i));
    added[i] = load_four(static_cast<const bf16*>(n.delta) + norm_column(i));
  }
  add_words<kNormWords>(value, added, n.cols);
  const float inverse = inverse_rms(norm_sum<kNormWords>(value, n.cols, s.norm), n.cols, n.eps);
  store_normed<kNormWords>(value, weight, inverse, n.cols, s.normed);
  __syncthreads();
  while (expert < num_experts) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(s.normed + (i * 32 + lane) * 8);
      const auto add = [&](uint32_t w, uint32_t v) {
        sum[0] = fmaf(low_float(w), low_float(v), sum[0]);
        sum[1] = fmaf(high_float(w), high_float(v), sum[1]);
      };
      add(router[i].x, x.x), add(router[i].y, x.y), add(router[i].z, x.z), add(router[i].w, x.w);
    }
    const float logit = warp_sum(sum[0] + sum[1]);
    if (lane < kClusterBlocks)
      send(shared_address(&s.logits[expert]), logit, shared_address(&s.routed), lane);
    expert += kClusterBlocks * kWarps;
    if (expert < num_experts) load(expert);
  }
}

// A lane's scales of a unit.
struct Scales {
  float gate[2], up[2];  // [2 blocks of inputs]
};

__global__ void __launch_bounds__(kThreads, 2)
    decode_experts_kernel(const __grid_constant__ DecodeExpertsParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  Scratch& s = *reinterpret_cast<Scratch*>(shared);
  const Units units(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == kWarps) return copy_units(p, s, units);
  const int g = lane / 4, t = lane % 4, swap = g % 2;
  const int cols = p.norm.cols;
  // The lane that gets its part's sums asks for the scales that they take, a unit ahead.
  const bool is_sum = t == g / 2;
  const int block0 = g * (kPart / kBlockK);
  const int num_blocks = (cols + kBlockK - 1) / kBlockK;
  Scales next = {};
  const auto ask = [&](int row0, const WeightView& like, const float* gate, const float* up) {
    if (!is_sum) return;
    const int row = row0 / like.block_rows * like.scale_cols;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (block0 + b >= num_blocks) break;
      next.gate[b] = scale_at(gate + row, block0 + b, like.blocks_per_scale);
      next.up[b] = scale_at(up + row, block0 + b, like.blocks_per_scale);
    }
  };
  const auto ask_unit = [&](int i) {
    const Unit unit = units.at(p, s.ids, i);
    if (i < units.num_shared)
      return ask(unit.row0, p.experts.shared_gate, p.experts.shared_gate.scale, p.experts.shared_up.scale);
    ask(unit.row0, p.experts.routed_gate, s.table[unit.expert].gate_scale, s.table[unit.expert].up_scale);
  };
  if (units.num_shared > 0) ask_unit(0);
  norm_and_route(p, s);

  // Odd parts take their halves of 128 inputs in the other order: no two lanes meet in a bank.
  uint32_t x[4][8];  // [64 inputs, 8]
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4* from = reinterpret_cast<const uint4*>(s.normed + g * kPart + (i ^ swap) * 64 + t * 16);
    const uint4 a = from[0], b = from[1];
    most = max(most, max(most_magnitude(a), most_magnitude(b)));
    x[i][0] = a.x, x[i][1] = a.y, x[i][2] = a.z, x[i][3] = a.w;
    x[i][4] = b.x, x[i][5] = b.y, x[i][6] = b.z, x[i][7] = b.w;
  }
  most = max(most, __shfl_xor_sync(kAllLanes, most, 1));
  most = max(most, __shfl_xor_sync(kAllLanes, most, 2));
  const HalfPower power(most);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] = power.halves(x[i][j]);

  int slot = 0;
  uint32_t parity = 0;
  for (int i = 0; i < units.count; ++i) {
    const bool is_shared = i < units.num_shared;
    if (i == units.num_shared) {
      barrier_wait(shared_address(&s.chosen), 0);
      __syncwarp();
      ask_unit(i);
    }
    const Scales scales = next;
    if (i + 1 < units.count && i + 1 != units.num_shared) ask_unit(i + 1);
    barrier_wait(shared_address(&s.full[slot]), parity);
    __syncwarp();
    const uint8_t* const gate_row = s.rows[slot][0] + warp * cols + g * kPart + t * 16;
    float acc[2][4] = {};  // [block, 4]
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 gate = *reinterpret_cast<const uint4*>(gate_row + (k ^ swap) * 64);
      const uint4 up = *reinterpret_cast<const uint4*>(gate_row + kUnitRows * kRow + (k ^ swap) * 64);
      multiply_halves(acc[k / 2], gate, up, x[k]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.empty[slot]));
    if (++slot == kSlots) slot = 0, parity ^= 1;
    float gate = 0, up = 0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      gate = fmaf(scales.gate[b], swap ? acc[b][1] : acc[b][0], gate);
      up = fmaf(scales.up[b], swap ? acc[b][3] : acc[b][2], up);
    }
    gate = warp_sum(is_sum ? gate * power.inverse : 0.0f);
    up = warp_sum(is_sum ? up * power.inverse : 0.0f);
    if (lane == 0) {
      const Unit unit = units.at(p, s.ids, i);
      bf16* out = is_shared ? static_cast<bf16*>(p.shared_mid)
                            : static_cast<bf16*>(p.routed_mid) + unit.slot * p.routed_stride;
      out[unit.row0 + warp] = __float2bfloat16_rn(silu(gate) * up);
    }
  }
}

cudaLaunchConfig_t config_of(int num_clusters, cudaLaunchAttribute* attributes, cudaStream_t stream) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kClusterBlocks;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_clusters * kClusterBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Scratch);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

bool is_mlp_rows(const WeightView& w, int32_t cols) {
  return w.dtype == Dtype::kF8E4M3 && w.bias == nullptr && w.cols == cols && w.row_bytes == cols &&
         w.rows % kUnitRows == 0 && w.block_rows % kUnitRows == 0;
}

}  // namespace

int32_t prepare_decode_experts() {
  RODIN_CUDA(cudaFuncSetAttribute(decode_experts_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(sizeof(Scratch))));
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(1, attributes, nullptr);
  int count = 0;
  RODIN_CUDA(cudaOccupancyMaxActiveClusters(&count, decode_experts_kernel, &config));
  int device = 0, multiprocessors = 0;
  RODIN_CUDA(cudaGetDevice(&device));
  RODIN_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return std::min(count, multiprocessors / kClusterBlocks);
}

bool is_decode_experts(const DecodeExpertsParams& p) {
  const RouteParams& route = p.route.route;
  const DecodeExperts& experts = p.experts;
  const bool has_shared = experts.shared_gate.rows > 0;
  return p.num_clusters > 0 && p.norm.num_rows == 1 && p.norm.delta != nullptr && p.norm.cols <= kRow &&
         p.norm.cols % 16 == 0 && is_norm_in_registers(p.norm) && p.router.dtype == Dtype::kBF16 &&
         p.router.bias == nullptr && p.router.cols == p.norm.cols &&
         route.num_experts <= kDecodeMostExperts && route.experts_per_token <= kDecodeMostChosen &&
         route_scratch(route) <= kDecodeRouteFloats && is_mlp_rows(experts.routed_gate, p.norm.cols) &&
         (!has_shared ||
          (is_mlp_rows(experts.shared_gate, p.norm.cols) && is_mlp_rows(experts.shared_up, p.norm.cols)));
}

void run_decode_experts(const DecodeExpertsParams& params, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(params.num_clusters, attributes, stream);
  RODIN_CUDA(cudaLaunchKernelEx(&config, decode_experts_kernel, params), " of decode_experts_kernel");
}

}  // namespace rodin::cuda
