#include "model/tensor_table.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <thread>

#include "ops/check.h"
#include "ops/cpu/convert.h"

namespace rodin {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Bytes of the shape, or -1 where it is negative or overflows.
int64_t shape_bytes(const TensorEntry& entry) {
  int64_t bytes = dtype_bytes(dtype_of_name(entry.dtype));
  for (int64_t dim : entry.shape) {
    if (dim < 0) return -1;
    if (dim > 0 && bytes > std::numeric_limits<int64_t>::max() / dim) return -1;
    bytes *= dim;
  }
  return bytes;
}

bool holds_e4m3_nan(const char* data, int64_t bytes) {
  uint8_t found = 0;
  for (int64_t i = 0; i < bytes; ++i) {
    found |= static_cast<uint8_t>((static_cast<uint8_t>(data[i]) & 0x7f) == 0x7f);
  }
  return found != 0;
}

}  // namespace

Dtype dtype_of_name(const std::string& name) {
  if (name == "F8_E4M3") return Dtype::kF8E4M3;
  if (name == "BF16") return Dtype::kBF16;
  if (name == "F16") return Dtype::kF16;
  if (name == "F32") return Dtype::kF32;
  fail("the tensor type '", name, "' is not supported; use F8_E4M3, BF16, F16 or F32");
}

TensorTable::TensorTable(const std::vector<TensorEntry>& entries, int64_t block_rows, int64_t block_cols)
    : block_rows_(block_rows), block_cols_(block_cols) {
  for (const TensorEntry& entry : entries) {
    const bool is_new = by_name_.emplace(entry.name, &entry).second;
    check(is_new, "the tensor ", entry.name, " occurs twice (", entry.file, ")");
    const int64_t bytes = shape_bytes(entry);
    check(bytes >= 0 && bytes == entry.bytes, entry.file, ": tensor ", entry.name, " of shape ",
          shape_text(entry.shape), " and type ", entry.dtype, " cannot take ", entry.bytes, " bytes");
    if (entry.file.empty()) continue;
    auto file = files_.find(entry.file);
    if (file == files_.end()) file = files_.emplace(entry.file, MappedFile(entry.file)).first;
    const int64_t size = file->second.size();
    check(entry.offset >= 0 && entry.offset <= size && entry.bytes <= size - entry.offset, entry.file,
          ": tensor ", entry.name, " ends at byte ", entry.offset, " + ", entry.bytes, ", but the file has ",
          size, " bytes; download the shard again");
  }
  place_synthetic(entries);
}

// Vectors and scales are read before make_resident(), so they are written here.
void TensorTable::place_synthetic(const std::vector<TensorEntry>& entries) {
  constexpr int64_t kAlignment = 64;
  int64_t total = 0;
  for (const TensorEntry& entry : entries) {
    if (entry.file.empty()) total += (entry.bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (total == 0) return;
  synthetic_ = std::make_unique<AnonymousMemory>(total);
  char* at = synthetic_->data();
  for (const TensorEntry& entry : entries) {
    if (!entry.file.empty()) continue;
    synthetic_at_.emplace(&entry, at);
    if (dtype_of_name(entry.dtype) == Dtype::kF32 || entry.shape.size() == 1) {
      fill_synthetic(entry, at, 0, entry.bytes);
    }
    at += (entry.bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
}

const TensorEntry& TensorTable::find(const std::string& name) const {
  const auto found = by_name_.find(name);
  check(found != by_name_.end(), "the checkpoint has no tensor ", name);
  return *found->second;
}

const char* TensorTable::data_of(const TensorEntry& entry) const {
  if (entry.file.empty()) return synthetic_at_.at(&entry);
  return files_.at(entry.file).data() + entry.offset;
}

Weight TensorTable::matrix(const std::string& name, int64_t rows, int64_t cols) {
  const TensorEntry& entry = find(name);
  const std::vector<int64_t> expected = {rows, cols};
  check(entry.shape == expected, entry.file, ": tensor ", name, " has shape ", shape_text(entry.shape),
        "; config.json asks for ", shape_text(expected));
  Weight weight;
  weight.data = data_of(entry);
  weight.dtype = dtype_of_name(entry.dtype);
  weight.rows = rows;
  weight.cols = cols;
  if (weight.dtype != Dtype::kF8E4M3) return weight;

  check(block_rows_ > 0 && block_cols_ > 0, entry.file, ": tensor ", name,
        " is FP8, but config.json has no quantization_config.weight_block_size");
  weight.block_rows = block_rows_;
  weight.block_cols = block_cols_;
  const TensorEntry& scale = find(name + "_scale_inv");
  const std::vector<int64_t> blocks = {(rows + block_rows_ - 1) / block_rows_,
                                       (cols + block_cols_ - 1) / block_cols_};
  check(scale.shape == blocks, scale.file, ": tensor ", scale.name, " has shape ", shape_text(scale.shape),
        "; blocks of ", shape_text({block_rows_, block_cols_}), " over ", shape_text(expected), " need ",
        shape_text(blocks));
  weight.scale = copy_to_float(scale);
  return weight;
}

const float* TensorTable::vector(const std::string& name, int64_t size) {
  const TensorEntry& entry = find(name);
  const std::vector<int64_t> expected = {size};
  check(entry.shape == expected, entry.file, ": tensor ", name, " has shape ", shape_text(entry.shape),
        "; config.json asks for ", shape_text(expected));
  return copy_to_float(entry);
}

const float* TensorTable::copy_to_float(const TensorEntry& entry) {
  const Dtype dtype = dtype_of_name(entry.dtype);
  check(dtype != Dtype::kF8E4M3, entry.file, ": tensor ", entry.name,
        " is FP8, which is only known for matrices");
  const int64_t size = entry.bytes / dtype_bytes(dtype);
  std::vector<float>& copy = copies_.emplace_back(static_cast<size_t>(size));
  const char* data = data_of(entry);
  for (int64_t i = 0; i < size; ++i) copy[static_cast<size_t>(i)] = element_as_float(data, dtype, i);
  return copy.data();
}

void TensorTable::release(const Weight& weight) const {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(weight.data);
  const auto bytes = static_cast<uintptr_t>(weight.rows * weight.cols * dtype_bytes(weight.dtype));
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

void TensorTable::make_resident(std::atomic<int64_t>& loaded_bytes, int num_threads) {
  constexpr int64_t kPieceBytes = int64_t{4} << 20;
  constexpr int64_t kPageBytes = 4096;
  struct Piece {
    const TensorEntry* entry;
    const char* data;
    int64_t bytes;
  };
  std::vector<Piece> pieces;
  for (const auto& [name, entry] : by_name_) {
    const char* data = data_of(*entry);
    for (int64_t at = 0; at < entry->bytes; at += kPieceBytes) {
      pieces.push_back({entry, data + at, std::min(kPieceBytes, entry->bytes - at)});
    }
  }
  // In the order of the files, so that a disk reads ahead.
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.data < b.data; });

  std::atomic<size_t> next{0};
  std::atomic<const TensorEntry*> broken{nullptr};
  const auto work = [&] {
    volatile char sink = 0;
    for (size_t i = next++; i < pieces.size() && !broken; i = next++) {
      const Piece& piece = pieces[i];
      if (piece.entry->file.empty()) {
        char* data = synthetic_at_.at(piece.entry);
        const int64_t begin = piece.data - data;
        fill_synthetic(*piece.entry, data, begin, begin + piece.bytes);
      }
      if (dtype_of_name(piece.entry->dtype) == Dtype::kF8E4M3) {
        if (holds_e4m3_nan(piece.data, piece.bytes)) broken = piece.entry;
      } else {
        for (int64_t at = 0; at < piece.bytes; at += kPageBytes) sink = piece.data[at];
      }
      loaded_bytes += piece.bytes;
    }
    (void)sink;
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (const TensorEntry* entry = broken) {
    fail(entry->file, ": tensor ", entry->name, " holds a NaN; download the shard again");
  }
}

}  // namespace rodin
