// A file mapped read-only for as long as the object lives.
#pragma once

#include <cstdint>
#include <string>

namespace rodin {

class MappedFile {
 public:
  // Throws std::runtime_error with one sentence that names the file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  const char* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  const char* data_ = nullptr;  // [size_]
  int64_t size_ = 0;
};

}  // namespace rodin
