// Vectors of the compiler's own kind (GCC and Clang), compiled for several instruction sets in one build.
//
// A kernel is an always-inlined template over the vector's bytes, which tiles.h wraps once for each
// instruction set; or a plain loop for run() to compile for each. Which one is picked at run time. Nothing
// here knows of torch.
#pragma once

#include <cstdint>
#include <cstring>

#define SINGE_INLINED __attribute__((always_inline))
#define SINGE_INLINE inline SINGE_INLINED

#if defined(__x86_64__) && defined(__ELF__)
#define SINGE_X86 1
#define SINGE_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define SINGE_TARGET_V4 __attribute__((target("arch=x86-64-v4")))
#else
#define SINGE_X86 0
#define SINGE_TARGET_V3
#define SINGE_TARGET_V4
#endif

namespace singe::simd {

enum class Level { base, v3, v4 };

// What this machine runs: v3 is AVX2 and what came with it, v4 is AVX-512. All that the targets above allow
// is asked for, as far as the compiler can: a virtual machine may hide any of it.
inline Level level() {
#if SINGE_X86
  static const Level best = [] {
    __builtin_cpu_init();
#if defined(__clang__) || __GNUC__ < 12  // which do not know the levels by name
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    const bool v3 = __builtin_cpu_supports("x86-64-v3"), v4 = __builtin_cpu_supports("x86-64-v4");
#endif
    return v4 ? Level::v4 : v3 ? Level::v3 : Level::base;
  }();
  return best;
#else
  return Level::base;
#endif
}

template <class F>
SINGE_TARGET_V4 void run_v4(const F& f) {
  f();
}
template <class F>
SINGE_TARGET_V3 void run_v3(const F& f) {
  f();
}

// Calls f, a lambda marked SINGE_INLINED around a loop that the compiler vectorises by itself.
template <class F>
SINGE_INLINE void run(const F& f) {
  const Level best = level();
  if (best == Level::v4) return run_v4(f);
  if (best == Level::v3) return run_v3(f);
  f();
}

template <class T, int bytes>
struct Vec {
  typedef T type __attribute__((vector_size(bytes)));
  static constexpr int lanes = bytes / sizeof(T);
};

template <class V, class T>
SINGE_INLINE void load(V& v, const T* from) {
  std::memcpy(&v, from, sizeof(V));
}

// The sum of the lanes, by halves: always in the same order.
template <class T, int bytes>
SINGE_INLINE T lane_sum(const typename Vec<T, bytes>::type& v) {
  if constexpr (bytes == sizeof(T)) {
    return v[0];
  } else {
    typename Vec<T, bytes / 2>::type low, high;
    std::memcpy(&low, &v, bytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + bytes / 2, bytes / 2);
    low += high;
    return lane_sum<T, bytes / 2>(low);
  }
}

}  // namespace singe::simd
