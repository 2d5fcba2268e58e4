// Random weights in memory, so that any architecture can be timed without its checkpoint. Tensors whose entry
// names no file are made of these. The values keep activations in range; they mean nothing.
#pragma once

#include <cstdint>

#include "model/spec.h"

namespace rodin {

// Anonymous memory in huge pages where the system has some, zero until written.
class AnonymousMemory {
 public:
  explicit AnonymousMemory(int64_t bytes);
  ~AnonymousMemory();
  AnonymousMemory(const AnonymousMemory&) = delete;
  AnonymousMemory& operator=(const AnonymousMemory&) = delete;

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;  // [bytes_]
  int64_t bytes_ = 0;
};

// Writes bytes begin .. end - 1 of a tensor at `data`, its first byte; begin is a multiple of 16. The same
// bytes for the same name. FP8 codes are never NaN; vectors are 1, scores' biases 0, matrices have rows of
// length about 1 with their block scales.
void fill_synthetic(const TensorEntry& entry, char* data, int64_t begin, int64_t end);

}  // namespace rodin
