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
// Weights go straight into FP8 wgmma, inputs in two exact parts (split_values.cuh). A row of 2048 weights
// lies in shared memory as 16 rows of a matrix, 128 inputs each; the columns are the 16 blocks of inputs,
// their high parts and their low ones, and what counts is where row and column are the same block. Neither is
// swizzled, though the tensor core takes them so: it reads the 16-byte words of a row in an order that
// depends on the row's number modulo 8, which is the same for such a row and column.
#include "cuda/decode_moe.cuh"
#include "cuda/norm.cuh"
#include "cuda/route.cuh"
#include "cuda/split_values.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = kNormThreads / 32;  // that multiply
constexpr int kThreads = kNormThreads + 32;
constexpr int kClusterBlocks = 8;
constexpr int kGroups = kWarps / 4;  // warpgroups
constexpr int kUnitRows = 4;         // a warp of one warpgroup each
constexpr int kSlots = 3;            // units in the ring
constexpr int kRow = kDecodeInputs;
constexpr int kBlocks = kRow / kBlockK;
constexpr int kNormWords = kRow / (4 * kNormThreads);

struct ExpertRows {
  const char* gate;
  const char* up;
  const float* gate_scale;
  const float* up_scale;
};

struct Scratch {
  uint8_t rows[kSlots][2][kUnitRows * kRow];  // [kSlots, gate and up, kUnitRows, kRow]; at 1024 bytes
  uint8_t inputs[2][kRow];                    // [high and low parts, kRow]
  bf16 normed[kRow];
  float powers[kBlocks];
  ExpertRows table[kDecodeMostExperts + 1];
  float logits[kDecodeMostExperts];
  float scores[kDecodeMostExperts];
  uint32_t keys[kDecodeMostExperts];  // of the choices
  float route[kDecodeRouteFloats];
  int32_t ids[kDecodeMostChosen];
  float weights[kDecodeMostChosen];
  float norm[kWarps];
  uint64_t full[kSlots], empty[kSlots];
  uint64_t routed;  // all logits are here
  uint64_t chosen;  // ids are
};

struct Unit {
  int slot;  // of the token; -1: the shared expert
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
  // The first one, and the one behind unit i.
  __device__ __forceinline__ Unit first() const {
    return num_shared > 0 ? Unit{-1, first_shared * kUnitRows} : first_of_routed();
  }
  __device__ __forceinline__ Unit behind(const Unit& unit, int i) const {
    if (i + 1 == num_shared) return first_of_routed();
    if (unit.row0 + kUnitRows == each * kUnitRows && unit.slot >= 0) return {unit.slot + 1, 0};
    return {unit.slot, unit.row0 + kUnitRows};
  }

 private:
  __device__ __forceinline__ Unit first_of_routed() const {
    return {first_routed / each, first_routed % each * kUnitRows};
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

// The choice of ungrouped experts as route_registers makes it (route.cuh), by all warps: each takes eight
// experts and counts how many are better.
struct FewExperts {
  static constexpr int kEach = kDecodeMostExperts / kWarps;  // of a warp, 32 / kEach lanes each
  static_assert(kDecodeMostExperts == 64 && kEach == 8);
  float bias = 0;  // of expert kEach * warp + lane, in lanes below kEach

  __device__ __forceinline__ void ask(const RouteKernelParams& p) {
    const int expert = kEach * (threadIdx.x / 32) + threadIdx.x % 32;
    if (threadIdx.x % 32 < kEach && expert < p.route.num_experts && p.correction_bias != nullptr)
      bias = __ldg(p.correction_bias + expert);
  }
  // Ids and scores of the chosen ones, best first.
  __device__ __forceinline__ void choose(const RouteKernelParams& p, Scratch& s) const {
    const int lane = threadIdx.x % 32, first = kEach * (threadIdx.x / 32);
    const int num_experts = static_cast<int>(p.route.num_experts);
    barrier_wait(shared_address(&s.routed), 0);
    __syncwarp();
    float max = 0, sum = 0;
    if (p.route.scoring_func == ScoringFunc::kSoftmax) {
      const float a = lane < num_experts ? s.logits[lane] : kBanned;
      const float b = lane + 32 < num_experts ? s.logits[lane + 32] : kBanned;
      max = warp_max(fmaxf(a, b));
      sum = warp_sum(expf(a - max) + expf(b - max));
    }
    if (lane < kEach) {
      const int expert = first + lane;
      const float logit = expert < num_experts ? s.logits[expert] : kBanned;
      const float score = p.route.scoring_func == ScoringFunc::kSigmoid ? 1.0f / (1.0f + expf(-logit))
                                                                        : expf(logit - max) / sum;
      const float choice = p.correction_bias != nullptr ? score + bias : score;
      s.scores[expert] = score;
      s.keys[expert] = expert < num_experts && choice != kBanned ? key_of(choice + 0.0f) : 0;
    }
    group_sync<1, kNormThreads>();
    constexpr int kLanes = 32 / kEach, kOthers = kDecodeMostExperts / kLanes;
    const int expert = first + lane / kLanes, other = lane % kLanes * kOthers;
    const uint32_t key = s.keys[expert];
    int rank = 0;
#pragma unroll
    for (int i = 0; i < kOthers; i += 4) {
      const uint4 keys = *reinterpret_cast<const uint4*>(&s.keys[other + i]);
      const auto count = [&](uint32_t its, int n) {
        rank += its > key || (its == key && other + n < expert);
      };
      count(keys.x, i), count(keys.y, i + 1), count(keys.z, i + 2), count(keys.w, i + 3);
    }
    rank += __shfl_xor_sync(kAllLanes, rank, 1);
    rank += __shfl_xor_sync(kAllLanes, rank, 2);
    if (lane % kLanes == 0 && rank < p.route.experts_per_token)
      s.ids[rank] = expert, s.weights[rank] = s.scores[expert];
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.chosen));
  }
};

// The choice to device memory, by one warp; weights of ungrouped experts are scores so far.
__device__ __forceinline__ void give_choice(const DecodeExpertsParams& p, const Scratch& s) {
  const RouteParams& route = p.route.route;
  const int lane = threadIdx.x % 32, k = static_cast<int>(route.experts_per_token);
  if (lane < k) {
    float weight = s.weights[lane];
    if (is_route_ungrouped(route)) {
      float sum = 0;
      for (int j = 0; j < k; ++j) sum += s.weights[j];
      if (route.norm_topk_prob && k > 1) weight = weight / (sum + 1e-20f);
      weight *= route.routed_scaling_factor;
    }
    p.route.expert_ids[lane] = s.ids[lane];
    p.route.expert_weights[lane] = weight;
    __threadfence();
  }
  __syncwarp();
}

// The warp that copies.
__device__ __forceinline__ void copy_units(const DecodeExpertsParams& p, Scratch& s, const Units& units) {
  const int lane = threadIdx.x % 32;
  const int num_experts = static_cast<int>(p.route.route.num_experts);
  const DecodeExperts& experts = p.experts;
  constexpr uint32_t bytes = kUnitRows * kRow;
  const uint64_t policy = read_once_policy();
  const auto copy = [&](int slot, const char* gate, const char* up, int row0) {
    if (is_elected()) {
      const uint32_t barrier = shared_address(&s.full[slot]), to = shared_address(s.rows[slot]);
      const int64_t at = static_cast<int64_t>(row0 / kUnitRows) * bytes;
      barrier_expect(barrier, 2 * bytes);
      copy_once(to, gate + at, bytes, barrier, policy);
      copy_once(to + bytes, up + at, bytes, barrier, policy);
    }
    __syncwarp();
  };
  if (lane == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(shared_address(&s.full[i]), 1);
      barrier_init(shared_address(&s.empty[i]), kWarps);
    }
    barrier_init(shared_address(&s.routed), 1);
    barrier_init(shared_address(&s.chosen), is_route_ungrouped(p.route.route) ? kWarps : 1);
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
  Unit unit = units.first();
  for (int i = 0; i < ahead; ++i) {
    copy(i, static_cast<const char*>(experts.shared_gate.data),
         static_cast<const char*>(experts.shared_up.data), unit.row0);
    unit = units.behind(unit, i);
  }

  wait_for_predecessor();
  __syncthreads();
  __syncthreads();
  if (!is_route_ungrouped(p.route.route)) {
    RouteKernelParams route = p.route;
    route.logits = s.logits;
    route.plan = {};
    route.expert_ids = s.ids;
    route.expert_weights = s.weights;
    barrier_wait(shared_address(&s.routed), 0);
    __syncwarp();
    route_grouped(route, 0, s.route);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.chosen));
  }
  barrier_wait(shared_address(&s.chosen), 0);
  __syncwarp();
  if (blockIdx.x == 0) give_choice(p, s);
  // The kernel behind reads the choice as soon as it begins.
  let_successor_begin();
  int slot = ahead % kSlots;
  for (int i = ahead; i < units.count; ++i) {
    const ExpertRows& rows = s.table[unit.slot < 0 ? num_experts : s.ids[unit.slot]];
    if (i >= kSlots) {
      barrier_wait(shared_address(&s.empty[slot]), (i / kSlots - 1) % 2);
      __syncwarp();
    }
    copy(slot, rows.gate, rows.up, unit.row0);
    unit = units.behind(unit, i);
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
  }
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

// Eight normed inputs of each thread in their two parts.
__device__ __forceinline__ void split_inputs(Scratch& s) {
  const uint4 words = reinterpret_cast<const uint4*>(s.normed)[threadIdx.x];
  const float values[8] = {low_float(words.x), high_float(words.x), low_float(words.y), high_float(words.y),
                           low_float(words.z), high_float(words.z), low_float(words.w), high_float(words.w)};
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max_or_nan(most, fabsf(values[i]));
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2)
    most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
  const SplitPower power(most);
  uint2 high, low;
  split_eight(values, power.power, high, low);
  reinterpret_cast<uint2*>(s.inputs[0])[threadIdx.x] = high;
  reinterpret_cast<uint2*>(s.inputs[1])[threadIdx.x] = low;
  if (threadIdx.x % 16 == 0) s.powers[threadIdx.x / 16] = power.scale;
  shared_fence();
  group_sync<1, kNormThreads>();
}

// A lane's scales of a unit: of blocks g and g + 8.
struct Scales {
  float gate[2], up[2];
};

// 72 registers: a quarter of a multiprocessor that has three of these warps has room for four of the kernel
// ahead, or two of the one behind.
__global__ void __launch_bounds__(kThreads, 3)
    decode_experts_kernel(const __grid_constant__ DecodeExpertsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Scratch& s = *reinterpret_cast<Scratch*>(shared);
  const Units units(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == kWarps) return copy_units(p, s, units);
  const int g = lane / 4, t = lane % 4;
  // The lane that gets its blocks' sums asks for the scales that they take, a unit ahead.
  const bool is_sum = t == g / 2;
  Scales next = {};
  const auto ask = [&](int row0, const WeightView& like, const float* gate, const float* up) {
    if (!is_sum) return;
    const int row = row0 / like.block_rows * like.scale_cols;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      next.gate[b] = scale_at(gate + row, g + 8 * b, like.blocks_per_scale);
      next.up[b] = scale_at(up + row, g + 8 * b, like.blocks_per_scale);
    }
  };
  const auto ask_unit = [&](const Unit& unit) {
    if (unit.slot < 0)
      return ask(unit.row0, p.experts.shared_gate, p.experts.shared_gate.scale, p.experts.shared_up.scale);
    const ExpertRows& rows = s.table[s.ids[unit.slot]];
    ask(unit.row0, p.experts.routed_gate, rows.gate_scale, rows.up_scale);
  };
  const int group = __shfl_sync(kAllLanes, warp / kUnitRows, 0);
  Unit unit = units.first();
  const Unit own = group > 0 ? units.behind(unit, 0) : unit;  // this warpgroup's first
  if (own.slot < 0) ask_unit(own);
  FewExperts few;
  const bool is_ungrouped = is_route_ungrouped(p.route.route);
  if (is_ungrouped) few.ask(p.route);
  norm_and_route(p, s);
  if (is_ungrouped) few.choose(p.route, s);
  split_inputs(s);
  const float powers[2] = {s.powers[g], s.powers[g + 8]};
  const uint64_t inputs = matrix_descriptor(shared_address(s.inputs));
  bool is_chosen = false;
  int slot = 0;
  uint32_t parity = 0;
  for (int i = 0; i < units.count; ++i) {
    const Unit following = units.behind(unit, i);
    // Every warp waits for every unit: one that ran ahead would take a later filling of a place for its own.
    const uint32_t full = shared_address(&s.full[slot]), empty = shared_address(&s.empty[slot]);
    if (i % kGroups != group) {
      barrier_wait(full, parity);
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
      if (++slot == kSlots) slot = 0, parity ^= 1;
      unit = following;
      continue;
    }
    if (unit.slot >= 0 && !is_chosen) {
      barrier_wait(shared_address(&s.chosen), 0);
      __syncwarp();
      is_chosen = true;
      ask_unit(unit);
    }
    const Scales scales = next;
    const Unit own = units.behind(following, i + 1);  // the next of this warpgroup
    if (i + kGroups < units.count && (own.slot < 0 || is_chosen)) ask_unit(own);
    barrier_wait(full, parity);
    __syncwarp();
    float gate[16], up[16];  // row lane / 4 of 8 j + .., see hopper.cuh
    const uint64_t gate_rows = matrix_descriptor(shared_address(s.rows[slot][0]));
    const uint64_t up_rows = matrix_descriptor(shared_address(s.rows[slot][1]));
    pin(gate), pin(up);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_m64k32_e4m3(gate, gate_rows + 2 * k, inputs + 2 * k, k > 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_m64k32_e4m3(up, up_rows + 2 * k, inputs + 2 * k, k > 0);
    products_commit();
    products_wait<0>();
    pin(gate), pin(up);
    if (lane == 0) barrier_arrive(empty);
    if (++slot == kSlots) slot = 0, parity ^= 1;
    // Blocks g and g + 8, each the sum of its high part and of a sixteenth of its low one.
    const auto sum_of = [&](const float (&d)[16], const float (&scale)[2]) {
      const float first = g % 2 ? fmaf(d[9], 0.0625f, d[1]) : fmaf(d[8], 0.0625f, d[0]);
      const float second = g % 2 ? fmaf(d[15], 0.0625f, d[7]) : fmaf(d[14], 0.0625f, d[6]);
      return warp_sum(is_sum ? first * (scale[0] * powers[0]) + second * (scale[1] * powers[1]) : 0.0f);
    };
    const float gated = silu(sum_of(gate, scales.gate)) * sum_of(up, scales.up);
    if (lane == 0) {
      bf16* out = unit.slot < 0 ? static_cast<bf16*>(p.shared_mid)
                                : static_cast<bf16*>(p.routed_mid) + unit.slot * p.routed_stride;
      out[unit.row0 + warp % kUnitRows] = __float2bfloat16_rn(gated);
    }
    unit = following;
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
  // So that the kernels ahead and behind have room beside it.
  RODIN_CUDA(cudaFuncSetAttribute(decode_experts_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
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
  return p.num_clusters > 0 && p.norm.num_rows == 1 && p.norm.delta != nullptr && p.norm.cols == kRow &&
         is_norm_in_registers(p.norm) && p.router.dtype == Dtype::kBF16 && p.router.bias == nullptr &&
         p.router.cols == p.norm.cols && route.num_experts <= kDecodeMostExperts &&
         route.experts_per_token <= kDecodeMostChosen && route_scratch(route) <= kDecodeRouteFloats &&
         is_mlp_rows(experts.routed_gate, p.norm.cols) &&
         (!has_shared ||
          (is_mlp_rows(experts.shared_gate, p.norm.cols) && is_mlp_rows(experts.shared_up, p.norm.cols)));
}

void run_decode_experts(const DecodeExpertsParams& params, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(params.num_clusters, attributes, stream);
  RODIN_CUDA(cudaLaunchKernelEx(&config, decode_experts_kernel, params), " of decode_experts_kernel");
}

}  // namespace rodin::cuda
