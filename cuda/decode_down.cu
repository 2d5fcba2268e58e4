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
// are 16 rows of weights for each of four blocks of inputs, a block a warp, its 8 columns these blocks' high
// parts and their low ones, and what counts is where row and column are the same block. Weights are fed from
// registers, so that rows may lie in shared memory as they come, and the order of a block's inputs is free: a
// lane's two words of 16 bytes are what it feeds.
#include "cuda/decode_moe.cuh"
#include "cuda/split_values.cuh"

namespace rodin::cuda {
namespace {

constexpr int kGroups = 2;  // warpgroups
constexpr int kThreads = 128 * kGroups;
constexpr int kRows = 16;         // of a block
constexpr int kPieceBlocks = 12;  // blocks of inputs of a piece, at most
constexpr int kQuads = kPieceBlocks / 4;
constexpr int kSlots = 3;               // pieces of a warpgroup in shared memory
constexpr int kAtOnce = kSlots + 1;     // and one in registers
constexpr int kTile = kRows * kBlockK;  // bytes
constexpr int kMostPieces = 16;
static_assert(kThreads == 16 * kRows && kDecodeMostChosen < 16);

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
  float weights[kDecodeMostChosen];                       // of the chosen experts
  int32_t experts[kDecodeMostChosen + 1];                 // of the token, the shared one behind the others
  struct {
    const char* data;
    const float* scale;
  } table[kDecodeMostExperts + 1];
  Piece pieces[kMostPieces];
  uint64_t full[kGroups][kSlots];
  alignas(1024) uint8_t rows[];  // [kGroups, kSlots, kRows, most_blocks * kBlockK]
};

int shared_bytes(const Pieces& pieces) {
  const int blocks = pieces.most_blocks();
  return static_cast<int>(sizeof(Scratch)) + kGroups * kSlots * blocks * kTile;
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
  __device__ __forceinline__ const Piece& piece(int i) const { return s.pieces[index(i)]; }
  __device__ __forceinline__ const WeightView& like(const Piece& at) const {
    return at.slot == p.experts_per_token ? p.experts.shared_down : p.experts.routed_down;
  }
  __device__ __forceinline__ void sync() const { named_wait(1 + group, 128); }

  __device__ __forceinline__ uint8_t* rows(int i) const {
    return s.rows + (group * kSlots + i) * pieces.most_blocks() * kTile;
  }
  // Pieces base .. base + kSlots - 1 to shared memory, one a warp.
  __device__ __forceinline__ void copy(int base, uint64_t policy) const {
    if (warp >= kSlots || base + warp >= count) return;
    const Piece at = piece(base + warp);
    const int64_t row_bytes = like(at).row_bytes;
    const char* const from = s.table[s.experts[at.slot]].data + row0 * row_bytes + at.col;
    const uint32_t barrier = shared_address(&s.full[group][warp]), to = shared_address(rows(warp));
    if (is_elected()) {
      barrier_expect(barrier, kRows * at.cols);
      const int pitch = at.num_blocks() * kBlockK;
      if (row_bytes == pitch) {
        copy_once(to, from, kRows * pitch, barrier, policy);
      } else {
        for (int r = 0; r < kRows; ++r)
          copy_once(to + r * pitch, from + r * row_bytes, at.cols, barrier, policy);
      }
    }
    __syncwarp();
  }
  // This warp's blocks of piece base + kSlots.
  __device__ __forceinline__ void load(int base, uint64_t policy, BlockWords (&to)[kQuads]) const {
    if (base + kSlots >= count) return;
    const Piece at = piece(base + kSlots);
    const WeightView& view = like(at);
    const char* const data = s.table[s.experts[at.slot]].data + at.col;
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
  // The same of piece base + i, i < kSlots.
  __device__ __forceinline__ void fetch(int base, int i, BlockWords (&to)[kQuads]) const {
    const int g = lane / 4, t = lane % 4, swap = g % 2;  // odd rows' halves the other way: no bank twice
    const int num_blocks = base + i < count ? piece(base + i).num_blocks() : 0;
    const uint8_t* const at = rows(i) + g * num_blocks * kBlockK + 16 * t;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const int block = 4 * quad + warp;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 words[2] = {};  // [2] the half that is read first
        if (block < num_blocks) {
#pragma unroll
          for (int n = 0; n < 2; ++n)
            words[n] = *reinterpret_cast<const uint4*>(at + (8 * half * num_blocks + block) * kBlockK +
                                                       64 * (n ^ swap));
        }
#pragma unroll
        for (int kh = 0; kh < 2; ++kh) {
          const uint4 &a = words[kh], &b = words[kh ^ 1];
          to[quad].words[half][kh] =
              make_uint4(swap ? b.x : a.x, swap ? b.y : a.y, swap ? b.z : a.z, swap ? b.w : a.w);
        }
      }
    }
  }
  // Of this warp's blocks.
  __device__ __forceinline__ void load_scales(int base) const {
    const int i = lane / kQuads, block = 4 * (lane % kQuads) + warp;
    if (i >= kAtOnce || base + i >= count) return;
    const Piece at = piece(base + i);
    if (block >= at.num_blocks()) return;
    const WeightView& view = like(at);
    const float* const row = s.table[s.experts[at.slot]].scale + row0 / view.block_rows * view.scale_cols;
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
      const Piece at = piece(base + i);
      const int col = block * kBlockK + 8 * word;
      const bf16* const from = at.slot == p.experts_per_token
                                   ? static_cast<const bf16*>(p.shared_mid)
                                   : static_cast<const bf16*>(p.routed_mid) + at.slot * p.routed_stride;
      if (col < at.cols) words[j] = __ldcg(reinterpret_cast<const uint4*>(from + at.col + col));
    }
    float most[kEach];  // [kEach] side by side: a shuffle takes long
#pragma unroll
    for (int j = 0; j < kEach; ++j) most[j] = EightValues(words[j]).largest();
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2)
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        most[j] = max_or_nan(most[j], __shfl_xor_sync(kAllLanes, most[j], offset));
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int task = 8 * j + thread / 16, i = task / kPieceBlocks, block = task % kPieceBlocks;
      const SplitPower power(most[j]);
      uint2 parts[2];  // [high, low]
      split_eight(EightValues(words[j]).values, power.power, parts[0], parts[1]);
      uint8_t* const atom = s.inputs[group][i][block / 4];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        // Step 2 (word / 8) + word % 2 of the products takes these from lanes with t = word % 8 / 2.
        const int column = block % 4 + 4 * part, place = 2 * (2 * (word / 8) + word % 2), t = word % 8 / 2;
        uint8_t* const row = atom + column * kBlockK;
        *reinterpret_cast<uint32_t*>(row + (place ^ column) * 16 + 4 * t) = parts[part].x;
        *reinterpret_cast<uint32_t*>(row + ((place + 1) ^ column) * 16 + 4 * t) = parts[part].y;
      }
      if (word == 0) s.powers[group][i][block] = power.scale;
    }
    shared_fence();
    sync();
  }

  // A piece's sums from its products: those of blocks that it has not are left out.
  __device__ __forceinline__ void add_up(int base, int i, const float (&acc)[kQuads][4]) const {
    if (base + i >= count) return;
    const int g = lane / 4, t = lane % 4;
    const float part = t < 2 ? 1.0f : 0.0625f;  // lanes of high parts, of low ones
    const int num_blocks = piece(base + i).num_blocks();
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

  // A piece's products and their sums. One that is not there is multiplied too, whatever lies in its place,
  // so that no product is under a condition.
  __device__ __forceinline__ void multiply(int base, int i, const BlockWords (&weights)[kQuads]) const {
    float acc[kQuads][4];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) pin(acc[quad]);
    products_begin();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const uint64_t inputs = matrix_descriptor(shared_address(s.inputs[group][i][quad]));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto pair = [&](int half, int which) {
          const uint4& v = weights[quad].words[half][k / 2];
          return k % 2 ? (which ? v.w : v.z) : (which ? v.y : v.x);
        };
        const uint32_t a[4] = {pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)};
        wgmma_m64n8k32_e4m3(acc[quad], a, inputs + 2 * k, k > 0);
      }
    }
    products_commit();
    products_wait<0>();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) pin(acc[quad]);
    add_up(base, i, acc);
  }
  __device__ __forceinline__ void multiply_all(int base, int round, BlockWords (&weights)[kQuads]) const {
    multiply(base, kSlots, weights);
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) {
      if (base + i < count) barrier_wait(shared_address(&s.full[group][i]), round % 2);
      __syncwarp();
      fetch(base, i, weights);
      multiply(base, i, weights);
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
  const int thread = threadIdx.x, num_tables = p.num_experts + (pieces.shared.count > 0 ? 1 : 0);
  for (int e = thread; e < num_tables; e += kThreads)
    s.table[e] = {static_cast<const char*>(p.experts.down[e].data), p.experts.down[e].scale};
  if (thread < p.experts_per_token) {
    s.experts[thread] = __ldcg(p.expert_ids + thread);
    s.weights[thread] = __ldcg(p.expert_weights + thread);
  }
  if (thread == p.experts_per_token) s.experts[thread] = p.num_experts;
  if (thread < pieces.count) s.pieces[thread] = pieces.at(p, thread);
  __syncthreads();
  if (p.experts.routed_down.cols % kBlockK != 0 || p.experts.shared_down.cols % kBlockK != 0) {
    // Rows end within a block: what lies behind meets inputs of zero and must not be a NaN.
    for (int i = threadIdx.x; i < kGroups * kSlots * pieces.most_blocks() * kTile / 16; i += kThreads)
      reinterpret_cast<uint4*>(s.rows)[i] = make_uint4(0, 0, 0, 0);
    shared_fence();
    __syncthreads();
  }
  const uint64_t policy = read_once_policy();
  BlockWords in_registers[kQuads] = {};
  group.copy(0, policy);
  group.load(0, policy, in_registers);
  group.load_scales(0);
  const int row = threadIdx.x / 16, slot = threadIdx.x % 16;  // of this thread in the end
  float residual = 0;
  wait_for_predecessor();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.taken = 0;
  if (slot == 0)
    residual =
        p.residual[group.row0 + row] + __bfloat162float(static_cast<const bf16*>(p.delta)[group.row0 + row]);
  for (int base = 0, round = 0; base < group.count; base += kAtOnce, ++round) {
    if (base > 0) {
      group.sync();  // everybody has read what is written now
      group.copy(base, policy);
      group.load(base, policy, in_registers);
      group.load_scales(base);
    }
    group.stage(base);
    group.multiply_all(base, round, in_registers);
  }
  __syncthreads();
  // Half a warp a row, a lane an expert: its pieces, rounded, times its weight.
  float share = 0;
  if (slot <= p.experts_per_token) {
    const bool is_shared = slot == p.experts_per_token;
    const Cut& cut = is_shared ? pieces.shared : pieces.routed;
    const int first = is_shared ? pieces.num_routed : slot * cut.count;
    float sum = 0;
    for (int i = first; i < first + cut.count; ++i)
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) sum += s.sums[i][warp][row];
    share = __bfloat162float(__float2bfloat16_rn(sum)) * (is_shared ? 1.0f : s.weights[slot]);
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) share += __shfl_xor_sync(kAllLanes, share, offset);
  if (slot == 0) p.residual[group.row0 + row] = residual + __bfloat162float(__float2bfloat16_rn(share));
}

bool is_down_rows(const WeightView& w, int32_t rows) {
  return w.dtype == Dtype::kF8E4M3 && w.bias == nullptr && w.rows == rows && w.cols % 16 == 0 &&
         w.block_rows % kRows == 0;
}

}  // namespace

void prepare_decode_down() {
  raise_shared_limit(decode_down_kernel,
                     static_cast<int>(sizeof(Scratch)) + kGroups * kSlots * kPieceBlocks * kTile);
  keep_shared_memory(decode_down_kernel);
}

bool is_decode_down(const DecodeDownParams& p) {
  const DecodeExperts& experts = p.experts;
  return experts.routed_down.rows % kRows == 0 &&
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
