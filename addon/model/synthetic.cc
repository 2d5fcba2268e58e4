#include "model/synthetic.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "ops/check.h"
#include "ops/cpu/convert.h"

namespace rodin {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
// Root mean square of the codes that random_code() gives.
constexpr float kCodeRms = 1.65f;

// SplitMix64: a function of its argument, so that any part can be written by any thread.
uint64_t hash_of(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// What every element of a tensor is, where that is one value; NaN where they are random.
float constant_of(const TensorEntry& entry) {
  if (ends_with(entry.name, "_scale_inv")) {
    // Of a weight of so many blocks of 128 columns.
    return 1.0f / (kCodeRms * std::sqrt(128.0f * static_cast<float>(entry.shape.back())));
  }
  if (ends_with(entry.name, "bias")) return 0.0f;
  return entry.shape.size() == 1 ? 1.0f : std::nanf("");
}

// Eight e4m3 codes of magnitudes 1/4 .. 3.75 and either sign.
uint64_t random_codes(uint64_t bits) {
  const uint64_t sign_and_low = bits & 0x9f9f9f9f9f9f9f9fu;  // exponents' two low bits, mantissas
  return sign_and_low + 0x2828282828282828u;
}

}  // namespace

AnonymousMemory::AnonymousMemory(int64_t bytes) : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  if (bytes_ == 0) return;
  void* data = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(data != MAP_FAILED, "cannot allocate ", bytes_, " bytes for the weights; take fewer layers");
#if defined(MADV_HUGEPAGE)
  madvise(data, static_cast<size_t>(bytes_),
          MADV_HUGEPAGE);  // refused where there are none, which is no error
#endif
  data_ = static_cast<char*>(data);
}

AnonymousMemory::~AnonymousMemory() {
  if (data_) munmap(data_, static_cast<size_t>(bytes_));
}

void fill_synthetic(const TensorEntry& entry, char* data, int64_t begin, int64_t end) {
  const uint64_t seed = hash_of(std::hash<std::string>{}(entry.name));
  const float constant = constant_of(entry);
  const bool is_random = std::isnan(constant);
  const float spread = is_random ? 1.0f / std::sqrt(static_cast<float>(entry.shape.back())) : 0.0f;
  for (int64_t at = begin; at < end; at += 16) {
    const auto block = static_cast<uint64_t>(at / 16);
    const uint64_t bits[2] = {hash_of(seed + 2 * block), hash_of(seed + 2 * block + 1)};
    char bytes[16];
    if (entry.dtype == "F8_E4M3") {
      const uint64_t codes[2] = {random_codes(bits[0]), random_codes(bits[1])};
      memcpy(bytes, codes, sizeof codes);
    } else {
      const int64_t size = entry.dtype == "F32" ? 4 : 2;
      for (int64_t i = 0; i < 16 / size; ++i) {
        const auto random = static_cast<uint16_t>(bits[i / 4] >> (16 * (i % 4)));
        // Uniform in (-sqrt(3), sqrt(3)) * spread: mean square spread^2.
        const float value =
            is_random ? (static_cast<float>(random) * 0x1p-15f - 1.0f) * 1.7320508f * spread : constant;
        if (size == 4) {
          memcpy(bytes + 4 * i, &value, 4);
        } else {
          const uint16_t half = entry.dtype == "F16" ? f16_of_float(value) : bf16_of_float(value);
          memcpy(bytes + 2 * i, &half, 2);
        }
      }
    }
    memcpy(data + at, bytes, static_cast<size_t>(end - at < 16 ? end - at : 16));
  }
}

}  // namespace rodin
