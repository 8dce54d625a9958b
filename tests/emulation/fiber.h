// A stack of its own to run on, which AddressSanitizer knows of.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>

namespace emulation {

// Kernels switch by the million, so it is done by GCC's setjmp: swapcontext calls the system, and
// AddressSanitizer forgets the stack at it.
class Fiber {
 public:
  // `body` doesn't return and doesn't throw. A fiber that is destroyed in the middle of it just ends there.
  explicit Fiber(std::function<void(Fiber&)> body) : body_(std::move(body)) {}
  Fiber(const Fiber&) = delete;

  // Runs the body from where it is until it calls leave().
  [[gnu::noinline]] void enter() {
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_.get(), kStack);
    if (__builtin_setjmp(caller_) == 0) begun_ ? jump(own_) : begin();
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  [[gnu::noinline]] void leave() {
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, caller_stack_, caller_size_);
    if (__builtin_setjmp(own_) == 0) jump(caller_);
    __sanitizer_finish_switch_fiber(fake_stack, &caller_stack_, &caller_size_);
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  [[noreturn, gnu::noinline]] static void jump(void** place) { __builtin_longjmp(place, 1); }

  [[noreturn, gnu::noinline]] void begin() {
    begun_ = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_.get();
    context.uc_stack.ss_size = kStack;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Fiber::start), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
    setcontext(&context);
    std::abort();
  }

  static void start(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low);
    __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_size_);
    self->body_(*self);
  }

  std::function<void(Fiber&)> body_;
  std::unique_ptr<std::byte[]> stack_{new std::byte[kStack]};
  bool begun_ = false;
  void *own_[5], *caller_[5];  // what __builtin_setjmp needs
  const void* caller_stack_ = nullptr;
  size_t caller_size_ = 0;
};

}  // namespace emulation
