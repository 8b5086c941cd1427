// masked_forward in one launch: energy → statistics → peak and trough → ratio and box → modulated
// targets and masked views, and in the one-pass mode the pooling of what the box leaves visible.
//
// A sample belongs to `parts` blocks, one where a batch fills the device by itself. On sm_90 and
// later they are a cluster: each sums the energy of its own channels, all read each other's sums
// from shared memory and add them in order of rank, so that the map is read once. Everything up to
// the box is then computed by every part alike, which is cheaper than to wait for one. Earlier
// devices have no clusters; there each part sums the whole map, which it finds in the L2 cache.
// Each part paints its share of the image and, in the one-pass mode, pools its own channels, from
// shared memory where they fit.
//
// Logits and loss follow: a matrix product, one block for each row's cross-entropy, one for the mean.
#include <numeric>

#include "cuda/activation.h"
#include "cuda/common.h"
#include "cuda/painter.h"
#include "masked_forward.h"
#include "matrix.h"

namespace sanm {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLeast = 8192;              // elements of a sample that are worth a block
constexpr int64_t kHeldBytes = 100 * 1024;    // shared memory of a block that still leaves room for two
constexpr int64_t kReduceBytes = kWarp * 16;  // of any type that is reduced

struct FillValues {
  double value[kFillValues];
  int count;
};

// One call; of what was not asked for the pointers are null.
struct Problem {
  int64_t B;
  int C, n, h, w, K, parts, each, value_count;  // each: channels of a part
  bool channels_last, vectors, image_vectors;   // vectors: 16-byte accesses are aligned
  Canvas canvas;
  unsigned image_each;  // elements of a part
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
  void *pooled, *visible;     // (B, C), (B, h, w)
};

// Where things lie in a block's scratch memory, in bytes.
struct Layout {
  int64_t slice, e, map, partial, left, t, begin, rows, reduce, position, box, fill, held, total;

  // acc: bytes of a number that sums are taken in; held_bytes: of the features kept, or 0.
  Layout(const Problem& p, int64_t acc, int64_t held_bytes) {
    int64_t end = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t start = end;
      end += (bytes + 15) / 16 * 16;
      return start;
    };
    slice = take(p.n * acc);
    e = take(p.n * acc);
    map = take(p.n * sizeof(float));
    partial = take(kThreads * 8 * sizeof(float));
    left = take(p.canvas.W * sizeof(int));
    t = take(p.canvas.W * sizeof(float));
    begin = take((p.h + 1) * sizeof(int));
    rows = take(4 * p.h * sizeof(float));
    reduce = take(kReduceBytes);
    position = take(4 * sizeof(int));
    box = take(8 * sizeof(int));
    fill = take(2 * p.canvas.channels * sizeof(double));
    held = take(held_bytes);
    total = end;
  }
};

// E of the sample's channels `own` → e (n).
template <typename F>
SANM_DEVICE void energy(const Problem& p, const F* f, const Slice& own, F* held,
                        acc_t<F>* partial, acc_t<F>* e) {
  if (p.channels_last) {
    if (p.vectors) energy_channels_last<kVector<F>>(f + own.first, p.C, own.count, p.n, held, e);
    else energy_channels_last<1>(f + own.first, p.C, own.count, p.n, held, e);
  } else {
    const F* first = f + static_cast<int64_t>(own.first) * p.n;
    if (p.vectors) energy_contiguous<kVector<F>>(first, own.count, p.n, held, partial, e);
    else energy_contiguous<1>(first, own.count, p.n, held, partial, e);
  }
}

// Ratios and boxes of sample b, by one thread → box (V, 4), ratio (S); the first part writes them.
SANM_DEVICE void place(const Problem& p, const Draws& draw, const int* position, int64_t b,
                       bool write, int* box, float* ratio) {
  const Settings& s = p.settings;
  const int H = p.canvas.H, W = p.canvas.W;
  for (int v = 0; v < s.view_count(); ++v) {
    const int set = s.shared ? 0 : v;
    const float r = mask_ratio(s, draw(2 * set), p.clean_prob[b]);
    const Size size = box_size(s, r, draw(2 * set + 1), H, W);
    const bool peak = s.views == 3 ? v == 0 : s.views == 1;
    const int* at = position + (peak ? 0 : 2);
    int* corners = box + 4 * v;
    corners[0] = corner(at[0], size.height, H, s.centered);
    corners[1] = corner(at[1], size.width, W, s.centered);
    corners[2] = corners[0] + size.height;
    corners[3] = corners[1] + size.width;
    ratio[set] = r;
    if (!write) continue;
    if (v == set) p.ratio[v * p.B + b] = r;
    for (int k = 0; k < 4; ++k) p.boxes[4 * (v * p.B + b) + k] = corners[k];
  }
}

// v / Σv (h, w) → share: v is the part of a cell that the box leaves visible; zeros where none is.
template <typename A>
SANM_DEVICE void visibility(const Problem& p, const int* box, A* share, A* scratch) {
  A total = 0;
  for (int k = threadIdx.x; k < p.n; k += blockDim.x) {
    const A rows = overlap<A>(box[0], box[2], k / p.w, p.h, p.canvas.H);
    const A v = A{1} - rows * overlap<A>(box[1], box[3], k % p.w, p.w, p.canvas.W);
    share[k] = v > 0 ? v : A{0};
    total += share[k];
  }
  total = block_sum(total, scratch);
  for (int k = threadIdx.x; k < p.n; k += blockDim.x) share[k] = total > 0 ? share[k] / total : 0;
  __syncthreads();
}

// z_c = Σ v·F of the channels `own`. source: element (c, k) of the slice lies at c·c_step + k·k_step.
template <typename F>
SANM_DEVICE void pool(const F* source, int64_t c_step, int64_t k_step, const Slice& own, int n,
                      const acc_t<F>* share, acc_t<F>* pooled) {
  if (k_step == 1) {  // cells lie together: a warp takes a channel
    for (int c = warp(); c < own.count; c += warps()) {
      acc_t<F> sum = 0;
      for (int k = lane(); k < n; k += kWarp) sum += share[k] * widen(source[c * c_step + k]);
      sum = warp_reduce(sum, Sum());
      if (lane() == 0) pooled[own.first + c] = sum;
    }
    return;
  }
  for (int c = threadIdx.x; c < own.count; c += blockDim.x) {
    acc_t<F> sum = 0;
    for (int k = 0; k < n; ++k) sum += share[k] * widen(source[c * c_step + k * k_step]);
    pooled[own.first + c] = sum;
  }
}

// Calls body(F{}) with F the features' type, one of those that are summed in A.
template <typename A, typename Body>
SANM_DEVICE void dispatch_features(ScalarType type, const Body& body) {
  if constexpr (std::is_same_v<A, double>) body(double{});
  else if (type == ScalarType::Float) body(float{});
  else if (type == ScalarType::Half) body(Half{});
  else body(BFloat16{});
}

// Block b·parts + part. `workspace`: layout.total bytes a block where shared memory is too small.
// Only the energy and the pooling depend on the type of the features: each asks for it once.
template <typename A>
__global__ void __launch_bounds__(kThreads) masked_forward_kernel(
    const __grid_constant__ Problem p, const __grid_constant__ Layout layout,
    const __grid_constant__ FillValues values, unsigned char* workspace) {
  const int part = blockIdx.x % p.parts;
  const int64_t b = blockIdx.x / p.parts;
  unsigned char* base = workspace ? workspace + blockIdx.x * layout.total
                                  : shared_memory<unsigned char>();
  const auto at = [&](int64_t offset) { return static_cast<void*>(base + offset); };
  A *slice = static_cast<A*>(at(layout.slice)), *e = static_cast<A*>(at(layout.e));
  float* map = static_cast<float*>(at(layout.map));
  int *position = static_cast<int*>(at(layout.position)), *box = static_cast<int*>(at(layout.box));
  float* rows = static_cast<float*>(at(layout.rows));
  void* reduce = at(layout.reduce);
  const bool holds = layout.total > layout.held;
  void* const held_at = holds ? at(layout.held) : nullptr;

  const int first = part * p.each < p.C ? part * p.each : p.C;
  const Slice own{first, p.each < p.C - first ? p.each : p.C - first};
  const bool shared_out = cluster_size() > 1;
  dispatch_features<A>(p.feature_type, [&](auto zero) {
    using F = decltype(zero);
    energy(p, static_cast<const F*>(p.features) + b * p.C * p.n,
           shared_out ? own : Slice{0, p.C}, static_cast<F*>(held_at),
           static_cast<A*>(at(layout.partial)), slice);
  });
  if (shared_out) cluster_sync();
  for (int k = threadIdx.x; k < p.n; k += blockDim.x) {
    A cell = slice[k];
    if (shared_out) {
      cell = 0;
      for (int r = 0; r < p.parts; ++r) cell += cluster_map(slice, r)[k];
    }
    e[k] = cell;
    map[k] = static_cast<float>(cell);
  }
  if (shared_out) cluster_sync();  // no block ends while another reads its sums
  else __syncthreads();

  const Statistics<A> stats(e, p.n, static_cast<A*>(reduce));
  Locator locator{map, static_cast<int*>(at(layout.left)), static_cast<float*>(at(layout.t)),
                  static_cast<int*>(at(layout.begin)), rows, rows + 2 * p.h, p.h, p.w, p.canvas.H,
                  p.canvas.W, p.settings.quantize};
  locator.find(position, static_cast<float*>(reduce));
  if (part == 0) {
    if (threadIdx.x == 0)
#pragma unroll
      for (int k = 0; k < 5; ++k) static_cast<A*>(p.stats)[k * p.B + b] = stats.value[k];
    if (threadIdx.x < 4)
      p.positions[2 * (threadIdx.x / 2 * p.B + b) + threadIdx.x % 2] = position[threadIdx.x];
  }
  if (p.targets == nullptr) return;  // activation_stats

  const Draws draws{p.draws ? p.draws + b * p.draw_count : nullptr, p.index ? p.index[b] : b,
                    p.seed ? *p.seed : 0};
  float* ratio = rows;  // the rows' extremes are no longer needed
  if (threadIdx.x == 0) place(p, draws, position, b, part == 0, box, ratio);
  __syncthreads();

  if (part == 0)
    device_dispatch(p.target_type, [&](auto zero) {
      using Y = decltype(zero);
      for (int s = 0; s < p.settings.draw_sets(); ++s)
        modulate(p.soft ? static_cast<const Y*>(p.targets) + b * p.t_b : nullptr, p.t_k,
                 p.soft ? 0 : static_cast<const int64_t*>(p.targets)[b * p.t_b], p.K, ratio[s],
                 p.settings.clamp, static_cast<Peak<acc_t<Y>>*>(reduce),
                 static_cast<Y*>(p.new_targets) + (s * p.B + b) * p.K);
    });

  if (p.pooled) {
    visibility(p, box, e, static_cast<A*>(reduce));
    if (part == 0)
      for (int k = threadIdx.x; k < p.n; k += blockDim.x)
        static_cast<A*>(p.visible)[b * p.n + k] = e[k];
    A* pooled = static_cast<A*>(p.pooled) + b * p.C;
    const int64_t start = p.channels_last ? own.first : static_cast<int64_t>(own.first) * p.n;
    const int64_t k_step = !p.channels_last ? 1 : holds ? own.count : p.C;
    dispatch_features<A>(p.feature_type, [&](auto zero) {
      using F = decltype(zero);
      const F* f = static_cast<const F*>(p.features) + b * p.C * p.n;
      pool(holds ? static_cast<const F*>(held_at) : f + start, p.channels_last ? 1 : p.n, k_step,
           own, p.n, e, pooled);
    });
  }

  if (!p.images) return;
  const unsigned size = p.canvas.size(), start = part * p.image_each;
  const unsigned end = start + p.image_each < size ? start + p.image_each : size;
  void* fill = at(layout.fill);
  device_dispatch(p.image_type, [&](auto zero) {
    using T = decltype(zero);
    prepare_fills(p.settings, values.value, values.count, p.canvas,
                  static_cast<const T*>(p.images) + b * size, draws, static_cast<double*>(reduce),
                  static_cast<T*>(fill));
  });
  device_dispatch_stored(p.image_type, [&](auto zero) {
    using S = decltype(zero);
    const S* image = static_cast<const S*>(p.images) + b * size;
    S* views = static_cast<S*>(p.views) + b * size;
    if (p.image_vectors)
      paint<kVector<S>>(p.image_type, p.settings, p.canvas, image, views, p.B * size, box,
                        static_cast<const S*>(fill), draws, start, end);
    else
      paint<1>(p.image_type, p.settings, p.canvas, image, views, p.B * size, box,
               static_cast<const S*>(fill), draws, start, end);
  });
}

// Block b: logits of row b plus bias, and their cross-entropy −Σ_k t_k log softmax(z)_k.
template <typename A>
__global__ void __launch_bounds__(kThreads, 4) cross_entropy_kernel(
    A* logits,            // (B, K), read and written
    const A* bias,        // (K,) or null
    const void* targets,  // (B, K) of type `type`
    ScalarType type, int64_t K,
    A* rows) {  // (B,), written
  A* scratch = shared_memory<A>();
  A* z = logits + blockIdx.x * K;
  A top = static_cast<A>(-INFINITY), sum = 0, loss = 0;
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
    if (bias) z[k] += bias[k];
    top = z[k] > top ? z[k] : top;
  }
  top = block_max(top, scratch);
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x) sum += exp(z[k] - top);
  const A log_sum = log(block_sum(sum, scratch));
  device_dispatch(type, [&](auto zero) {
    const auto* t = static_cast<const decltype(zero)*>(targets) + blockIdx.x * K;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
      loss += static_cast<A>(widen(t[k])) * (log_sum - (z[k] - top));
  });
  loss = block_sum(loss, scratch);
  if (threadIdx.x == 0) rows[blockIdx.x] = loss;
}

// One block: the mean of rows (B,), 0 of none → loss ().
template <typename A>
__global__ void __launch_bounds__(kThreads) mean_kernel(const A* rows, int64_t B, A* loss) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < B; b += blockDim.x) sum += rows[b];
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) *loss = static_cast<A>(sum / (B > 0 ? B : 1));
}

int least_multiple(int64_t n, int64_t of) { return static_cast<int>(ceil_div(n, of) * of); }

int cluster_limit_of(const Tensor& features) {
  return acc_type(features) == ScalarType::Double
             ? cluster_limit(features, masked_forward_kernel<double>)
             : cluster_limit(features, masked_forward_kernel<float>);
}

// Sizes and the features' layout of a call, and over how many blocks a sample is spread.
Problem prepare(const Image& features, int64_t H, int64_t W, int64_t image_channels) {
  const Tensor& x = features.tensor;
  const int clusters = cluster_limit_of(x);
  Problem p{};
  p.B = x.size(0);
  p.C = static_cast<int>(x.size(1));
  p.h = static_cast<int>(x.size(2));
  p.w = static_cast<int>(x.size(3));
  p.n = p.h * p.w;
  p.canvas = {static_cast<int>(image_channels), static_cast<int>(H), static_cast<int>(W), false};
  if (std::max(x.size(1) * p.n, image_channels * H * W) >= int64_t{1} << 31)
    value_error("features and images: a sample of less than 2^31 elements was expected, got ",
                x.size(1), "×", p.h, "×", p.w, " and ", image_channels, "×", H, "×", W);
  p.channels_last = features.channels_last;
  p.features = x.const_data_ptr();
  p.feature_type = x.scalar_type();
  const int64_t bytes = x.element_size(), V = 16 / bytes;
  const int64_t period = features.channels_last ? 1 : V / std::gcd<int64_t>(p.n, V) * p.n;
  p.vectors = aligned16(p.features, (features.channels_last ? p.C : int64_t{p.C} * p.n) * bytes) &&
              (p.n % V == 0 || period <= kThreads * V);
  const int64_t work = std::max<int64_t>(int64_t{p.C} * p.n, p.canvas.size());
  const int64_t wanted = 2 * multiprocessors(x);
  p.parts = 1;
  while (p.parts < 8 && p.B * p.parts < wanted && work / (2 * p.parts) >= kLeast) p.parts *= 2;
  if (clusters == 1 && image_channels == 0) p.parts = 1;  // nothing to share out
  p.each = least_multiple(ceil_div(p.C, p.parts), V);
  p.image_each = least_multiple(ceil_div(p.canvas.size(), p.parts), 64);
  return p;
}

void launch_samples(const Tensor& features, const Problem& p, const FillValues& values) {
  const auto go = [&](auto zero) {
    using A = decltype(zero);
    int64_t cluster = std::min<int64_t>(p.parts, cluster_limit_of(features));
    Layout layout(p, sizeof(A), 0);
    Tensor workspace = new_tensor(features, {0}, ScalarType::Byte);
    unsigned char* memory = nullptr;
    if (layout.total > shared_limit(features)) {
      cluster = 1;
      workspace = new_tensor(features, {p.B * p.parts * layout.total}, ScalarType::Byte);
      memory = out<unsigned char>(workspace);
    } else if (p.pooled && cluster == p.parts) {
      const Layout more(p, sizeof(A), int64_t{p.each} * p.n * features.element_size());
      if (more.total <= std::min(shared_limit(features), kHeldBytes)) layout = more;
    }
    launch({"masked_forward", features, {p.B * p.parts}, kThreads, memory ? 0 : layout.total,
            cluster},
           masked_forward_kernel<A>, p, layout, values, memory);
  };
  acc_type(features) == ScalarType::Double ? go(double{}) : go(float{});
}

// logits (B, K) = pooled (B, C)·Wᵀ + bias, and the mean cross-entropy against targets (B, K).
void classify(const Inputs& in, const Outputs& o) {
  const ScalarType type = o.pooled.scalar_type();
  const Tensor weight = torch::stable::to(*in.weight, type);
  multiply(o.pooled, torch::stable::transpose(weight, 0, 1), o.logits);
  const OptTensor bias = in.bias ? packed(OptTensor(torch::stable::to(*in.bias, type))) : in.bias;
  const int64_t B = o.logits.size(0), K = o.logits.size(1);
  const Tensor rows = new_tensor(o.logits, {B}, type);
  dispatch(type, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    launch({"masked_forward: cross-entropy", o.logits, {B}, kThreads, kReduceBytes},
           cross_entropy_kernel<A>, out<A>(o.logits), in_or_null<A>(bias),
           o.targets.const_data_ptr(), o.targets.scalar_type(), K, out<A>(rows));
    launch({"masked_forward: loss", o.logits, {1}, kThreads, kReduceBytes}, mean_kernel<A>,
           sanm::in<A>(rows), B, out<A>(o.loss));
  });
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
  if (in.weight) {
    p.pooled = o.pooled.mutable_data_ptr();
    p.visible = o.visible.mutable_data_ptr();
  }
  launch_samples(features.tensor, p, values);
  if (in.weight) classify(in, o);
}

MaskedForward masked_forward(SANM_PARAMETERS) {
  const Inputs in = SANM_INPUTS;
  const Outputs o = allocate(in, [&](const auto& size, ScalarType type, bool channels_last) {
    return new_tensor(in.features, size, type, channels_last);
  });
  run(in, o);
  return as_tuple(o);
}

void masked_forward_out(SANM_PARAMETERS, Tensor stats, Tensor positions, Tensor ratio, Tensor boxes,
                        Tensor targets_out, Tensor views_out, Tensor logits, Tensor loss,
                        Tensor pooled, Tensor visible) {
  run(SANM_INPUTS, Outputs{stats, positions, ratio, boxes, targets_out, views_out, logits, loss,
                           pooled, visible});
}

// features (B, C, h, w) → statistics (5, B), peak and trough (2, B, 2) int32
std::tuple<Tensor, Tensor> activation_stats(const Tensor& features_, int64_t H, int64_t W,
                                            bool quantize) {
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
