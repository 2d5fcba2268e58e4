#include "engine/latent_cache.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "ops/check.h"
#include "ops/cpu/convert.h"

namespace rodin {

LatentCache::LatentCache(Ops& ops, int64_t num_layers, int64_t num_blocks, int64_t block_size,
                         int64_t row_dim)
    : ops_(ops) {
  const Dtype dtype = ops.cache_dtype();
  const int64_t row_bytes = row_dim * dtype_bytes(dtype);
  check(num_blocks > 0 && block_size > 0 && num_blocks <= std::numeric_limits<int32_t>::max() / block_size,
        "a latent cache of ", num_blocks, " blocks of ", block_size, " tokens is not possible");
  const int64_t num_slots = num_blocks * block_size;
  try {
    for (int64_t i = 0; i < num_layers; ++i) {
      void* data = ops.alloc(static_cast<size_t>(num_slots * row_bytes));
      layers_.push_back({{data, dtype, num_slots, row_dim, row_dim}});
      bytes_ += num_slots * row_bytes;
    }
  } catch (...) {
    release();
    throw;
  }
}

void LatentCache::fill_synthetic() {
  // One buffer is written over and over: what matters is that every page is one of its own.
  constexpr int64_t kBufferBytes = int64_t{1} << 20;
  std::vector<char> buffer(static_cast<size_t>(kBufferBytes));
  for (CacheLayer& layer : layers_) {
    const Dtype dtype = layer.latents.dtype;
    const int64_t size = dtype_bytes(dtype);
    uint32_t state = 1;
    for (int64_t i = 0; i < kBufferBytes / size; ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
      char* at = buffer.data() + i * size;
      if (dtype ==
          Dtype::kF8E4M3) {  // rows of several types: bytes that are small finite numbers in all of them
        *at = static_cast<char>(0x20 | state >> 27);
      } else if (dtype == Dtype::kF32) {
        memcpy(at, &value, 4);
      } else {
        const uint16_t half = dtype == Dtype::kF16 ? f16_of_float(value) : bf16_of_float(value);
        memcpy(at, &half, 2);
      }
    }
    const int64_t bytes = layer.latents.rows * layer.latents.stride * size;
    for (int64_t at = 0; at < bytes; at += kBufferBytes) {
      ops_.upload(static_cast<char*>(layer.latents.data) + at, buffer.data(),
                  static_cast<size_t>(std::min(kBufferBytes, bytes - at)));
    }
  }
}

LatentCache::~LatentCache() { release(); }

void LatentCache::release() {
  for (CacheLayer& layer : layers_) ops_.free(layer.latents.data);
  layers_.clear();
}

}  // namespace rodin
