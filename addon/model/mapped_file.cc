#include "model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "ops/check.h"

namespace rodin {

MappedFile::MappedFile(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(file >= 0, "cannot open ", path, ": ", strerror(errno));
  struct stat info;
  const bool is_known = fstat(file, &info) == 0;
  void* mapping = MAP_FAILED;
  if (is_known && info.st_size > 0) {
    mapping = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, file, 0);
  }
  const int error = errno;
  close(file);
  check(is_known, "cannot read the size of ", path, ": ", strerror(error));
  check(info.st_size > 0, path, " is empty; download the shard again");
  check(mapping != MAP_FAILED, "cannot map ", path, " into memory: ", strerror(error));
  data_ = static_cast<const char*>(mapping);
  size_ = info.st_size;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<char*>(data_), static_cast<size_t>(size_));
}

}  // namespace rodin
