// Which experts a token goes to, from the router's logits (a float32 linear layer made them): scoring
// function, correction bias, best groups, k largest. One warp a token, the choices in shared memory; ties go
// to the lower index throughout. Without groups everything stays in registers. Bound by latency: k rounds of
// a warp-wide argmax over E values.
#include "cuda/route.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = 4;
__global__ void __launch_bounds__(32 * kWarps)
    route_ungrouped_kernel(const __grid_constant__ RouteKernelParams p) {
  let_successor_begin();
  route_ungrouped(p, static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32,
                  [] { wait_for_predecessor(); });
}

__global__ void __launch_bounds__(32 * kWarps) route_kernel(const __grid_constant__ RouteKernelParams p) {
  let_successor_begin();
  wait_for_predecessor();
  extern __shared__ float shared[];  // [kWarps, route_scratch]
  const int warp = threadIdx.x / 32;
  route_grouped(p, static_cast<int64_t>(blockIdx.x) * kWarps + warp, shared + warp * route_scratch(p.route));
}

}  // namespace

void run_route(const RouteKernelParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const RouteParams& route = params.route;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.num_tokens, kWarps)));
  if (is_route_ungrouped(route)) {
    launch_overlapped(route_ungrouped_kernel, grid, 32 * kWarps, 0, stream, params, "route_ungrouped_kernel");
    return;
  }
  const int64_t floats = kWarps * route_scratch(route);
  launch_overlapped(route_kernel, grid, 32 * kWarps, static_cast<size_t>(floats) * sizeof(float), stream,
                    params, "route_kernel");
}

}  // namespace rodin::cuda
