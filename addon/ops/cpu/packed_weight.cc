#include "ops/cpu/packed_weight.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "ops/check.h"

namespace rodin {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Where element (n, k) of 4 inputs of a panel goes: elements from its start.
template <class T>
constexpr int64_t place_of(int64_t n, int64_t k) {
  const int64_t pair = k / 2;
  return sizeof(T) == 1 ? n * 4 + k % 2 * 2 + 1 - pair : pair * 32 + n * 2 + k % 2;
}

// Writes the packed form of a matrix [rows, cols] whose element (n, k) lies at `from` + n * row_stride + k *
// col_stride, in elements of T.
template <class T>
void pack_matrix(const char* from, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols,
                 char* to) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  for (int64_t panel = 0; panel < rows; panel += kPanelOutputs) {
    const int64_t num_rows = std::min(kPanelOutputs, rows - panel);
    for (int64_t k4 = 0; k4 < cols; k4 += kPackInputs) {
      T group[kPanelOutputs * kPackInputs];  // [kPanelOutputs * kPackInputs]
      const char* corner = from + (panel * row_stride + k4 * col_stride) * kSize;
      if (num_rows == kPanelOutputs && col_stride == 1 && k4 + kPackInputs <= cols) {
        for (int64_t n = 0; n < kPanelOutputs; ++n) {
          T four[kPackInputs];
          memcpy(four, corner + n * row_stride * kSize, sizeof four);
          for (int64_t k = 0; k < kPackInputs; ++k) group[place_of<T>(n, k)] = four[k];
        }
      } else {
        memset(group, 0, sizeof group);
        for (int64_t n = 0; n < num_rows; ++n) {
          for (int64_t k = 0; k < std::min(kPackInputs, cols - k4); ++k) {
            memcpy(&group[place_of<T>(n, k)], corner + (n * row_stride + k * col_stride) * kSize, sizeof(T));
          }
        }
      }
      memcpy(to, group, sizeof group);
      to += sizeof group;
    }
  }
}

void pack(const Weight& weight, int64_t first, int64_t row_stride, int64_t col_stride, int64_t rows,
          int64_t cols, void* packed) {
  const char* from = static_cast<const char*>(weight.data) + first * weight.cols * dtype_bytes(weight.dtype);
  auto* to = static_cast<char*>(packed);
  if (weight.dtype == Dtype::kF8E4M3) {
    pack_matrix<uint8_t>(from, row_stride, col_stride, rows, cols, to);
  } else {
    pack_matrix<uint16_t>(from, row_stride, col_stride, rows, cols, to);
  }
}

}  // namespace

bool can_pack(const Weight& weight) {
  if (weight.dtype == Dtype::kBF16) return true;
  if (weight.dtype != Dtype::kF8E4M3) return false;
  const bool rows_fit = weight.block_rows % kPanelOutputs == 0 || weight.block_rows >= weight.rows;
  const bool cols_fit = weight.block_cols % kPackInputs == 0 || weight.block_cols >= weight.cols;
  return rows_fit && cols_fit;
}

int64_t panel_bytes(int64_t rows, int64_t cols, Dtype dtype) {
  return round_up(rows, kPanelOutputs) * round_up(cols, kPackInputs) * dtype_bytes(dtype);
}

int64_t packed_bytes(int64_t rows, int64_t cols, Dtype dtype) {
  const int64_t panels = round_up(rows, kPanelOutputs) / kPanelOutputs;
  const int64_t words = dtype == Dtype::kF8E4M3 ? panels * rare_words(cols) : 0;
  return panel_bytes(rows, cols, dtype) + words * static_cast<int64_t>(sizeof(uint64_t));
}

void mark_rare_groups(int64_t rows, int64_t cols, Dtype dtype, int64_t first, int64_t count, void* packed) {
  if (dtype != Dtype::kF8E4M3) return;
  const int64_t groups = round_up(cols, kPackInputs) / kPackInputs;
  const auto* codes = static_cast<const uint8_t*>(packed) + first * panel_bytes(kPanelOutputs, cols, dtype);
  auto* words = reinterpret_cast<uint64_t*>(static_cast<char*>(packed) + panel_bytes(rows, cols, dtype)) +
                first * rare_words(cols);
  for (int64_t panel = 0; panel < count; ++panel, words += rare_words(cols)) {
    std::fill_n(words, rare_words(cols), 0);
    for (int64_t group = 0; group < groups; ++group) {
      bool is_rare = false;
      for (int64_t i = 0; i < kPanelOutputs * kPackInputs; ++i) is_rare |= (*codes++ & 0x78) == 0;
      if (is_rare) words[group / 64] |= uint64_t{1} << group % 64;
    }
  }
}

void mark_rare_groups(int64_t rows, int64_t cols, Dtype dtype, void* packed) {
  mark_rare_groups(rows, cols, dtype, 0, round_up(rows, kPanelOutputs) / kPanelOutputs, packed);
}

void pack_rows(const Weight& weight, int64_t first, int64_t rows, void* packed) {
  pack(weight, first, weight.cols, 1, rows, weight.cols, packed);
}

void pack_columns(const Weight& weight, int64_t first, int64_t rows, void* packed) {
  pack(weight, first, 1, weight.cols, weight.cols, rows, packed);
}

PageArena::~PageArena() {
  for (const Chunk& chunk : chunks_) munmap(chunk.data, static_cast<size_t>(chunk.bytes));
}

void* PageArena::take(int64_t bytes) {
  constexpr int64_t kChunkBytes = 8 * kHugePage;
  const int64_t needed = round_up(std::max<int64_t>(bytes, 1), 64);
  if (chunks_.empty() || used_ + needed > chunks_.back().bytes) {
    const int64_t size = round_up(std::max(needed, kChunkBytes), kHugePage);
    // One huge page more than needed, so that the chunk can start at a border of one.
    void* data = mmap(nullptr, static_cast<size_t>(size + kHugePage), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(data != MAP_FAILED, "cannot allocate ", size, " bytes for repacked weights");
    const auto start = reinterpret_cast<uintptr_t>(data);
    const auto skip = static_cast<int64_t>((kHugePage - start % kHugePage) % kHugePage);
    char* aligned = static_cast<char*>(data) + skip;
    if (skip > 0) munmap(data, static_cast<size_t>(skip));
    if (skip < kHugePage) munmap(aligned + size, static_cast<size_t>(kHugePage - skip));
#if defined(MADV_HUGEPAGE)
    madvise(aligned, static_cast<size_t>(size), MADV_HUGEPAGE);  // where there are none, small ones do
#endif
    chunks_.push_back({aligned, size});
    used_ = 0;
  }
  char* piece = chunks_.back().data + used_;
  used_ += needed;
  return piece;
}

}  // namespace rodin
