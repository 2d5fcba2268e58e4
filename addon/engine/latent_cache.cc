#include "engine/latent_cache.h"

#include <limits>

#include "ops/check.h"

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

LatentCache::~LatentCache() { release(); }

void LatentCache::release() {
  for (CacheLayer& layer : layers_) ops_.free(layer.latents.data);
  layers_.clear();
}

}  // namespace rodin
