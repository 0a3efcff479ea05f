// The kernels of one instruction set. This file is compiled once for each, with NW_ISA as its name.
#include <type_traits>

#include "call.h"
#include "lanes.h"
#include "lanes_gradient.h"
#include "runs_gradient.h"

namespace {

using normwise::kBFloat16;
using normwise::Kernels;
using normwise::kFloat16;

// The loops that a call takes. With a mask, one variant does for all activations.
template <class T>
RunLoops<T> run_loops_for(const Call& call, bool has_weight, bool has_bias, bool has_mask) {
  const bool centers = call.normalizer == kStandardize, by_element = call.weight_r1 && has_weight;
  const auto with = [&](auto recovery) {
    constexpr int kRecovery = decltype(recovery)::value;
    if (has_mask && call.mask_r1) return run_loops<T, kRecovery, true, kActAny>(centers);
    if (call.activation == kNone) return run_loops<T, kRecovery, false, kActNone>(centers);
    if (call.activation == kRelu) return run_loops<T, kRecovery, false, kActRelu>(centers);
    return run_loops<T, kRecovery, false, kActAny>(centers);
  };
  if (!by_element) return with(std::integral_constant<int, kConstant>());
  return has_bias ? with(std::integral_constant<int, kAffine>()) : with(std::integral_constant<int, kScale>());
}

template <class T>
LaneLoops<T> lane_loops_for(const Call& call, bool has_weight, bool has_mask) {
  const auto with = [&](auto down) {
    constexpr bool kDown = decltype(down)::value;
    if (has_mask && (call.mask_k1 || call.mask_r1)) return lane_loops<T, kDown, true, kActAny>();
    if (call.activation == kNone) return lane_loops<T, kDown, false, kActNone>();
    if (call.activation == kRelu) return lane_loops<T, kDown, false, kActRelu>();
    return lane_loops<T, kDown, false, kActAny>();
  };
  return call.weight_r0 && has_weight ? with(std::true_type()) : with(std::false_type());
}

template <class T>
bool forward_of(const Call& call, const Forward& t, const Team& team) {
  if (call.engine == normwise::kRuns)
    return runs_forward(call, t, team, run_loops_for<T>(call, t.weight, t.bias, t.mask));
  return lanes_forward(call, t, team, lane_loops_for<T>(call, t.weight, t.mask));
}

template <class T>
bool backward_of(const Call& call, const Backward& t, const Team& team) {
  if (call.engine == normwise::kRuns)
    return runs_backward(call, t, team, run_loops_for<T>(call, t.weight, t.bias, t.mask));
  return lanes_backward(call, t, team, lane_loops_for<T>(call, t.weight, t.mask));
}

bool forward(const Call& call, const Forward& tensors, const Team& team) {
  if (call.dtype == kBFloat16) return forward_of<BFloat16>(call, tensors, team);
  if (call.dtype == kFloat16) return forward_of<Float16>(call, tensors, team);
  return forward_of<float>(call, tensors, team);
}

bool backward(const Call& call, const Backward& tensors, const Team& team) {
  if (call.dtype == kBFloat16) return backward_of<BFloat16>(call, tensors, team);
  if (call.dtype == kFloat16) return backward_of<Float16>(call, tensors, team);
  return backward_of<float>(call, tensors, team);
}

}  // namespace

#define NW_TEXT_(x) #x
#define NW_TEXT(x) NW_TEXT_(x)
#define NW_JOIN_(a, b) a##b
#define NW_JOIN(a, b) NW_JOIN_(a, b)

extern "C" {
extern const Kernels NW_JOIN(normwise_kernels_, NW_ISA);
const Kernels NW_JOIN(normwise_kernels_, NW_ISA) = {NW_TEXT(NW_ISA), forward, backward};
}
