// masked_forward in one launch: energy → statistics → peak and trough → ratio and box → modulated
// targets and masked views.
//
// A sample is processed by `parts` blocks, one if the batch alone fills the device. On sm_90 and
// later they are a cluster: each sums the energy of its own channels, and all read each other's
// sums from distributed shared memory and add them in order of rank, so that the map is read once.
// Everything up to the box is then computed redundantly by every part, which is cheaper than
// waiting for one. Earlier devices have no clusters; there each part sums the whole map, which is
// in the L2 cache. Each part paints its share of the image.
#include <numeric>

#include "cuda/activation.h"
#include "cuda/common.h"
#include "cuda/energy.h"
#include "cuda/painter.h"
#include "masked_forward.h"

namespace sanm {
namespace {

constexpr int kThreads = 256;
constexpr int kMostParts = 8;               // the portable cluster size
constexpr int64_t kLeast = 8192;            // least elements of a sample per block: about what it
                                            // moves in the time of its redundant computation
constexpr int64_t kReduceBytes = kWarp * sizeof(Range<double>);  // of the largest type reduced
constexpr int64_t kAhead = 48 * 1024;  // most bytes that a block prefetches of an array
constexpr int kLongRow = 1024;  // classes above which a row of targets is a block's, not a warp's

struct FillValues {
  double value[kFillValues];
  int count;
};

// The arguments of a call; pointers of what is absent are null.
struct Problem {
  int64_t B;
  int C, n, h, w, K, parts, each, value_count;  // each: channels per part
  bool channels_last, vectors, image_vectors;   // vectors: 16-byte accesses are aligned
  Canvas canvas;
  unsigned image_each;  // elements per part
  Settings settings;
  ScalarType feature_type, image_type, target_type;
  const void* features;       // (B, C, h, w), contiguous or channels_last
  const void* targets;        // (B, K) floats or (B,) int64, at strides t_b, t_k
  int64_t t_b, t_k;
  bool soft;
  const float* clean_prob;    // (B,)
  const double* draws;        // (B, draw_count)
  int64_t draw_count;
  const int64_t* seed;        // ()
  const int64_t* index;       // (B,)
  const void* images;         // (B, Cin, H, W)
  void *stats;                // (5, B)
  int32_t* positions;         // (2, B, 2)
  float* ratio;               // (S, B)
  int32_t* boxes;             // (V, B, 4)
  void* new_targets;          // (S, B, K)
  void* views;                // (V·B, Cin, H, W)
};

// Offsets in a block's scratch memory, in bytes.
struct Layout {
  int64_t partial, sums, slice, e, map, norm, left, across, down, begin, rows, hit, size, fill,
      total;

  Layout(const Problem& p, int64_t acc) {  // acc: bytes of the accumulation type
    constexpr int64_t kWarps = kThreads / kWarp;
    const int64_t copies = p.n <= kWarpCells ? kWarps : 1;  // of the map: per warp, or per block
    int64_t end = kReduceBytes;
    const auto take = [&](int64_t bytes) {
      const int64_t start = end;
      end += (bytes + 15) / 16 * 16;
      return start;
    };
    partial = take(kThreads * 8 * sizeof(float));
    sums = take(copies * p.n * acc);
    slice = take(p.n * acc);
    e = take(copies * p.n * acc);
    map = take(copies * p.n * sizeof(float));
    norm = take(copies * 8 * sizeof(float));
    left = take(p.canvas.W * sizeof(int));
    across = take(p.canvas.W * sizeof(float));
    down = take(p.canvas.H * sizeof(float));
    begin = take((int64_t{p.h} + 1) * sizeof(int));
    rows = take(int64_t{4} * p.h * sizeof(float));
    hit = take(kWarps * sizeof(Pixel));
    size = take(2 * sizeof(Size));
    fill = take(2 * p.canvas.channels * sizeof(double));
    total = end;
  }
};

// E over the sample's channels `own`, f (C, h, w).
template <int V, typename Source, typename F = typename Source::Element, typename A = acc_t<F>>
SANM_DEVICE Rows energy(const Problem& p, const Source& f, const Slice& own, A* partial,
                        A* sums) {
  if (p.channels_last)
    return energy_channels_last<V>(f + own.first, p.C, own.count, p.n, sums);
  return energy_contiguous<V>(f + static_cast<int64_t>(own.first) * p.n, own.count, p.n, partial,
                              sums);
}

// A box of this size at its peak or trough.
SANM_DEVICE Box place(const Settings& s, const Canvas& canvas, const Pixel& at, const Size& size) {
  const int top = corner(at.y, size.height, canvas.H, s.centered),
            left = corner(at.x, size.width, canvas.W, s.centered);
  return {top, left, top + size.height, left + size.width};
}

// Sample b's new targets for a draw set and its ratio, by a warp or by the block.
SANM_DEVICE void modulate_targets(const Problem& p, int64_t b, bool by_block, int set,
                                  float ratio) {
  const int64_t label = p.soft ? 0 : static_cast<const int64_t*>(p.targets)[b * p.t_b];
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    modulate<T>(Team{by_block}, p.soft, Untyped<T>{p.target_type, p.targets, b * p.t_b}, p.t_k,
                label, p.K, ratio, p.settings.clamp, p.new_targets, (set * p.B + b) * p.K);
  };
  p.target_type == ScalarType::Double ? go(double{}) : go(float{});
}

// Calls body(F{}) with F the features' type, one whose accumulation type is A.
template <typename A, typename Body>
SANM_DEVICE void dispatch_features(ScalarType type, const Body& body) {
  if constexpr (std::is_same_v<A, double>) body(double{});
  else if (type == ScalarType::Float) body(float{});
  else if (type == ScalarType::Half) body(Half{});
  else body(BFloat16{});
}

// Prefetches elements [first, first + count) of p, up to kAhead bytes.
SANM_DEVICE void ahead(const void* p, ScalarType type, int64_t first, int64_t count) {
  const int64_t bytes = count * bytes_of(type);
  prefetch(static_cast<const unsigned char*>(p) + first * bytes_of(type),
           bytes < kAhead ? bytes : kAhead);
}

// What does not need the map, each by one warp: ratios, box sizes and fill constants → scratch, and
// the new targets. Long rows of targets, and mean fills, by the block. A barrier follows.
template <bool kShared>
SANM_DEVICE void need_no_map(const Problem& p, const Layout& layout, const FillValues& values,
                             const Memory<kShared>& memory, int64_t b, int part,
                             const Draws& draws, float clean_prob) {
  const Settings& s = p.settings;
  const int sets = s.draw_sets(), V = s.view_count(), C = p.canvas.channels, last = warps() - 1;
  double* const fill = memory.template at<double>(layout.fill);
  const auto ratio = [&](int set) { return mask_ratio(s, draws(2 * set), clean_prob); };
  if (warp() == last - 1) {
    if (lane() < sets) {
      const float r = ratio(lane());
      memory.template at<Size>(layout.size)[lane()] =
          box_size(s, r, draws(2 * lane() + 1), p.canvas.H, p.canvas.W);
      if (part == 0) p.ratio[lane() * p.B + b] = r;
    }
    if (s.fill == kConstant || s.fill == kUniform)
      for (int k = lane(); k < V * C; k += kWarp)
        fill[k] = s.fill == kUniform ? draws(2 * sets + k)
                                     : values.value[values.count == 1 ? 0 : k % C];
  }
  const bool long_row = p.K > kLongRow;
  for (int set = 0; part == 0 && set < sets; ++set)
    if (long_row || warp() == last - 2 - set) modulate_targets(p, b, long_row, set, ratio(set));
  if (p.images && s.fill == kMean)
    for (int c = 0; c < C; ++c) {
      const double mean = channel_mean(
          Untyped<double>{p.image_type, p.images, b * p.canvas.size()}, p.canvas, c);
      for (int v = threadIdx.x; v < V; v += blockDim.x) fill[v * C + c] = mean;
    }
}

// Block b·parts + part. Only the energy depends on the type of the features. Inputs are prefetched
// at entry, and what does not need the map is computed while other warps search the map.
template <typename A, bool kShared>
__global__ void __launch_bounds__(kThreads, kShared ? 1 : 2) masked_forward_kernel(
    const __grid_constant__ Problem p, const __grid_constant__ Layout layout,
    const __grid_constant__ FillValues values,
    unsigned char* workspace) {  // layout.total bytes a block; not read if kShared
  const int part = blockIdx.x % p.parts;
  const int64_t b = blockIdx.x / p.parts;
  const Memory<kShared> memory{workspace + (kShared ? 0 : blockIdx.x * layout.total)};
  const int channel = part * p.each < p.C ? part * p.each : p.C;
  const Slice own{channel, p.each < p.C - channel ? p.each : p.C - channel};
  const unsigned size = p.canvas.size(), start = part * p.image_each;
  const unsigned end = start + p.image_each < size ? start + p.image_each : size;
  const bool spread = kShared && cluster_size() > 1;
  const bool masks = p.targets != nullptr;  // else activation_stats
  const Settings& s = p.settings;

  // The energy, overlapped with loads and the taps, which do not depend on it.
  const Slice summed = spread ? own : Slice{0, p.C};
  if (summed.count == p.C || !p.channels_last)
    ahead(p.features, p.feature_type, (b * p.C + summed.first) * p.n,
          int64_t{summed.count} * p.n);
  Draws draws{};
  float clean_prob = 0;
  if (masks) {
    draws = {p.draws ? p.draws + b * p.draw_count : nullptr, p.index ? p.index[b] : b,
             p.seed ? *p.seed : 0};
    clean_prob = p.clean_prob[b];
    if (!p.soft) prefetch(static_cast<const int64_t*>(p.targets) + b * p.t_b, sizeof(int64_t));
    else if (p.t_k == 1) ahead(p.targets, p.target_type, b * p.t_b, p.K);
  }
  const Taps taps{memory.template at<int>(layout.left), memory.template at<float>(layout.across),
                  memory.template at<float>(layout.down), memory.template at<int>(layout.begin),
                  p.h, p.w, p.canvas.H, p.canvas.W};
  taps.fill();
  const Untyped<A> features{p.feature_type, p.features, b * p.C * p.n};
  A *const partial = memory.template at<A>(layout.partial),
    *const sums = memory.template at<A>(layout.sums);
  Rows energies{};
  if (kShared && p.vectors)
    dispatch_features<A>(p.feature_type, [&](auto zero) {
      using F = decltype(zero);
      energies = energy<kVector<F>>(
          p, Typed<F>{static_cast<const F*>(p.features) + features.start}, summed, partial, sums);
    });
  else
    energies = energy<1>(p, features, summed, partial, sums);
  if (p.images && start < end) ahead(p.images, p.image_type, b * size + start, end - start);
  __syncthreads();

  // The map: a copy per warp if it is small.
  const Team team{!kShared || p.n > kWarpCells};
  const int copy = team.block ? 0 : warp();
  A *const slice = memory.template at<A>(layout.slice),
    *const e = memory.template at<A>(layout.e) + copy * p.n;
  float* const map = memory.template at<float>(layout.map) + copy * p.n;
  const A* const summands = memory.template at<A>(energies.partial ? layout.partial : layout.sums);
  if (spread) {
    for (int k = threadIdx.x; k < p.n; k += blockDim.x) slice[k] = energies.sum(summands, p.n, k);
    cluster_sync();
  }
  bool odd = false;  // a map with NaN or infinity is treated as flat
#pragma unroll 1
  for (int k = team.rank(); k < p.n; k += team.size()) {
    A cell = 0;
    if (!spread) cell = energies.sum(summands, p.n, k);
#pragma unroll
    for (int r = 0; r < kMostParts; ++r)
      if (spread && r < p.parts) cell += cluster_load(slice + k, r);
    e[k] = cell;
    map[k] = static_cast<float>(cell);
    odd = odd || !(map[k] - map[k] == 0);
  }
  if (spread) cluster_arrive();  // waited for before exit: until then others read this block's sums
  odd = team.any(odd);

  // Peak and trough; the last warps, which have the fewest columns, also do the other work.
  float* const rows = memory.template at<float>(layout.rows);
  const Locator locator{taps, map, rows, rows + 2 * p.h, memory.template at<Pixel>(layout.hit),
                        s.quantize};
  if (part == 0 && team.block)
    statistics(team, e, p.n, static_cast<A*>(p.stats) + b, p.B);
  if (!odd) {
    if (s.quantize) normalize(team, map, p.n, memory.template at<float>(layout.norm) + 8 * copy);
    locator.scan();
  }
  __syncthreads();
  if (!odd) locator.search();
  if (part == 0 && !team.block && warp() == warps() - 1)
    statistics(team, e, p.n, static_cast<A*>(p.stats) + b, p.B);
  if (masks) need_no_map(p, layout, values, memory, b, part, draws, clean_prob);
  __syncthreads();

  const Pixel flat{0, 0}, peak = odd ? flat : locator.found(true),
              trough = odd ? flat : locator.found(false);
  if (part == 0 && threadIdx.x == 0) {
    const int positions[4] = {peak.y, peak.x, trough.y, trough.x};
#pragma unroll
    for (int k = 0; k < 4; ++k) p.positions[2 * (k / 2 * p.B + b) + k % 2] = positions[k];
  }
  if (masks) {
    const Size* const sizes = memory.template at<Size>(layout.size);
    const bool trough_first = s.views == 2;
    const Pixel at{trough_first ? trough.y : peak.y, trough_first ? trough.x : peak.x};
    const Box box[2] = {place(s, p.canvas, at, sizes[0]),
                        place(s, p.canvas, trough, sizes[s.draw_sets() - 1])};
    if (part == 0 && threadIdx.x == 0)
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (v == s.view_count()) break;
        const int corners[4] = {box[v].top, box[v].left, box[v].bottom, box[v].right};
#pragma unroll
        for (int k = 0; k < 4; ++k) p.boxes[4 * (v * p.B + b) + k] = corners[k];
      }
    if (p.images) {
      const Filling<kShared> filling{p.image_type, s.fill == kPixel, memory,
                                     layout.fill,  draws.index,      draws.seed};
      const int which = static_cast<int>(s.views);
      if (kShared && p.image_vectors)
        paint<true>(filling, p.canvas, which, p.images, p.views, b * size, p.B * size, box[0],
                    box[1], start, end);
      else
        paint<false>(filling, p.canvas, which, p.images, p.views, b * size, p.B * size, box[0],
                     box[1], start, end);
    }
  }
  if (spread) cluster_wait();
}

int least_multiple(int64_t n, int64_t of) { return static_cast<int>(ceil_div(n, of) * of); }

// The largest cluster for features of this type.
int cluster_limit_of(const Tensor& features) {
  return acc_type(features) == ScalarType::Double
             ? cluster_limit(features, masked_forward_kernel<double, true>)
             : cluster_limit(features, masked_forward_kernel<float, true>);
}

// Blocks per sample: the number that minimises the time if `slots` blocks run at once, counted in
// elements moved per block. An image is read once and written as two views; without clusters every
// part reads the whole map; every wave has the cost kLeast of the redundant computation.
int parts_of(const Problem& p, int clusters, int64_t slots) {
  const int64_t map = int64_t{p.C} * p.n, image = p.canvas.size();
  const auto time = [&](int64_t parts) {
    return ceil_div(p.B * parts, slots) *
           (kLeast + (clusters > 1 ? map / parts : map) + 3 * image / parts);
  };
  int best = 1;
  if (clusters == 1 && image == 0) return best;  // nothing to divide
  for (int parts = 2; parts <= kMostParts && std::max(map, image) / parts >= kLeast; parts *= 2)
    if (time(parts) < time(best)) best = parts;
  return best;
}

// Sizes and the features' layout of a call, and the blocks per sample.
Problem prepare(const Image& features, int64_t H, int64_t W, int64_t image_channels) {
  const Tensor& x = features.tensor;
  Problem p{};
  p.B = x.size(0);
  p.C = static_cast<int>(x.size(1));
  p.h = static_cast<int>(x.size(2));
  p.w = static_cast<int>(x.size(3));
  p.canvas = {static_cast<int>(image_channels), static_cast<int>(H), static_cast<int>(W), false};
  const bool fits = row_elements(x) < kIntEnd &&  // no overflow: both are in memory
                    (image_channels == 0 || image_channels * H * W < kIntEnd);
  if (!fits)
    value_error("features and images: a sample of less than 2^31 elements was expected, got ",
                x.size(1), "×", p.h, "×", p.w, " and ", image_channels, "×", H, "×", W);
  p.n = p.h * p.w;
  p.channels_last = features.channels_last;
  p.features = x.const_data_ptr();
  p.feature_type = x.scalar_type();
  const int64_t bytes = x.element_size(), V = 16 / bytes;
  const int64_t period = features.channels_last ? 1 : V / std::gcd<int64_t>(p.n, V) * p.n;
  p.vectors = aligned16(p.features, (features.channels_last ? p.C : int64_t{p.C} * p.n) * bytes) &&
              (p.n % V == 0 || period <= kThreads * V);
  p.parts = parts_of(p, cluster_limit_of(x), 2 * multiprocessors(x));
  p.each = least_multiple(ceil_div(p.C, p.parts), V);
  p.image_each = least_multiple(ceil_div(p.canvas.size(), p.parts), 64);
  return p;
}

void launch_samples(const Tensor& features, const Problem& p, const FillValues& values) {
  const auto go = [&](auto zero) {
    using A = decltype(zero);
    const Layout layout(p, sizeof(A));
    const int64_t blocks = p.B * p.parts;
    if (layout.total > shared_limit(features)) {
      const Tensor workspace = new_tensor(features, {blocks * layout.total}, ScalarType::Byte);
      launch({"masked_forward", features, {blocks}, kThreads, kReduceBytes},
             masked_forward_kernel<A, false>, p, layout, values, out<unsigned char>(workspace));
      return;
    }
    const int64_t cluster = std::min(p.parts, cluster_limit_of(features));
    launch({"masked_forward", features, {blocks}, kThreads, layout.total, cluster},
           masked_forward_kernel<A, true>, p, layout, values, nullptr);
  };
  acc_type(features) == ScalarType::Double ? go(double{}) : go(float{});
}

void run(const Inputs& in, const Outputs& o) {
  const Image features(in.features);
  const Image images(in.images ? *in.images : in.features);
  Problem p = prepare(features, in.H, in.W, in.images ? in.images->size(1) : 0);
  const Tensor clean_prob = packed(in.clean_prob);
  const OptTensor draws = packed(in.draws), index = packed(in.sample_index);
  FillValues values{};
  if (in.fill_value.size() > kFillValues)
    value_error("fill_value: expected one number or at most ", kFillValues,
                " (one per channel) with the cuda backend, got ", in.fill_value.size());
  std::copy(in.fill_value.begin(), in.fill_value.end(), values.value);
  values.count = static_cast<int>(in.fill_value.size());
  p.settings = in.settings;
  p.K = static_cast<int>(in.K);
  p.soft = in.targets.scalar_type() != ScalarType::Long;
  p.target_type = o.targets.scalar_type();
  p.targets = in.targets.const_data_ptr();
  p.t_b = in.targets.stride(0);
  p.t_k = p.soft ? in.targets.stride(1) : 0;
  p.clean_prob = sanm::in<float>(clean_prob);
  p.draws = in_or_null<double>(draws);
  p.draw_count = draws ? draws->size(1) : 0;
  p.seed = in_or_null<int64_t>(in.seed);
  p.index = in_or_null<int64_t>(index);
  p.stats = o.stats.mutable_data_ptr();
  p.positions = out<int32_t>(o.positions);
  p.ratio = out<float>(o.ratio);
  p.boxes = out<int32_t>(o.boxes);
  p.new_targets = o.targets.mutable_data_ptr();
  if (in.images) {
    const int64_t bytes = images.tensor.element_size() * int64_t{p.canvas.size()};
    p.canvas.channels_last = images.channels_last;
    p.image_type = images.tensor.scalar_type();
    p.images = images.tensor.const_data_ptr();
    p.views = o.views.mutable_data_ptr();
    p.image_vectors = aligned16(p.images, bytes) && aligned16(p.views, bytes);
  }
  launch_samples(features.tensor, p, values);
}

MaskedForward masked_forward(SANM_PARAMETERS) {
  const Inputs in = SANM_INPUTS;
  check_masked_forward(in);
  const Outputs o = allocate(in, [&](const auto& size, ScalarType type, bool channels_last) {
    return new_tensor(in.features, size, type, channels_last);
  });
  run(in, o);
  return as_tuple(o);
}

void masked_forward_out(SANM_PARAMETERS, SANM_OUT_PARAMETERS) {
  const Inputs in = SANM_INPUTS;
  const Outputs o = SANM_OUTPUTS;
  check_masked_forward(in);
  check_out(in, o, parts);
  run(in, o);
}

// features (B, C, h, w) → statistics (5, B), peak and trough (2, B, 2) int32
std::tuple<Tensor, Tensor> activation_stats(const Tensor& features_, int64_t H, int64_t W,
                                            bool quantize) {
  check_features(Expect(features_), features_, H, W);
  const Image features(features_);
  Problem p = prepare(features, H, W, 0);
  const Tensor stats = new_tensor(features_, {5, p.B}, acc_type(features_)),
               positions = new_tensor(features_, {2, p.B, 2}, ScalarType::Int);
  p.settings.quantize = quantize;
  p.stats = stats.mutable_data_ptr();
  p.positions = out<int32_t>(positions);
  launch_samples(features.tensor, p, FillValues{});
  return {stats, positions};
}

}  // namespace

SANM_CUDA_KERNELS(m) {
  m.impl("masked_forward.cuda", TORCH_BOX(&masked_forward));
  m.impl("masked_forward_out.cuda", TORCH_BOX(&masked_forward_out));
  m.impl("activation_stats.cuda", TORCH_BOX(&activation_stats));
}

}  // namespace sanm
