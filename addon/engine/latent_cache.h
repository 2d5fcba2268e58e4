// The bytes of the latent cache: owner of one [num_blocks * block_size, row_dim] tensor per layer.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/ops.h"

namespace rodin {

class LatentCache {
 public:
  // Contents are undefined: a position is written before it is attended to.
  LatentCache(Ops& ops, int64_t num_layers, int64_t num_blocks, int64_t block_size, int64_t row_dim);
  ~LatentCache();
  LatentCache(const LatentCache&) = delete;
  LatentCache& operator=(const LatentCache&) = delete;

  // Writes random numbers of the size that latents have, so that attention reads memory that exists.
  void fill_synthetic();

  const std::vector<CacheLayer>& layers() const { return layers_; }
  int64_t bytes() const { return bytes_; }

 private:
  void release();

  Ops& ops_;
  std::vector<CacheLayer> layers_;  // [num_layers]
  int64_t bytes_ = 0;
};

}  // namespace rodin
