// The threads of a block, by turns: each goes on until it waits for others. The turns come in an order that
// is drawn anew all the time, so that what depends on it shows in the results.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {

constexpr unsigned kLanes = 32;

enum class State { ready, at_barrier, at_shuffle, ended };

struct Thread {
  dim3 index;
  State state = State::ready;
  Where where{};           // it waits
  Fiber* fiber = nullptr;  // it is on, once it has begun
  unsigned shuffles = 0;
};

// Two sets of values: the next shuffle's may be written while some lanes have yet to read this one's.
struct Warp {
  uint64_t value[2][kLanes];
};

inline std::vector<unsigned> numbers(uint64_t count) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

inline dim3 index_of(unsigned number, const dim3& sizes) {
  return {number % sizes.x, number / sizes.x % sizes.y, number / sizes.x / sizes.y};
}

class Block {
 public:
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    order_ = numbers(blockDim.x * blockDim.y * blockDim.z);
    threads_.assign(order_.size(), {});
    warps_.resize((order_.size() + kLanes - 1) / kLanes);
    for (unsigned n : order_) threads_[n].index = index_of(n, blockDim);
    do {
      std::shuffle(order_.begin(), order_.end(), random);
      take_turns();
    } while (release());
  }

  void wait(State state, Where where) {
    Thread& self = *current_;
    self.state = state;
    self.where = where;
    self.fiber->leave();
  }

  uint64_t exchange(uint64_t value, int lane_mask, Where where) {
    const size_t number = current_ - threads_.data(), lane = number % kLanes;
    auto& values = warps_[number / kLanes].value[current_->shuffles++ % 2];
    values[lane] = value;
    wait(State::at_shuffle, where);
    return values[(lane ^ lane_mask) % kLanes];
  }

  inline static std::mt19937 random;

 private:
  // Every thread that is ready goes on, in the order of this turn.
  void take_turns() {
    for (next_ = 0; next_ < order_.size();) {
      Thread& thread = threads_[order_[next_]];
      if (thread.state != State::ready) {
        ++next_;
      } else if (thread.fiber) {
        ++next_;
        begin(thread);
        thread.fiber->enter();
      } else {
        idle_fiber().enter();
      }
      if (error_) give_up();
    }
  }

  void begin(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
  }

  // Threads that don't wait need no fiber each: one runs them all until one of them waits.
  void run_fresh_threads(Fiber& fiber) {
    while (!error_ && next_ < order_.size()) {
      Thread& thread = threads_[order_[next_]];
      if (thread.state != State::ready || thread.fiber) return;
      ++next_;
      begin(thread);
      thread.fiber = &fiber;
      try {
        (*kernel_)();
      } catch (...) {
        error_ = std::current_exception();
      }
      thread.state = State::ended;
      thread.fiber = nullptr;
    }
  }

  Fiber& idle_fiber() {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>([this](Fiber& self) {
        for (;;) {
          run_fresh_threads(self);
          idle_.push_back(&self);
          self.leave();
        }
      }));
      idle_.push_back(fibers_.back().get());
    }
    Fiber& fiber = *idle_.back();
    idle_.pop_back();
    return fiber;
  }

  // Lets those go on whose others are all there; false once all have ended.
  bool release() {
    bool released = meet(State::at_barrier, 0, threads_.size());
    if (!released) {
      for (size_t first = 0; first + kLanes <= threads_.size(); first += kLanes) {
        released |= meet(State::at_shuffle, first, first + kLanes);
      }
    }
    const auto ended = [](const Thread& t) { return t.state == State::ended; };
    if (!released && !std::all_of(threads_.begin(), threads_.end(), ended)) {
      error_ = std::make_exception_ptr(std::runtime_error(who_waits()));
      give_up();
    }
    return released;
  }

  bool meet(State state, size_t first, size_t last) {
    for (size_t n = first; n < last; ++n) {
      if (threads_[n].state != state || threads_[n].where.line() != threads_[first].where.line())
        return false;
    }
    for (size_t n = first; n < last; ++n) threads_[n].state = State::ready;
    return true;
  }

  std::string who_waits() const {
    std::ostringstream text;
    text << "threads wait for others that don't come, in block " << blockIdx.x << ", " << blockIdx.y << ":";
    const Thread* last = nullptr;
    for (const Thread& t : threads_) {
      if (last && t.state == last->state && t.where.line() == last->where.line()) continue;
      last = &t;
      text << " from thread " << &t - threads_.data();
      if (t.state == State::ended) text << " ended;";
      if (t.state == State::at_barrier) text << " at the barrier of line " << t.where.line() << ";";
      if (t.state == State::at_shuffle) text << " at the shuffle of line " << t.where.line() << ";";
    }
    return text.str();
  }

  [[noreturn]] void give_up() {
    idle_.clear();
    fibers_.clear();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  size_t next_ = 0;  // in order_
  Thread* current_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::exception_ptr error_;
};

}  // namespace emulation
