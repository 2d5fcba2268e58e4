// From the residual to the chosen experts' silu(gate) * up, for one token: residual + delta, its norm
// (norm.cuh), the router, the choice of experts (route.cuh), gate and up of them and of the shared expert.
//
// decode_experts_kernel: clusters of 8 blocks, as many as the device runs side by side; 8 warps that multiply
// and one that copies. A block makes the logits of an eighth of the experts and sends them to its cluster, so
// that every block chooses for itself: no launch and no round over device memory between router and experts.
// A unit is 4 rows of gate and the same rows of up, one of each a warp; two warpgroups take units in turn,
// which go through a ring in shared memory. A block's are neighbouring ones of the shared expert, asked for
// before the kernel ahead has ended, then neighbouring ones of the routed experts, and last those that nobody
// has taken yet (a count in device memory): multiprocessors do not get equal shares of the bandwidth.
//
// Weights go straight into FP8 wgmma, inputs in two exact parts (split_values.cuh). A row of 2048 weights
// lies in shared memory as 16 rows of a matrix, 128 inputs each; the columns are the 16 blocks of inputs,
// their high parts and their low ones, and what counts is where row and column are the same block. Neither is
// swizzled, though the tensor core takes them so: it reads the 16-byte words of a row in an order that
// depends on the row's number modulo 8, which is the same for such a row and column.
#include "cuda/decode_experts.cuh"

namespace rodin::cuda {
namespace {

// The copying warp's end of the ring.
struct RingFeed {
  Scratch& s;
  const uint64_t policy = read_once_policy();
  int slot = 0, count = 0;

  __device__ __forceinline__ void wait_for_place() {
    if (count >= kSlots) barrier_wait(shared_address(&s.empty[slot]), (count / kSlots - 1) % 2);
    __syncwarp();
  }
  __device__ __forceinline__ void advance() {
    __syncwarp();
    ++count;
    if (++slot == kSlots) slot = 0;
  }
  // scale_row: of the expert's scales.
  __device__ __forceinline__ void put(const Unit& unit, const ExpertRows& rows, int scale_row) {
    constexpr uint32_t bytes = kUnitRows * kRow, scale_bytes = kBlocks * 4;
    wait_for_place();
    if (is_elected()) {
      const uint32_t barrier = shared_address(&s.full[slot]), to = shared_address(s.rows[slot]);
      const int64_t at = static_cast<int64_t>(unit.row0) * kRow;
      s.units[slot] = unit;
      barrier_expect(barrier, 2 * (bytes + scale_bytes));
      copy_once(to, rows.gate + at, bytes, barrier, policy);
      copy_once(to + bytes, rows.up + at, bytes, barrier, policy);
      copy_bulk(shared_address(s.scales[slot][0]), rows.gate_scale + scale_row * kBlocks, scale_bytes,
                barrier);
      copy_bulk(shared_address(s.scales[slot][1]), rows.up_scale + scale_row * kBlocks, scale_bytes, barrier);
    }
    advance();
  }
  __device__ __forceinline__ void put_end() {
    wait_for_place();
    if (is_elected()) {
      s.units[slot] = {kEnd, 0};
      barrier_arrive(shared_address(&s.full[slot]));
    }
    advance();
  }
};

// The warp that copies.
__device__ __forceinline__ void copy_units(const DecodeExpertsParams& p, Scratch& s) {
  const int lane = threadIdx.x % 32, block = blockIdx.x, grid = gridDim.x;
  const int num_experts = static_cast<int>(p.route.route.num_experts);
  const DecodeExperts& experts = p.experts;
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
  for (int e = lane; e < num_experts; e += 32)
    s.table[e] = {static_cast<const char*>(experts.gate[e].data),
                  static_cast<const char*>(experts.up[e].data), experts.gate[e].scale, experts.up[e].scale};
  cluster_wait();

  RingFeed ring{s};
  const ExpertRows shared = {static_cast<const char*>(experts.shared_gate.data),
                             static_cast<const char*>(experts.shared_up.data), experts.shared_gate.scale,
                             experts.shared_up.scale};
  const int num_shared = experts.shared_gate.rows / kUnitRows;
  int next_shared = num_shared * block / grid;
  const int last_shared = num_shared * (block + 1) / grid;
  const auto put_shared = [&](int most) {
    for (; next_shared < last_shared && ring.count < most; ++next_shared)
      ring.put({kShared, next_shared * kUnitRows}, shared,
               next_shared * kUnitRows / experts.shared_gate.block_rows);
  };
  put_shared(kSlots);

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
  if (block == 0) give_choice(p, s);
  put_shared(INT_MAX);

  const int each = experts.routed_gate.rows / kUnitRows;
  const int num_routed = each * static_cast<int>(p.route.route.experts_per_token);
  const int own = num_routed * kOwnSixteenths / 16 / grid, num_taken = num_routed - own * grid;
  const auto put_routed = [&](int index) {
    const int slot = index / each, row0 = (index - slot * each) * kUnitRows;
    ring.put({slot, row0}, s.table[s.ids[slot]], row0 / experts.routed_gate.block_rows);
  };
  const auto take = [&] {
    int ticket = 0;
    if (lane == 0) ticket = static_cast<int>(atomicAdd(p.taken, 1u));
    return ticket;
  };
  for (int i = 0; i < own; ++i) {
    put_routed(block * own + i);
    // The kernel behind reads the choice as soon as it begins, and brings more than there is bandwidth for.
    if (i + 1 == kHeadStart) let_successor_begin();
  }
  int ticket = __shfl_sync(kAllLanes, take(), 0);
  while (ticket < num_taken) {
    const int following = take();  // on its way while this one waits for a place
    put_routed(own * grid + ticket);
    ticket = __shfl_sync(kAllLanes, following, 0);
  }
  ring.put_end();
}

// 72 registers: a quarter of a multiprocessor that has three of these warps has room for four of the kernel
// ahead, or two of the one behind.
__global__ void __launch_bounds__(kThreads, 3)
    decode_experts_kernel(const __grid_constant__ DecodeExpertsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Scratch& s = *reinterpret_cast<Scratch*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == kWarps) return copy_units(p, s);
  FewExperts few;
  const bool is_ungrouped = is_route_ungrouped(p.route.route);
  if (is_ungrouped) few.ask(p.route);
  norm_and_route(p, s);
  if (is_ungrouped) few.choose(p.route, s);
  split_inputs(s);

  const int g = lane / 4, t = lane % 4, group = __shfl_sync(kAllLanes, warp / kUnitRows, 0);
  const bool is_sum = t == g / 2;  // the lane that gets the sums of blocks g and g + 8
  const float powers[2] = {s.powers[g], s.powers[g + 8]};
  const uint64_t inputs = matrix_descriptor(shared_address(s.inputs));
  int slot = 0;
  uint32_t parity = 0;
  for (int i = 0;; ++i) {
    // Every warp waits for every unit: one that ran ahead would take a later filling of a place for its own.
    barrier_wait(shared_address(&s.full[slot]), parity);
    __syncwarp();
    const Unit unit = s.units[slot];
    if (unit.slot == kEnd) break;
    const uint32_t empty = shared_address(&s.empty[slot]);
    if (i % kGroups != group) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
      if (++slot == kSlots) slot = 0, parity ^= 1;
      continue;
    }
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
    float scales[2][2];  // [gate and up, blocks g and g + 8]
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int b = 0; b < 2; ++b) scales[which][b] = s.scales[slot][which][g + 8 * b] * powers[b];
    products_wait<0>();
    pin(gate), pin(up);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
    if (++slot == kSlots) slot = 0, parity ^= 1;
    // Of each block the sum of its high part and of a sixteenth of its low one.
    const auto sum_of = [&](const float (&d)[16], const float (&scale)[2]) {
      const float first = g % 2 ? fmaf(d[9], 0.0625f, d[1]) : fmaf(d[8], 0.0625f, d[0]);
      const float second = g % 2 ? fmaf(d[15], 0.0625f, d[7]) : fmaf(d[14], 0.0625f, d[6]);
      return warp_sum(is_sum ? first * scale[0] + second * scale[1] : 0.0f);
    };
    const float gated = silu(sum_of(gate, scales[0])) * sum_of(up, scales[1]);
    if (lane == 0) {
      bf16* out = unit.slot == kShared ? static_cast<bf16*>(p.shared_mid)
                                       : static_cast<bf16*>(p.routed_mid) + unit.slot * p.routed_stride;
      out[unit.row0 + warp % kUnitRows] = __float2bfloat16_rn(gated);
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
         w.rows % kUnitRows == 0 && w.block_rows % kUnitRows == 0 && w.blocks_per_scale == 1;
}

}  // namespace

int32_t prepare_decode_experts() {
  raise_shared_limit(decode_experts_kernel, static_cast<int>(sizeof(Scratch)));
  keep_shared_memory(decode_experts_kernel);
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
          (is_mlp_rows(experts.shared_gate, p.norm.cols) && is_mlp_rows(experts.shared_up, p.norm.cols) &&
           experts.shared_up.rows == experts.shared_gate.rows &&
           experts.shared_up.block_rows == experts.shared_gate.block_rows));
}

void run_decode_experts(const DecodeExpertsParams& params, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(params.num_clusters, attributes, stream);
  RODIN_CUDA(cudaLaunchKernelEx(&config, decode_experts_kernel, params), " of decode_experts_kernel");
}

}  // namespace rodin::cuda
