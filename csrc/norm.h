// The three norms, as a running value: start at 0, merge |element|, finish. NaN always wins.
#pragma once

#include <cmath>
#include <stdexcept>

#ifdef __CUDACC__
#define SINGE_HOST_DEVICE __host__ __device__
#else
#define SINGE_HOST_DEVICE
#endif

namespace singe {

enum class Norm { one, two, inf };

template <Norm norm>
struct NormOf {
  template <class T>
  SINGE_HOST_DEVICE static T element(T v) {
    if constexpr (norm == Norm::two) return v * v;
    return v < 0 ? -v : v;
  }

  template <class T>
  SINGE_HOST_DEVICE static T merge(T a, T b) {
    if constexpr (norm != Norm::inf) return a + b;
    return a > b || a != a ? a : b;
  }

  SINGE_HOST_DEVICE static double finish(double sum) {
    if constexpr (norm == Norm::two) return sqrt(sum);
    return sum;
  }
};

// The same with the norm known at run time, where it is not the inner loop.
SINGE_HOST_DEVICE inline double merge(Norm norm, double a, double b) {
  return norm == Norm::inf ? NormOf<Norm::inf>::merge(a, b) : a + b;
}

SINGE_HOST_DEVICE inline double element(Norm norm, double v) {
  return norm == Norm::two ? NormOf<Norm::two>::element(v) : NormOf<Norm::one>::element(v);
}

SINGE_HOST_DEVICE inline double finish(Norm norm, double sum) {
  return norm == Norm::two ? sqrt(sum) : sum;
}

// Calls f.template operator()<norm>() for p = 1, 2 or infinity.
template <class F>
void with_norm(double p, F&& f) {
  if (p == 1) return f.template operator()<Norm::one>();
  if (p == 2) return f.template operator()<Norm::two>();
  if (std::isinf(p) && p > 0) return f.template operator()<Norm::inf>();
  throw std::runtime_error("p: expected 1, 2 or inf");
}

}  // namespace singe
