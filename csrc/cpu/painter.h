// Masked views: copies of an image, each with a box filled, made in one pass over the image.
#pragma once

#include "cpu/common.h"
#include "cpu/stream.h"
#include "math/box.h"
#include "math/draws.h"

namespace sanm {

// Draws of one sample: given by the caller, or from Philox.
struct Draws {
  const double* given;  // (D) or null
  int64_t index, seed;
  double operator()(int64_t number) const {
    return given ? given[number] : uniform(number, index, seed);
  }
};

// Section 3 of the method, one sample: x (Cin, H, W) or (H, W, Cin) → V copies with a box filled.
template <typename T>
class Painter {
 public:
  Painter(const Settings& settings, const std::vector<double>& fill_value, int64_t H, int64_t W,
          int64_t channels, bool channels_last, bool stream)
      : s_(settings), fill_value_(fill_value), H_(H), W_(W), C_(channels),
        step_(channels_last ? channels : 1), planes_(channels_last ? 1 : channels),
        channels_last_(channels_last), stream_(stream), fill_(2 * channels),
        row_(2 * W_ * step_), mask_(3 * W_ * step_ * sizeof(T)) {}

  // boxes: one (4) per view; view v is written at out + v·stride.
  void paint(const T* x, T* out, int64_t stride, const int32_t* const boxes[2], const Draws& draws) {
    const int V = s_.view_count();
    fills(x, draws);
    const int64_t length = W_ * step_, bytes = length * sizeof(T);
    const auto mark = [&](int v, int value) {
      std::memset(&mask_[v * bytes] + boxes[v][1] * step_ * sizeof(T), value,
                  (boxes[v][3] - boxes[v][1]) * step_ * sizeof(T));
    };
    for (int v = 0; v < V; ++v) mark(v, 0xff);
    for (int64_t plane = 0; plane < planes_; ++plane) {
      const T* source = x + plane * H_ * length;
      T* target = out + plane * H_ * length;
      if (s_.fill != kPixel)
        for (int v = 0; v < V; ++v) fill_row(v, plane, boxes[v][0], boxes[v], draws);
      for (int64_t y = 0; y < H_;) {
        // Rows up to the next edge of a box are copied in the same way.
        int64_t end = H_;
        bool hit[2] = {false, false};
        for (int v = 0; v < V; ++v) {
          hit[v] = boxes[v][0] <= y && y < boxes[v][2];
          for (const int edge : {boxes[v][0], boxes[v][2]})
            if (edge > y) end = std::min<int64_t>(end, edge);
        }
        if (s_.fill == kPixel && (hit[0] || hit[1])) end = y + 1;
        const char* from = reinterpret_cast<const char*>(source + y * length);
        char* to[2];
        Overlay with[2];  // outside its box a view uses the third, empty mask
        for (int v = 0; v < V; ++v) {
          to[v] = reinterpret_cast<char*>(target + v * stride + y * length);
          with[v] = {reinterpret_cast<const char*>(&row_[v * length]),
                     &mask_[(hit[v] ? v : 2) * bytes]};
          if (s_.fill == kPixel && hit[v]) fill_row(v, plane, y, boxes[v], draws);
        }
        if (V == 2 && (hit[0] || hit[1]))
          overlay_rows_twice(to[0], to[1], from, with, bytes, end - y, stream_);
        else if (V == 2)
          copy_bytes_twice(to[0], to[1], from, (end - y) * bytes, stream_);
        else if (!hit[0])
          copy_bytes(to[0], from, (end - y) * bytes, stream_);
        else
          for (int64_t row = 0; row < end - y; ++row)
            overlay_bytes(to[0] + row * bytes, from + row * bytes, with[0], bytes, stream_);
        y = end;
      }
    }
    for (int v = 0; v < V; ++v) mark(v, 0);
  }

 private:
  static T cast(double value) {
    if constexpr (std::is_same_v<T, double>) return value;
    return static_cast<T>(static_cast<float>(value));
  }

  void fills(const T* x, const Draws& draws) {
    for (int v = 0; v < s_.view_count(); ++v)
      for (int64_t c = 0; c < C_; ++c) {
        T& fill = fill_[v * C_ + c];
        if (s_.fill == kConstant)
          fill = cast(fill_value_[fill_value_.size() == 1 ? 0 : c]);
        else if (s_.fill == kUniform)
          fill = cast(draws(2 * s_.draw_sets() + v * C_ + c));
        else if (s_.fill == kMean)
          fill = v ? fill_[c] : cast(mean(x, c));
      }
  }

  double mean(const T* x, int64_t c) const {
    const T* first = channels_last_ ? x + c : x + c * H_ * W_;
    double sum = 0;
    for (int64_t k = 0; k < H_ * W_; ++k) sum += static_cast<double>(first[k * step_]);
    return sum / static_cast<double>(H_ * W_);
  }

  // The fill of the box's columns in row y of view v → row_.
  void fill_row(int v, int64_t plane, int64_t y, const int32_t* box, const Draws& draws) {
    T* const row = &row_[v * W_ * step_];
    if (s_.fill != kPixel && !channels_last_) {
      std::fill(row + box[1], row + box[3], fill_[v * C_ + plane]);
      return;
    }
    const uint32_t kind = s_.views == 3 ? v : static_cast<uint32_t>(s_.views - 1);
    for (int64_t column = box[1]; column < box[3]; ++column)
      for (int64_t k = 0; k < step_; ++k) {
        const int64_t c = channels_last_ ? k : plane;
        row[column * step_ + k] =
            s_.fill == kPixel
                ? cast(normal(static_cast<uint32_t>((c * H_ + y) * W_ + column), 1 + kind,
                              draws.index, draws.seed))
                : fill_[v * C_ + c];
      }
  }

  Settings s_;
  const std::vector<double>& fill_value_;
  int64_t H_, W_, C_;
  int64_t step_, planes_;  // elements per pixel of a row; number of planes
  bool channels_last_, stream_;
  std::vector<T> fill_, row_;  // (V, C); (V, W, step), set in the boxes' columns
  std::vector<char> mask_;     // bytes of (3, W, step): ones in the boxes' columns; the third is 0
};

}  // namespace sanm
