// The checkpoint's tensors by name: checks every entry against its file, maps the shards, makes pages
// resident.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/mapped_file.h"
#include "model/spec.h"
#include "model/synthetic.h"
#include "ops/weight.h"

namespace rodin {

class TensorTable {
 public:
  // Maps the shards that `entries` name, makes memory for those that name none, and checks dtype, offset and
  // bytes of each entry; block sizes are those of FP8 scales (0 where the checkpoint has none). `entries`
  // outlives the table.
  TensorTable(const std::vector<TensorEntry>& entries, int64_t block_rows, int64_t block_cols);

  bool has(const std::string& name) const { return by_name_.count(name) > 0; }

  // The tensor `name` as a [rows, cols] weight, with `name`_scale_inv where it is FP8. Throws where it is
  // missing or has another shape.
  Weight matrix(const std::string& name, int64_t rows, int64_t cols);

  // The tensor `name` copied to float32. The pointer is valid as long as the table.
  const float* vector(const std::string& name, int64_t size);

  // Reads every page of the tensors (writes them, where they are synthetic matrices), on num_threads threads,
  // and refuses FP8 weights that hold NaN; `loaded_bytes` rises by each tensor's bytes.
  void make_resident(std::atomic<int64_t>& loaded_bytes, int num_threads);

  // Gives the memory of a tensor that is never read again back to the system, but for the pages that it
  // shares.
  void release(const Weight& weight) const;

 private:
  const TensorEntry& find(const std::string& name) const;
  const char* data_of(const TensorEntry& entry) const;
  void place_synthetic(const std::vector<TensorEntry>& entries);
  const float* copy_to_float(const TensorEntry& entry);

  const int64_t block_rows_;
  const int64_t block_cols_;
  std::unordered_map<std::string, const TensorEntry*> by_name_;
  std::map<std::string, MappedFile> files_;
  std::unique_ptr<AnonymousMemory> synthetic_;                  // null where every tensor is in a file
  std::unordered_map<const TensorEntry*, char*> synthetic_at_;  // where in it
  std::deque<std::vector<float>> copies_;                       // small tensors in float32
};

// "F8_E4M3" and the like; throws for any other name.
Dtype dtype_of_name(const std::string& name);

}  // namespace rodin
