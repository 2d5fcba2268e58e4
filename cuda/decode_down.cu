// From the chosen experts' silu(gate) * up to the residual, for one token: down of each, rounded to bf16,
// their weighted sum with the shared expert, residual += delta, residual += the sum rounded to bf16.
//
// decode_down_kernel: a block has 16 rows of down of every chosen expert and of the shared one, so that the
// sum needs no other block; two warpgroups. Inputs are cut into pieces of at most 12 blocks of 128 (a shared
// expert as wide as two has two); a warpgroup takes every other piece, four at a time: all but the inputs is
// known before the kernel ahead has ended, so three pieces' weights come to shared memory then, and one's to
// registers, as much as there is room for beside that kernel.
//
// Weights go straight into FP8 wgmma, inputs in two exact parts (split_values.cuh): the 64 rows of a product
// are 16 rows of weights for each of four blocks of inputs, its 8 columns these blocks' high parts and their
// low ones, and what counts is where row and column are the same block: warp w's has block w. The order of a
// block's inputs is free where weights are in registers: a lane's two words of 16 bytes are what it feeds.
#include "cuda/decode_moe.cuh"
#include "cuda/split_values.cuh"

namespace rodin::cuda {
namespace {

constexpr int kGroups = 2;  // warpgroups
constexpr int kThreads = 128 * kGroups;
constexpr int kRows = 16;         // of a block
constexpr int kPieceBlocks = 12;  // blocks of inputs of a piece, at most
constexpr int kQuads = kPieceBlocks / 4;
constexpr int kSlots = 3;              // pieces of a warpgroup in shared memory
constexpr int kAtOnce = kSlots + 1;    // and one in registers
constexpr int kBox = kRows * kBlockK;  // bytes
constexpr int kMostPieces = 16;

// How inputs are cut: into `count` pieces of `blocks` blocks, of which the last may be shorter.
struct Cut {
  int count, blocks;
  __host__ __device__ explicit Cut(int cols) {
    const int all = (cols + kBlockK - 1) / kBlockK;
    count = (all + kPieceBlocks - 1) / kPieceBlocks;
    blocks = count == 0 ? 0 : (all + count - 1) / count;
  }
};

struct Piece {
  int slot;  // of the token; k: the shared expert
  int col, cols;
  __device__ __forceinline__ int num_blocks() const { return (cols + kBlockK - 1) / kBlockK; }
};

struct Pieces {
  Cut routed, shared;
  int num_routed, count;  // pieces

  __host__ __device__ explicit Pieces(const DecodeDownParams& p)
      : routed(p.experts.routed_down.cols), shared(p.experts.shared_down.cols) {
    num_routed = p.experts_per_token * routed.count;
    count = num_routed + shared.count;
  }
  __host__ __device__ int most_blocks() const {
    return routed.blocks > shared.blocks ? routed.blocks : shared.blocks;
  }
  __device__ __forceinline__ Piece at(const DecodeDownParams& p, int i) const {
    const bool is_shared = i >= num_routed;
    const Cut& cut = is_shared ? shared : routed;
    const int slot = is_shared ? p.experts_per_token : i / cut.count;
    const int col = (is_shared ? i - num_routed : i - slot * cut.count) * cut.blocks * kBlockK;
    const int cols = is_shared ? p.experts.shared_down.cols : p.experts.routed_down.cols;
    return {slot, col, min(cut.blocks * kBlockK, cols - col)};
  }
};

struct Scratch {
  uint8_t inputs[kGroups][kAtOnce][kQuads][8 * kBlockK];  // at 1024 bytes
  float powers[kGroups][kAtOnce][kPieceBlocks];           // of the inputs
  float scales[kGroups][kAtOnce][kPieceBlocks];           // of the weights
  float sums[kMostPieces][4][kRows];                      // [kMostPieces, warp, kRows]
  float outs[kMostPieces][kRows];
  float weights[kDecodeMostChosen];  // of the chosen experts
  uint64_t full[kGroups][kSlots];
  alignas(1024) uint8_t rows[];  // [kGroups, kSlots, most_blocks, kBox], then what a product reads too many
};

int shared_bytes(const Pieces& pieces) {
  const int blocks = pieces.most_blocks();
  return static_cast<int>(sizeof(Scratch)) + ((kGroups * kSlots - 1) * blocks + kPieceBlocks) * kBox;
}

// Weights of two rows and one block of inputs: bytes 16 t and 64 + 16 t of each on.
struct BlockWords {
  uint4 words[2][2];  // [row half, K half]
};

// A warpgroup's work.
struct Group {
  const DecodeDownParams& p;
  const Pieces& pieces;
  Scratch& s;
  int group, warp, lane, row0, count;  // of pieces

  __device__ __forceinline__ Group(const DecodeDownParams& params, const Pieces& all, Scratch& scratch)
      : p(params),
        pieces(all),
        s(scratch),
        group(__shfl_sync(kAllLanes, threadIdx.x / 128, 0)),
        warp(__shfl_sync(kAllLanes, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32),
        row0(blockIdx.x * kRows) {
    count = (pieces.count - group + kGroups - 1) / kGroups;
  }
  __device__ __forceinline__ int index(int i) const { return group + i * kGroups; }
  __device__ __forceinline__ int expert(const Piece& at) const {
    return at.slot == p.experts_per_token ? p.num_experts : __ldcg(p.expert_ids + at.slot);
  }
  __device__ __forceinline__ const WeightView& like(const Piece& at) const {
    return at.slot == p.experts_per_token ? p.experts.shared_down : p.experts.routed_down;
  }
  __device__ __forceinline__ void sync() const {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  }

  // Pieces base .. base + kSlots - 1 to shared memory, one a warp.
  __device__ __forceinline__ void copy(int base, uint64_t policy) const {
    if (warp >= kSlots || base + warp >= count) return;
    const Piece at = pieces.at(p, index(base + warp));
    const TensorMap* const map = p.experts.down_maps + expert(at);
    const int num_blocks = at.num_blocks();
    const uint32_t barrier = shared_address(&s.full[group][warp]);
    const uint32_t to = shared_address(s.rows) + (group * kSlots + warp) * pieces.most_blocks() * kBox;
    if (is_elected()) {
      map_fence(map);
      barrier_expect(barrier, num_blocks * kBox);
      for (int block = 0; block < num_blocks; ++block)
        copy_box_once(to + block * kBox, map, at.col + block * kBlockK, row0, barrier, policy);
    }
    __syncwarp();
  }
  // This warp's blocks of piece base + kSlots.
  __device__ __forceinline__ void load(int base, uint64_t policy, BlockWords (&to)[kQuads]) const {
    if (base + kSlots >= count) return;
    const Piece at = pieces.at(p, index(base + kSlots));
    const WeightView& view = like(at);
    const char* const data = static_cast<const char*>(p.experts.down[expert(at)].data) + at.col;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int kh = 0; kh < 2; ++kh) {
          const int byte = (4 * quad + warp) * kBlockK + 64 * kh + 16 * t;
          to[quad].words[half][kh] =
              byte < at.cols ? load_once(data + (row0 + g + 8 * half) * view.row_bytes + byte, policy)
                             : make_uint4(0, 0, 0, 0);
        }
  }
  // Of this warp's blocks.
  __device__ __forceinline__ void load_scales(int base) const {
    const int i = lane / kQuads, block = 4 * (lane % kQuads) + warp;
    if (i >= kAtOnce || base + i >= count) return;
    const Piece at = pieces.at(p, index(base + i));
    if (block >= at.num_blocks()) return;
    const WeightView& view = like(at);
    const float* const row = p.experts.down[expert(at)].scale + row0 / view.block_rows * view.scale_cols;
    s.scales[group][i][block] = scale_at(row, at.col / kBlockK + block, view.blocks_per_scale);
  }

  // The pieces' inputs in two parts: half a warp a block, 8 inputs a lane.
  __device__ __forceinline__ void stage(int base) const {
    constexpr int kEach = kAtOnce * kPieceBlocks / 8;
    const int thread = threadIdx.x % 128, word = thread % 16;
    uint4 words[kEach];  // [kEach]
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int task = 8 * j + thread / 16, i = task / kPieceBlocks, block = task % kPieceBlocks;
      words[j] = make_uint4(0, 0, 0, 0);
      if (base + i >= count) continue;
      const Piece at = pieces.at(p, index(base + i));
      const int col = block * kBlockK + 8 * word;
      const bf16* const from = at.slot == p.experts_per_token
                                   ? static_cast<const bf16*>(p.shared_mid)
                                   : static_cast<const bf16*>(p.routed_mid) + at.slot * p.routed_stride;
      if (col < at.cols) words[j] = __ldcg(reinterpret_cast<const uint4*>(from + at.col + col));
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int task = 8 * j + thread / 16, i = task / kPieceBlocks, block = task % kPieceBlocks;
      const uint4 v = words[j];
      const float values[8] = {low_float(v.x), high_float(v.x), low_float(v.y), high_float(v.y),
                               low_float(v.z), high_float(v.z), low_float(v.w), high_float(v.w)};
      float most = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) most = max_or_nan(most, fabsf(values[n]));
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2)
        most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
      const SplitPower power(most);
      uint2 parts[2];  // [high, low]
      split_eight(values, power.power, parts[0], parts[1]);
      uint8_t* const atom = s.inputs[group][i][block / 4];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int column = block % 4 + 4 * part;
        uint8_t* const row = atom + column * kBlockK;
        if (i < kSlots) {
          *reinterpret_cast<uint2*>(row + ((word / 2) ^ column) * 16 + word % 2 * 8) = parts[part];
        } else {
          // Step 2 (word / 8) + word % 2 of the products takes these from lanes with t = word % 8 / 2.
          const int place = 2 * (2 * (word / 8) + word % 2), t = word % 8 / 2;
          *reinterpret_cast<uint32_t*>(row + (place ^ column) * 16 + 4 * t) = parts[part].x;
          *reinterpret_cast<uint32_t*>(row + ((place + 1) ^ column) * 16 + 4 * t) = parts[part].y;
        }
      }
      if (word == 0) s.powers[group][i][block] = power.scale;
    }
    shared_fence();
    sync();
  }

  // A piece's sums from its products: those of garbage, where it has fewer blocks, are left out.
  __device__ __forceinline__ void add_up(int base, int i, const float (&acc)[kQuads][4]) const {
    if (base + i >= count) return;
    const int g = lane / 4, t = lane % 4;
    const float part = t < 2 ? 1.0f : 0.0625f;  // lanes of high parts, of low ones
    const int num_blocks = pieces.at(p, index(base + i)).num_blocks();
    float total[2] = {};  // rows g, g + 8
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      if (4 * quad + warp >= num_blocks) break;
      const int block = 4 * quad + warp;
      const float factor = s.scales[group][i][block] * s.powers[group][i][block] * part;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        total[half] = fmaf(factor, warp % 2 ? acc[quad][2 * half + 1] : acc[quad][2 * half], total[half]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
      if (t == warp / 2) s.sums[index(base + i)][warp][g + 8 * half] = total[half];
    }
  }

  // Pieces that are not there are multiplied too, whatever lies in their place, so that no product is under a
  // condition.
  __device__ __forceinline__ void multiply(int base, int round,
                                           const BlockWords (&in_registers)[kQuads]) const {
    const auto inputs = [&](int i, int quad) {
      return matrix_descriptor(shared_address(s.inputs[group][i][quad]));
    };
    float first[kQuads][4];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) pin(first[quad]);
    products_begin();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto pair = [&](int half, int which) {
          const uint4& v = in_registers[quad].words[half][k / 2];
          return k % 2 ? (which ? v.w : v.z) : (which ? v.y : v.x);
        };
        const uint32_t weights[4] = {pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)};
        wgmma_m64n8k32_e4m3(first[quad], weights, inputs(kSlots, quad) + 2 * k, k > 0);
      }
    products_commit();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (base + i < count) barrier_wait(shared_address(&s.full[group][i]), round % 2);
    }
    products_wait<0>();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) pin(first[quad]);
    add_up(base, kSlots, first);
    __syncwarp();
    float acc[kSlots][kQuads][4];
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) pin(acc[i][quad]);
    products_begin();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t rows = shared_address(s.rows) + (group * kSlots + i) * pieces.most_blocks() * kBox;
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const uint64_t weights = matrix_descriptor(rows + 4 * quad * kBox);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          wgmma_m64k32_e4m3(acc[i][quad], weights + 2 * k, inputs(i, quad) + 2 * k, k > 0);
      }
    }
    products_commit();
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) pin(acc[i][quad]);
      add_up(base, i, acc[i]);
    }
  }
};

__global__ void __launch_bounds__(kThreads, 2)
    decode_down_kernel(const __grid_constant__ DecodeDownParams p) {
  let_successor_begin();
  extern __shared__ __align__(1024) uint8_t shared[];
  Scratch& s = *reinterpret_cast<Scratch*>(shared);
  const Pieces pieces(p);
  const Group group(p, pieces, s);
  if (threadIdx.x % 128 == 0) {
    for (int i = 0; i < kSlots; ++i) barrier_init(shared_address(&s.full[group.group][i]), 1);
    barrier_init_fence();
  }
  group.sync();
  const uint64_t policy = read_once_policy();
  BlockWords in_registers[kQuads];
  group.copy(0, policy);
  group.load(0, policy, in_registers);
  group.load_scales(0);
  if (static_cast<int>(threadIdx.x) < p.experts_per_token)
    s.weights[threadIdx.x] = __ldcg(p.expert_weights + threadIdx.x);
  const int row = group.row0 + static_cast<int>(threadIdx.x);  // of the first kRows threads
  float residual = 0;
  // Round -1 is a rehearsal of the first, with whatever lies where its inputs will be: the code that it
  // fetches, some 20 KB, would take longer to come than to run when they are there.
#pragma unroll 1
  for (int round = -1; round * kAtOnce < group.count; ++round) {
    const int base = max(round, 0) * kAtOnce;
    if (round >= 0) group.sync();  // everybody has read what is written now
    if (round == 0) {
      wait_for_predecessor();
      if (threadIdx.x < kRows)
        residual = p.residual[row] + __bfloat162float(static_cast<const bf16*>(p.delta)[row]);
    } else if (round > 0) {
      group.copy(base, policy);
      group.load(base, policy, in_registers);
      group.load_scales(base);
    }
    group.stage(base);
    group.multiply(base, max(round, 0), in_registers);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pieces.count * kRows; i += kThreads) {
    const float* const sums = &s.sums[i / kRows][0][i % kRows];
    s.outs[i / kRows][i % kRows] = (sums[0] + sums[kRows]) + (sums[2 * kRows] + sums[3 * kRows]);
  }
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  const auto rounded = [&](int begin, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += s.outs[begin + i][threadIdx.x];
    return __bfloat162float(__float2bfloat16_rn(sum));
  };
  float total = 0;
  for (int j = 0; j < p.experts_per_token; ++j)
    total = fmaf(s.weights[j], rounded(j * pieces.routed.count, pieces.routed.count), total);
  if (pieces.shared.count > 0) total += rounded(pieces.num_routed, pieces.shared.count);
  p.residual[row] = residual + __bfloat162float(__float2bfloat16_rn(total));
}

bool is_down_rows(const WeightView& w, int32_t rows) {
  return w.dtype == Dtype::kF8E4M3 && w.bias == nullptr && w.rows == rows && w.cols % 16 == 0 &&
         w.block_rows % kRows == 0;
}

}  // namespace

void prepare_decode_down() {
  RODIN_CUDA(
      cudaFuncSetAttribute(decode_down_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(sizeof(Scratch)) + kGroups * kSlots * kPieceBlocks * kBox));
  RODIN_CUDA(cudaFuncSetAttribute(decode_down_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
}

bool is_decode_down(const DecodeDownParams& p) {
  const DecodeExperts& experts = p.experts;
  return experts.down_maps != nullptr && experts.routed_down.rows % kRows == 0 &&
         is_down_rows(experts.routed_down, experts.routed_down.rows) &&
         (experts.shared_down.rows == 0 || is_down_rows(experts.shared_down, experts.routed_down.rows)) &&
         Pieces(p).count <= kMostPieces;
}

void run_decode_down(const DecodeDownParams& params, cudaStream_t stream) {
  launch_overlapped(decode_down_kernel, dim3(static_cast<unsigned>(params.experts.routed_down.rows / kRows)),
                    kThreads, static_cast<size_t>(shared_bytes(Pieces(params))), stream, params,
                    "decode_down_kernel");
}

}  // namespace rodin::cuda
