// From the chosen experts' silu(gate) * up to the residual, for one token: down of each, rounded to bf16,
// their weighted sum with the shared expert, residual += delta, residual += the sum rounded to bf16.
//
// decode_down_kernel: a block has 16 rows of down of every chosen expert and of the shared one, so that the
// sum needs no other block; 8 warps. Inputs are cut into pieces of at most kPiece (a shared expert as wide as
// two has two); a warp takes every eighth piece, in two groups of 8 rows, which bulk copies bring to shared
// memory before the kernel ahead has ended: all but its results is known. Groups that have no room there yet
// are asked for into the second-level cache.
//
// A group is one 16-row tile of the tensor core: row r of it the first or (odd r) second 64 of a block of 128
// inputs of weight row r, row r + 8 the other ones; column 0 has the first 64 inputs, column 1 the second.
#include "cuda/decode_moe.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;      // of a block
constexpr int kGroupRows = 8;  // of a group
constexpr int kGroups = kRows / kGroupRows;
constexpr int kPiece = 1408;  // most inputs of a piece, a multiple of kBlockK
constexpr int kMostPieces = 32;
constexpr int kSlots = 1;  // groups of a warp in shared memory

struct Scratch {
  uint8_t rows[kWarps][kSlots][kGroupRows * kPiece];
  __half mid[kWarps][kPiece];
  float sums[kMostPieces][kRows];
  float weights[kDecodeMostChosen];  // of the chosen experts
  uint64_t full[kWarps][kSlots];
};

// How inputs are cut: into `count` pieces of `size`, of which the last may be shorter.
struct Cut {
  int count, size;
  __host__ __device__ explicit Cut(int cols) {
    count = (cols + kPiece - 1) / kPiece;
    size = count == 0 ? 0 : ((cols + count - 1) / count + kBlockK - 1) / kBlockK * kBlockK;
  }
};

struct Piece {
  int slot;  // of the token; k: the shared expert
  int col, cols;
};

struct Pieces {
  Cut routed, shared;
  int num_routed, count;  // pieces

  __host__ __device__ explicit Pieces(const DecodeDownParams& p)
      : routed(p.experts.routed_down.cols), shared(p.experts.shared_down.cols) {
    num_routed = p.experts_per_token * routed.count;
    count = num_routed + shared.count;
  }
  __device__ __forceinline__ Piece at(const DecodeDownParams& p, int i) const {
    const bool is_shared = i >= num_routed;
    const Cut& cut = is_shared ? shared : routed;
    const int slot = is_shared ? p.experts_per_token : i / cut.count;
    const int col = (is_shared ? i - num_routed : i - slot * cut.count) * cut.size;
    const int cols = is_shared ? p.experts.shared_down.cols : p.experts.routed_down.cols;
    return {slot, col, min(cut.size, cols - col)};
  }
};

__device__ __forceinline__ int padded(int cols) { return (cols + kBlockK - 1) / kBlockK * kBlockK; }

// A warp's groups: of its pieces in order, kGroups of each.
struct WarpGroups {
  const DecodeDownParams& p;
  const Pieces& pieces;
  Scratch& s;
  int warp, lane, row0, count;

  __device__ __forceinline__ WarpGroups(const DecodeDownParams& params, const Pieces& all, Scratch& scratch)
      : p(params),
        pieces(all),
        s(scratch),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        row0(blockIdx.x * kRows) {
    count = (pieces.count - warp + kWarps - 1) / kWarps * kGroups;
  }
  __device__ __forceinline__ Piece piece(int i) const { return pieces.at(p, warp + i / kGroups * kWarps); }
  __device__ __forceinline__ bool is_shared(const Piece& piece) const {
    return piece.slot == p.experts_per_token;
  }
  __device__ __forceinline__ WeightView weight(const Piece& piece) const {
    if (is_shared(piece)) return p.experts.shared_down;
    WeightView view = p.experts.routed_down;
    const WeightView* const from = p.experts.down + __ldcg(p.expert_ids + piece.slot);
    view.data = from->data;
    view.scale = from->scale;
    return view;
  }
  // Its rows, or where they lie one behind the other all of them at once: each(place in the group, from,
  // bytes).
  template <class Each>
  __device__ __forceinline__ void for_rows(const Piece& at, int i, const Each& each) const {
    const WeightView view = weight(at);
    const char* from =
        static_cast<const char*>(view.data) + (row0 + i % kGroups * kGroupRows) * view.row_bytes + at.col;
    if (!is_elected()) return;
    if (view.row_bytes == padded(at.cols)) return each(0, from, kGroupRows * at.cols);
    for (int r = 0; r < kGroupRows; ++r) each(r, from + r * view.row_bytes, at.cols);
  }
  __device__ __forceinline__ void copy(int i, uint64_t policy) const {
    const Piece at = piece(i);
    const int slot = i % kSlots;
    const uint32_t barrier = shared_address(&s.full[warp][slot]);
    if (is_elected()) barrier_expect(barrier, kGroupRows * at.cols);
    __syncwarp();
    for_rows(at, i, [&](int r, const char* from, int bytes) {
      copy_once(shared_address(s.rows[warp][slot]) + r * padded(at.cols), from, bytes, barrier, policy);
    });
    __syncwarp();
  }
  __device__ __forceinline__ void prefetch(int i) const {
    for_rows(piece(i), i, [](int, const char* from, int bytes) { prefetch_bulk(from, bytes); });
    __syncwarp();
  }
  // Lane b: the scale of block b of the piece.
  __device__ __forceinline__ float scale(const Piece& at) const {
    const WeightView view = weight(at);
    if (lane * kBlockK >= at.cols) return 0;
    return scale_at(view.scale + row0 / view.block_rows * view.scale_cols, at.col / kBlockK + lane,
                    view.blocks_per_scale);
  }
};

// A piece's inputs as f16 to this warp's place; what to multiply its sums with.
__device__ __forceinline__ float stage(const bf16* from, int cols, __half* to) {
  const int lane = threadIdx.x % 32;
  constexpr int kWords = (kPiece + 255) / 256;
  uint4 words[kWords];  // [kWords] 8 inputs
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int col = (i * 32 + lane) * 8;
    words[i] = col < cols ? *reinterpret_cast<const uint4*>(from + col) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) most = max(most, most_magnitude(words[i]));
  const HalfPower power(__reduce_max_sync(kAllLanes, most));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int col = (i * 32 + lane) * 8;
    if (col < padded(cols))
      *reinterpret_cast<uint4*>(to + col) = make_uint4(power.halves(words[i].x), power.halves(words[i].y),
                                                       power.halves(words[i].z), power.halves(words[i].w));
  }
  return power.inverse;
}

__global__ void __launch_bounds__(kThreads) decode_down_kernel(const __grid_constant__ DecodeDownParams p) {
  let_successor_begin();
  extern __shared__ __align__(128) uint8_t shared[];
  Scratch& s = *reinterpret_cast<Scratch*>(shared);
  const Pieces pieces(p);
  const WarpGroups groups(p, pieces, s);
  const int lane = groups.lane, warp = groups.warp;
  const int g = lane / 4, t = lane % 4, swap = g % 2;
  if (lane == 0) {
    for (int i = 0; i < kSlots; ++i) barrier_init(shared_address(&s.full[warp][i]), 1);
    barrier_init_fence();
  }
  if (p.experts.routed_down.cols % kBlockK != 0 || p.experts.shared_down.cols % kBlockK != 0) {
    // Rows end within a block of inputs: what lies behind them meets inputs of zero and must not be a NaN.
    for (int i = lane; i < kSlots * kGroupRows * kPiece / 16; i += 32)
      *reinterpret_cast<uint4*>(&s.rows[warp][0][0] + 16 * i) = make_uint4(0, 0, 0, 0);
    shared_fence();
  }
  __syncwarp();
  const uint64_t policy = read_once_policy();
  for (int i = 0; i < groups.count; ++i) i < kSlots ? groups.copy(i, policy) : groups.prefetch(i);
  float scales = groups.count > 0 ? groups.scale(groups.piece(0)) : 0.0f;
  const int row = groups.row0 + static_cast<int>(threadIdx.x);  // of the first kRows threads
  if (static_cast<int>(threadIdx.x) < p.experts_per_token)
    s.weights[threadIdx.x] = __ldcg(p.expert_weights + threadIdx.x);
  wait_for_predecessor();
  float residual = 0;
  if (threadIdx.x < kRows)
    residual = p.residual[row] + __bfloat162float(static_cast<const bf16*>(p.delta)[row]);

  for (int first = 0; first < groups.count; first += kGroups) {
    const Piece at = groups.piece(first);
    const bf16* mid = groups.is_shared(at)
                          ? static_cast<const bf16*>(p.shared_mid)
                          : static_cast<const bf16*>(p.routed_mid) + at.slot * p.routed_stride;
    if (first > 0) scales = groups.scale(at);
    __syncwarp();
    const float inverse = stage(mid + at.col, at.cols, s.mid[warp]);
    __syncwarp();
    const int num_blocks = padded(at.cols) / kBlockK;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int i = first + group, slot = i % kSlots;
      barrier_wait(shared_address(&s.full[warp][slot]), i / kSlots % 2);
      const uint8_t* const upper = s.rows[warp][slot] + g * padded(at.cols) + swap * 64 + t * 16;
      const uint8_t* const lower = upper + 64 - 128 * swap;
      const __half* const inputs = s.mid[warp] + g * 64 + t * 16;  // of lanes with g < 2
      float sum = 0;
#pragma unroll 4
      for (int block = 0; block < num_blocks; ++block) {
        uint32_t x[8] = {};  // [8]
        if (g < 2) {
          const uint4* from = reinterpret_cast<const uint4*>(inputs + block * kBlockK);
          const uint4 a = from[0], b = from[1];
          x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        }
        float acc[4] = {};
        multiply_halves(acc, *reinterpret_cast<const uint4*>(upper + block * kBlockK),
                        *reinterpret_cast<const uint4*>(lower + block * kBlockK), x);
        sum = fmaf(__shfl_sync(kAllLanes, scales, block), swap ? acc[1] + acc[2] : acc[0] + acc[3], sum);
      }
      __syncwarp();
      if (i + kSlots < groups.count) groups.copy(i + kSlots, policy);
      if (t == 0) s.sums[warp + first / kGroups * kWarps][group * kGroupRows + g] = sum * inverse;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  const auto rounded = [&](int begin, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += s.sums[begin + i][threadIdx.x];
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
  RODIN_CUDA(cudaFuncSetAttribute(decode_down_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(sizeof(Scratch))));
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
                    kThreads, sizeof(Scratch), stream, params, "decode_down_kernel");
}

}  // namespace rodin::cuda
