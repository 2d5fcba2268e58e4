// Which instruction paths of the fast CPU implementation this machine can run.
#pragma once

#include <string>
#include <vector>

namespace rodin {

struct Kernels;

// Best first; the last is always "portable".
std::vector<std::string> supported_cpu_paths();

// `path` is "auto" (the best) or one of supported_cpu_paths(); throws otherwise.
const Kernels& kernels_of_path(const std::string& path);

}  // namespace rodin
