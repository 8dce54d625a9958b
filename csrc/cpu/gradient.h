// The weight gradients of a few jobs, one block of positions at a time, summed over blocks in double.
//
// x is packed in units, each on its own: one channel in its phases, whose taps are the columns of the dot
// tile; or, where there is no spatial axis, a strip of channels as wide as the outer tile, image by image.
#pragma once

#include <algorithm>
#include <vector>

#include "pack.h"
#include "tiles.h"

namespace singe {

template <class In>
class Gradient {
 public:
  using T = Compute<In>;

  explicit Gradient(const Geometry& g)
      : g_(g),
        linear_(g.taps() == 1 && g.inputs() == 1 && g.image() == 1 && !padded(g)),
        block_(linear_ ? 256 : 2048),
        pitch_(block_ + kLine),
        tiles_(simd::tiles<T>()) {}

  // The number of units for a number of channels, the elements of one when packed, and its columns.
  int64_t units(int64_t channels) const {
    return linear_ ? (channels + tiles_.outer_columns - 1) / tiles_.outer_columns : channels;
  }
  int64_t unit_size() const { return linear_ ? g_.batch * tiles_.outer_columns : g_.channel(); }
  int64_t unit_columns() const { return linear_ ? tiles_.outer_columns : g_.taps(); }

  // Packs one unit of a group; `x` is the group's first channel in the first image, which has `all` channels.
  void pack(const In* x, int64_t all, int64_t channels, int64_t unit, T* to) const {
    if (linear_) {
      const int64_t first = unit * tiles_.outer_columns;
      const int64_t width = std::min<int64_t>(tiles_.outer_columns, channels - first);
      std::memset(to, 0, unit_size() * sizeof(T));
      for (int64_t b = 0; b < g_.batch; ++b)
        convert(x + b * all + first, 1, width, to + b * tiles_.outer_columns);
    } else {
      pack_channel(x + unit * g_.inputs(), all * g_.inputs(), g_, to);
    }
  }

  // [jobs, units, unit_columns] from the jobs' deltas and packed units of x.
  const std::vector<double>& compute(const std::vector<const In*>& deltas, const T* x, int64_t units) {
    const int64_t rows = static_cast<int64_t>(deltas.size());
    columns_ = units * unit_columns();
    gradient_.assign(rows * columns_, 0.0);
    rows_.resize(rows * pitch_ + kLine);
    const auto at = reinterpret_cast<uintptr_t>(rows_.data()) / sizeof(T);
    first_row_ = rows_.data() + (kLine - at % kLine) % kLine;
    if (!linear_) point_at(x, units);
    for (int64_t from = 0; from < g_.length(); from += block_) {
      const int64_t n = std::min(block_, g_.length() - from);
      for (int64_t r = 0; r < rows; ++r) pack_delta(deltas[r], g_, from, n, first_row_ + r * pitch_);
      if (linear_) {
        for (int64_t u = 0; u < units; ++u) add_strip(u, x + u * unit_size(), rows, from, n);
      } else {
        for (int64_t c = 0; c < columns_; c += tiles_.dot_columns) add_taps(c, rows, from, n);
      }
    }
    return gradient_;
  }

 private:
  // With padding, the one position of a one-pixel image may read only zeros.
  static bool padded(const Geometry& g) {
    return g.axis[0].padding + g.axis[1].padding + g.axis[2].padding > 0;
  }

  // A pointer per (channel, tap), the last one repeated to fill a tile.
  void point_at(const T* x, int64_t channels) {
    column_.clear();
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < g_.taps(); ++t) column_.push_back(x + c * g_.channel() + g_.tap_offset(t));
    }
    column_.resize(column_.size() + tiles_.dot_columns - 1, column_.back());
  }

  // One dot tile's columns against all rows, over one block.
  void add_taps(int64_t c, int64_t rows, int64_t from, int64_t n) {
    const T* column[simd::kMostSums];
    for (int i = 0; i < tiles_.dot_columns; ++i) column[i] = column_[c + i] + from;
    const int64_t width = std::min<int64_t>(tiles_.dot_columns, columns_ - c);
    for_tiles(rows, c, tiles_.dot_columns, width, [&](bool four, const T* const* row, T* sums) {
      (four ? tiles_.dot4 : tiles_.dot1)(row, column, n, sums);
    });
  }

  // One strip of channels against all rows, over one block of images.
  void add_strip(int64_t unit, const T* x, int64_t rows, int64_t from, int64_t n) {
    const int64_t width = tiles_.outer_columns;
    for_tiles(rows, unit * width, width, width, [&](bool four, const T* const* row, T* sums) {
      (four ? tiles_.outer4 : tiles_.outer1)(row, x + from * width, width, n, sums);
    });
  }

  // Walks the rows by tiles and adds each tile's sums, `step` a row, to the columns [c, c + width).
  template <class Tile>
  void for_tiles(int64_t rows, int64_t c, int64_t step, int64_t width, const Tile& tile) {
    const T* row[simd::kRows];
    T sums[simd::kMostSums];
    for (int64_t r = 0, height; r < rows; r += height) {
      height = rows - r >= simd::kRows ? simd::kRows : 1;
      for (int64_t i = 0; i < height; ++i) row[i] = first_row_ + (r + i) * pitch_;
      tile(height == simd::kRows, row, sums);
      for (int64_t i = 0; i < height; ++i) {
        double* gradient = &gradient_[(r + i) * columns_ + c];
        for (int64_t j = 0; j < width; ++j) gradient[j] += sums[i * step + j];
      }
    }
  }

  const Geometry& g_;
  bool linear_;
  static constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

  int64_t block_;  // positions that are worked on at once
  int64_t pitch_;  // of rows_, which begin at cache lines and not all in the same set
  int64_t columns_ = 0;
  simd::Tiles<T> tiles_;
  std::vector<const T*> column_;
  std::vector<T> rows_;
  T* first_row_ = nullptr;
  std::vector<double> gradient_;
};

}  // namespace singe
