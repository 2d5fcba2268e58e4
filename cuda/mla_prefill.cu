// Latent attention in its naive form for prompts: keys and values of each head lie expanded in memory (kv_b
// applied),
//   s_p = softmax_scale * (q_nope . k_nope(p) + q_rope . k_rope(p)),  out = sum_p softmax(s)_p v(p),
// causal. A third of the absorbed form's operations.
//
// prefill_kernel: a block takes 128 tokens of one head; grid: tiles x heads, the longest first. One thread of
// the first warpgroup brings the queries once and keys and values in two stages of 128; each of the other two
// warpgroups computes 64 tokens: scores by wgmma from shared memory, softmax in registers (base 2, running
// maximum), values by wgmma with the weights in registers. While one of them is at its softmax the other one
// has the tensor cores. The scheme is FlashAttention-3's.
#include "cuda/hopper.cuh"
#include "cuda/quad_store.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 384;
constexpr int kStages = 2;
constexpr int kBoxBytes = 128 * 128;  // 128 rows of 64 columns
static_assert(kPrefillTokens == 128 && kPrefillKeys == 128);

// Shared memory and barriers; the rope part is one box more than kNope takes.
template <int kNope, int kV>
struct Layout {
  static constexpr int kKeyBoxes = kNope / 64 + 1;
  static constexpr int kValueBoxes = kV / 64;
  static constexpr int kKeyBytes = kKeyBoxes * kBoxBytes;
  static constexpr int kValueBytes = kValueBoxes * kBoxBytes;
  static constexpr int kBytes = kKeyBytes + kStages * (kKeyBytes + kValueBytes) + 9 * 8 + 1024;

  uint32_t base;
  __device__ uint32_t queries() const { return base; }
  __device__ uint32_t keys(int stage) const { return base + kKeyBytes * (1 + stage); }
  __device__ uint32_t values(int stage) const {
    return base + kKeyBytes * (1 + kStages) + kValueBytes * stage;
  }
  __device__ uint32_t barriers() const { return base + kKeyBytes + kStages * (kKeyBytes + kValueBytes); }
  __device__ uint32_t queries_full() const { return barriers(); }
  __device__ uint32_t keys_full(int stage) const { return barriers() + 8 + stage * 8; }
  __device__ uint32_t keys_empty(int stage) const { return barriers() + 24 + stage * 8; }
  __device__ uint32_t values_full(int stage) const { return barriers() + 40 + stage * 8; }
  __device__ uint32_t values_empty(int stage) const { return barriers() + 56 + stage * 8; }
};

template <int kNope, int kV>
__device__ __forceinline__ void bring(const MlaPrefillParams& p, const Layout<kNope, kV>& at,
                                      const PrefillTile& tile, int head, int num_blocks) {
  using L = Layout<kNope, kV>;
  constexpr int kHeadColumns = kNope + kV;
  barrier_expect(at.queries_full(), L::kKeyBytes);
#pragma unroll
  for (int box = 0; box < L::kKeyBoxes; ++box) {
    copy_box(at.queries() + box * kBoxBytes, &p.q, (p.first_head + head) * (kNope + 64) + box * 64,
             tile.first_token, at.queries_full());
  }
  for (int block = 0; block < num_blocks; ++block) {
    const int stage = block % kStages;
    const uint32_t parity = block / kStages % 2 ^ 1;
    const int row = tile.first_key + block * kPrefillKeys;
    barrier_wait(at.keys_empty(stage), parity);
    barrier_expect(at.keys_full(stage), L::kKeyBytes);
#pragma unroll
    for (int box = 0; box < L::kKeyBoxes - 1; ++box)
      copy_box(at.keys(stage) + box * kBoxBytes, &p.kv, head * kHeadColumns + box * 64, row,
               at.keys_full(stage));
    copy_box(at.keys(stage) + (L::kKeyBoxes - 1) * kBoxBytes, &p.rope, 0, row, at.keys_full(stage));
    barrier_wait(at.values_empty(stage), parity);
    barrier_expect(at.values_full(stage), L::kValueBytes);
#pragma unroll
    for (int box = 0; box < L::kValueBoxes; ++box) {
      copy_box(at.values(stage) + box * kBoxBytes, &p.kv, head * kHeadColumns + kNope + box * 64, row,
               at.values_full(stage));
    }
  }
}

template <int kV>
__device__ __forceinline__ void add_values(float (&out)[kV / 2], const uint32_t (&weights)[4],
                                           uint64_t values) {
  if constexpr (kV == 128) {
    wgmma_m64n128k16_bf16_transposed(out, weights, values);
  } else {
    wgmma_m64n64k16_bf16_transposed(out, weights, values);
  }
}

template <int kNope, int kV>
__device__ __forceinline__ void compute(const MlaPrefillParams& p, const Layout<kNope, kV>& at,
                                        const PrefillTile& tile, int head, int num_blocks) {
  using L = Layout<kNope, kV>;
  const int group = threadIdx.x / 128 - 1;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const int local_row = 64 * group + threadIdx.x / 32 % 4 * 16 + lane / 4;  // and the one 8 further
  const float scale = p.softmax_scale * 1.4426950408889634f;                // into base 2
  // Keys that the group's first and last token attend to.
  const int first_end = tile.num_keys + 64 * group;
  const int last_end = min(tile.num_keys + 64 * group + 63, tile.num_keys + tile.count - 1);
  const int own_blocks = 64 * group < tile.count ? (last_end + kPrefillKeys - 1) / kPrefillKeys : 0;

  float out[kV / 2] = {};  // [kV / 2]
  float score[64] = {};    // [64]
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0, 0};  // of this lane's columns
  barrier_wait(at.queries_full(), 0);
  for (int block = 0; block < num_blocks; ++block) {
    const int stage = block % kStages;
    const uint32_t parity = block / kStages % 2;
    barrier_wait(at.keys_full(stage), parity);
    if (block < own_blocks) {
      products_begin();
#pragma unroll
      for (int box = 0; box < L::kKeyBoxes; ++box) {
        const uint64_t a = matrix_descriptor(at.queries() + box * kBoxBytes + group * (kBoxBytes / 2));
        const uint64_t b = matrix_descriptor(at.keys(stage) + box * kBoxBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step)
          wgmma_m64n128k16_bf16(score, a + 2 * step, b + 2 * step, box + step != 0);
      }
      products_commit();
      products_wait<0>();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(at.keys_empty(stage));
    if (block < own_blocks) {
      const int first = block * kPrefillKeys;
      if (first + kPrefillKeys > first_end) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int key = first + i / 4 * 8 + 2 * t + i % 2;
          if (key >= tile.num_keys + local_row + i / 2 % 2 * 8) score[i] = -INFINITY;
        }
      }
      uint32_t weights[8][4];  // [8, 4]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = row_max[half];
#pragma unroll
        for (int j = 0; j < 16; ++j)
          most = fmaxf(most, fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float scaled = most == -INFINITY ? 0.0f : most * scale;
        const float shrink = exp2f(row_max[half] * scale - scaled);
        row_max[half] = most;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const float a = exp2f(fmaf(score[4 * j + 2 * half], scale, -scaled));
          const float b = exp2f(fmaf(score[4 * j + 2 * half + 1], scale, -scaled));
          sum += a + b;
          weights[j / 2][half + 2 * (j % 2)] = pack_bf16(a, b);
        }
        row_sum[half] = row_sum[half] * shrink + sum;
#pragma unroll
        for (int j = 0; j < kV / 8; ++j) out[4 * j + 2 * half] *= shrink, out[4 * j + 2 * half + 1] *= shrink;
      }
      barrier_wait(at.values_full(stage), parity);
      products_begin();
      const uint64_t values = transposed_descriptor(at.values(stage), kBoxBytes);
#pragma unroll
      for (int step = 0; step < 8; ++step) add_values<kV>(out, weights[step], values + 128 * step);
      products_commit();
      products_wait<0>();
    } else {
      barrier_wait(at.values_full(stage), parity);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(at.values_empty(stage));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = row_sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    const int row = local_row + 8 * half;
    bf16* to = static_cast<bf16*>(p.out) + (tile.first_token + row) * p.out_stride +
               static_cast<int64_t>(p.first_head + head) * kV;
#pragma unroll
    for (int part = 0; part < kV / 32; ++part) {
      uint32_t words[4];  // [4]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * part + i;
        words[i] = pack_bf16(out[4 * j + 2 * half] * inverse, out[4 * j + 2 * half + 1] * inverse);
      }
      transpose_quad(words, t);
      if (row < tile.count) store_words(to, 32 * part + 8 * t, kV, words);
    }
  }
}

template <int kNope, int kV>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ MlaPrefillParams p) {
  extern __shared__ __align__(16) char shared[];
  Layout<kNope, kV> at;
  at.base = (shared_address(shared) + 1023) / 1024 * 1024;
  let_successor_begin();
  if (threadIdx.x == 0) {
    barrier_init(at.queries_full(), 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(at.keys_full(i), 1);
      barrier_init(at.values_full(i), 1);
      barrier_init(at.keys_empty(i), 8);
      barrier_init(at.values_empty(i), 8);
    }
    barrier_init_fence();
  }
  const PrefillTile tile = p.tiles[p.num_tiles - 1 - static_cast<int>(blockIdx.x) / p.num_heads];
  const int head = blockIdx.x % p.num_heads;
  const int num_blocks = (tile.num_keys + tile.count - 1 + kPrefillKeys - 1) / kPrefillKeys;
  __syncthreads();
  wait_for_predecessor();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) bring(p, at, tile, head, num_blocks);
  } else {
    take_registers<232>();
    compute(p, at, tile, head, num_blocks);
  }
}

template <int kNope, int kV>
void launch(const MlaPrefillParams& p, cudaStream_t stream) {
  launch_overlapped(prefill_kernel<kNope, kV>, dim3(static_cast<unsigned>(p.num_tiles * p.num_heads)),
                    kThreads, Layout<kNope, kV>::kBytes, stream, p, "prefill_kernel");
}

}  // namespace

bool has_mla_prefill(int64_t nope_dim, int64_t rope_dim, int64_t v_dim) {
  return rope_dim == 64 && nope_dim == v_dim && (nope_dim == 128 || nope_dim == 64);
}

void run_mla_prefill(const MlaPrefillParams& params, cudaStream_t stream) {
  if (params.num_tiles == 0) return;
  params.nope_dim == 128 ? launch<128, 128>(params, stream) : launch<64, 64>(params, stream);
}

void prepare_mla_prefill() {
  raise_shared_limit(prefill_kernel<128, 128>, Layout<128, 128>::kBytes);
  raise_shared_limit(prefill_kernel<64, 64>, Layout<64, 64>::kBytes);
}

}  // namespace rodin::cuda
