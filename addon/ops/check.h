// Errors of the native code: one std::runtime_error with one sentence, caught at the engine thread.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace rodin {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The device takes no more work from this process; only a new one helps.
struct DeviceLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

}  // namespace rodin
