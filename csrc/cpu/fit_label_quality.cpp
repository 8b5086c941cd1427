// The two-component Gaussian mixture over losses: what scikit-learn's GaussianMixture computes.
//
// The data is scaled to [0, 1]: y = (x − offset) / scale, and the added variance becomes
// reg / scale². An affine map changes the log-likelihood by a constant, so no decision of the
// algorithm depends on it. Two modes share the code:
//
//   fast   y in float32. The k-means start runs on the samples (a histogram would move its border
//          by up to half a bin of samples, and the posterior by 5e-4). EM runs on a histogram of
//          4096 bins, each represented by the mean of its samples: what is lost is the variance
//          within a bin of width h, h²/12 for evenly spread samples, which is 1/49000 of the
//          smallest variance it is used for, and never more than h²/4.
//          If losses tie, the start is that of `exact`: rounding could move many of them across
//          the border.
//   exact  y in float64, EM on the samples: for few samples, where it costs little, and where
//          reg is so small that a component could be as narrow as a few bins.
//
// Work is split into fixed blocks whose partial sums are added in order, and the histogram holds
// integers: the result does not depend on the number of threads.
#include <mutex>
#include <string>

#include "cpu/mixture.h"

namespace sanm {
namespace {

constexpr int64_t kBlock = 2048;
constexpr int64_t kBins = 4096;
constexpr int64_t kFewSamples = 8192;
constexpr double kMinBinsPerDeviation = 64;  // fast mode: √reg spans at least this many bins
constexpr int kLloydIterations = 300;        // these two are scikit-learn's
constexpr double kLloydTolerance = 1e-4;

// pass(x + begin, count) for every block of x (n,); `begin` is a multiple of kBlock.
template <typename T, typename Pass>
auto over_blocks(const T* x, int64_t n, const Pass& pass) {
  std::vector<decltype(pass(x, n))> partial((n + kBlock - 1) / kBlock);
  torch::stable::parallel_for(0, partial.size(), grain(kBlock), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      partial[b] = pass(x + b * kBlock, std::min(kBlock, n - b * kBlock));
  });
  return partial;
}

template <typename Partial>
Partial sum(const std::vector<Partial>& parts) {
  Partial total{};
  for (const Partial& p : parts) total += p;
  return total;
}

template <typename T, typename Pass>
auto sum_blocks(const T* x, int64_t n, const Pass& pass) {
  return sum(over_blocks(x, n, pass));
}

// --- the k-means start ---------------------------------------------------------------------------

struct Start {
  Two centre;  // in the order drawn
  double mean, variance;
};

// k-means++: the first centre is y[⌊u0·n⌋]; two candidates for the second are drawn with
// probability proportional to the squared distance d² from it, by searching the cumulative sum of
// d² for u1 and u2 times its total; the one that leaves the smaller Σ min(d², distance²) wins.
template <typename A>
Start seed(const A* y, int64_t n, const std::vector<double>& u) {
  const double c0 = y[std::min<int64_t>(static_cast<int64_t>(u[0] * n), n - 1)];
  const auto blocks =
      over_blocks(y, n, [=](const A* x, int64_t m) { return deviations_pass(x, m, c0); });
  const Sums<2> total = sum(blocks);
  const auto draw = [&](double uniform) -> A {
    const double target = uniform * total[1];
    double cumulative = 0;
    size_t b = 0;
    while (b + 1 < blocks.size() && cumulative + blocks[b][1] < target)
      cumulative += blocks[b++][1];
    int64_t i = b * kBlock;
    for (; i < n - 1; ++i) {
      const double d = y[i] - c0;
      cumulative += d * d;
      if (cumulative >= target) break;
    }
    return y[i];
  };
  const A c = static_cast<A>(c0), c1 = draw(u[1]), c2 = draw(u[2]);
  const Sums<2> potential = sum_blocks(
      y, n, [=](const A* x, int64_t m) { return potentials_pass(x, m, c, c1, c2); });
  const double shift = total[0] / n;
  return {{c0, potential[1] < potential[0] ? c2 : c1}, c0 + shift, total[1] / n - shift * shift};
}

// The border t between two centres: y < t exactly for the samples of the lower one, those whose
// squared distance to it, rounded as in the reference, is smaller, or equal if it was drawn first.
// Exact, since many equal losses can lie in the middle.
template <typename A>
A border(const Two& centre, bool low_first) {
  if (!(centre[0] < centre[1])) return A(-1);  // one centre was drawn twice: no sample is below
  const auto lower = [&](A y) {
    const double a = (y - centre[0]) * (y - centre[0]), b = (y - centre[1]) * (y - centre[1]);
    return low_first ? a <= b : a < b;
  };
  constexpr int kMost = 1000;  // a few steps suffice, unless squares underflow
  A t = static_cast<A>(0.5 * (centre[0] + centre[1]));
  for (int k = 0; k < kMost && lower(t); ++k) t = std::nextafter(t, A(2));
  for (int k = 0; k < kMost; ++k) {
    const A before = std::nextafter(t, A(-1));
    if (lower(before)) break;
    t = before;
  }
  return t;
}

// Lloyd's iterations: each centre moves to its samples' mean, until the summed squared shift is at
// most 1e-4 of the data's variance. Returns the M-step on the final split, or an improper mixture
// if all samples are nearest to one centre.
template <typename A>
Mixture lloyd(const A* y, int64_t n, const Start& start, double reg) {
  const bool low_first = start.centre[0] < start.centre[1];
  Two c = start.centre;
  if (!low_first) std::swap(c[0], c[1]);
  for (int k = 0; k < kLloydIterations; ++k) {
    const A t = border<A>(c, low_first);
    const Sums<3> split =
        sum_blocks(y, n, [=](const A* x, int64_t m) { return split_pass(x, m, t); });
    if (split[0] == 0 || split[0] == n) return {};
    const Two next = {t + split[1] / split[0], t + split[2] / (n - split[0])};
    const double d0 = next[0] - c[0], d1 = next[1] - c[1];
    c = next;
    if (d0 * d0 + d1 * d1 <= kLloydTolerance * start.variance) break;
  }
  const A t = border<A>(c, low_first), c0 = static_cast<A>(c[0]), c1 = static_cast<A>(c[1]);
  const Moments m = sum_blocks(
      y, n, [=](const A* x, int64_t m) { return split_moments_pass(x, m, t, c0, c1); });
  return update(m, {c0, c1}, reg);
}

// --- expectation and maximisation ----------------------------------------------------------------

// y (n,) in [0, 1] → the bins that are not empty: the mean and the number of their samples. Each
// sample adds one 64-bit integer to its bin: a one in the upper 24 bits, and in the lower 40 its
// position within the bin, in 2⁻¹⁶ of its width. Flushed before either part overflows.
std::pair<std::vector<float>, std::vector<float>> histogram(const float* y, int64_t n) {
  constexpr int64_t kHolds = int64_t{1} << 23;
  constexpr int32_t kPlaces = kBins << 16;
  struct Bin { int64_t mass = 0, place = 0; };
  std::vector<Bin> bins(kBins);
  std::mutex mutex;
  torch::stable::parallel_for(0, n, grain(1), [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kHolds) {
      const int64_t end = std::min(last, begin + kHolds);
      std::vector<uint64_t> packed(kBins);
      int32_t place[kBlock];  // in a loop of its own, which is vectorised
      for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t count = std::min(kBlock, end - start);
        const float* x = y + start;
        for (int64_t i = 0; i < count; ++i)
          place[i] = std::clamp(static_cast<int32_t>(x[i] * kPlaces), 0, kPlaces - 1);
        for (int64_t i = 0; i < count; ++i)
          packed[place[i] >> 16] += (uint64_t{1} << 40) + (place[i] & 0xffff);
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t b = 0; b < kBins; ++b) {
        bins[b].mass += packed[b] >> 40;
        bins[b].place += packed[b] & ((uint64_t{1} << 40) - 1);
      }
    }
  });
  std::vector<float> mean, mass;
  mean.reserve(kBins), mass.reserve(kBins);
  for (int64_t b = 0; b < kBins; ++b) {
    if (bins[b].mass == 0) continue;
    const double place = static_cast<double>(bins[b].place) / bins[b].mass;
    mean.push_back(static_cast<float>((b + place / 65536) / kBins));
    mass.push_back(static_cast<float>(bins[b].mass));
  }
  return {std::move(mean), std::move(mass)};
}

struct Fit {
  Mixture mixture;
  int64_t n_iter = 0;
  bool converged = false;
};

// EM from `first` on
template <typename A>
Fit fit(const A* y, int64_t n, const Mixture& first, int64_t max_iter, double tol, double reg) {
  Fit f;
  f.mixture = first;
  std::vector<float> place, mass;
  if constexpr (std::is_same_v<A, float>) std::tie(place, mass) = histogram(y, n);
  double bound = -kInfinity;
  while (f.mixture.proper() && f.n_iter < max_iter && !f.converged) {
    const LogDensity<A> low(f.mixture, 0), high(f.mixture, 1);
    Moments m;
    if constexpr (std::is_same_v<A, float>) {
      const float *x = place.data(), *w = mass.data();
      m = sum_blocks(x, place.size(), [=](const A* part, int64_t count) {
        return expectation_pass<true>(part, w + (part - x), count, low, high);
      });
    } else {
      m = sum_blocks(y, n, [=](const A* part, int64_t count) {
        return expectation_pass<false>(part, part, count, low, high);
      });
    }
    f.mixture = update(m, {low.mean, high.mean}, reg);
    f.converged = std::abs(m.log_sum / n - bound) < tol;
    bound = m.log_sum / n;
    ++f.n_iter;
  }
  return f;
}

// --- scaling -------------------------------------------------------------------------------------

// x (n,): its range; ValueError naming the first index that is not finite
template <typename T>
Range checked_range(const T* x, int64_t n, const char* name, const std::string& row) {
  const Range r = sum_blocks(x, n, range_pass<T>);
  if (r.finite) return r;
  int64_t i = 0;
  while (i < n - 1 && std::isfinite(static_cast<acc_t<T>>(x[i]))) ++i;
  const acc_t<T> v = static_cast<acc_t<T>>(x[i]);
  const char* what = std::isnan(v) ? "nan" : v > 0 ? "inf" : "-inf";
  value_error(name, ": expected finite values, got ", what, " at index [", row, i, "]");
}

// One epoch's losses x (n,), used as (x − offset) / span: as 0 if the span is infinite.
template <typename T>
struct Epoch {
  const T* x;
  double offset, span;
};

// y (n,) = the mean over the epochs
template <typename T, typename A>
void average(const std::vector<Epoch<T>>& epochs, int64_t n, A* y) {
  const double share = 1.0 / epochs.size();
  torch::stable::parallel_for(0, n, grain(1), [&](int64_t first, int64_t last) {
    double total[kBlock];
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int64_t count = std::min(kBlock, last - begin);
      std::fill_n(total, count, 0.0);
      for (const Epoch<T>& e : epochs) {
        const T* x = e.x + begin;
        const double offset = e.offset, span = e.span, inverse = 1 / span;
        for (int64_t i = 0; i < count; ++i)
          // exact: rounded as in the reference, so that losses that tie there tie here
          total[i] += std::is_same_v<A, double> ? (static_cast<double>(x[i]) - offset) / span
                                                : (static_cast<double>(x[i]) - offset) * inverse;
      }
      for (int64_t i = 0; i < count; ++i)
        y[begin + i] = static_cast<A>(std::is_same_v<A, double> ? total[i] / epochs.size()
                                                                : total[i] * share);
    }
  });
}

struct Frame { double offset, scale; };  // scale 0: there is nothing to fit

// The span to divide by; infinite if all losses are equal (or their range overflows double).
double divisor(double span) { return span > 1e-300 ? span : kInfinity; }

// The epochs' losses (n,) and their ranges → y (n,) in [0, 1], and its offset and scale
template <typename T, typename A>
Frame enter_frame(const std::vector<const T*>& x, const std::vector<Range>& ranges, int64_t n,
                  bool normalize, A* y) {
  if (n == 0) return {0, 0};
  const bool single = x.size() == 1;  // then its own range is the frame
  std::vector<Epoch<T>> epochs;
  double offset = 0;
  for (size_t e = 0; e < x.size(); ++e) {
    const Range& r = ranges[e];
    epochs.push_back({x[e], r.low, single || normalize ? divisor(r.high - r.low) : 1});
    if (!normalize) offset += r.low / x.size();
  }
  average(epochs, n, y);
  if (single) {
    const double width = epochs[0].span < kInfinity ? epochs[0].span : 0;
    return {offset, normalize && width > 0 ? 1 : width};
  }
  const Range r = sum_blocks(y, n, range_pass<A>);
  const double span = r.finite ? divisor(r.high - r.low) : kInfinity;
  if (span == kInfinity) return {offset + r.low, 0};
  if (std::is_same_v<A, double> && normalize) return {0, 1};  // as the reference leaves it
  average<A, A>({{y, r.low, span}}, n, y);
  return {offset + r.low, span};
}

// Whether any two of 1024 evenly spaced samples of y (n,) are equal, ignoring 0 and 1.
bool ties(const float* y, int64_t n) {
  constexpr int64_t kSamples = 1024;
  constexpr uint32_t kSlots = 4096;
  std::vector<float> seen(kSlots);
  for (int64_t i = 0; i < kSamples; ++i) {
    const float v = y[i * n / kSamples];
    if (!(v > 0 && v < 1)) continue;
    uint32_t slot;
    std::memcpy(&slot, &v, sizeof v);
    for (slot = slot * 2654435769u / (UINT32_MAX / kSlots + 1);; slot = (slot + 1) % kSlots) {
      if (seen[slot] == v) return true;
      if (seen[slot] == 0) break;
    }
    seen[slot] = v;
  }
  return false;
}

// --- the operator --------------------------------------------------------------------------------

struct Options {
  const std::vector<double>& uniforms;
  int64_t max_iter;
  double tol, reg_covar;
  bool normalize;
};

struct Outputs { Tensor clean, means, variances, weights, n_iter, converged, degenerate; };

template <typename A, typename T>
void run(const std::vector<const T*>& x, const std::vector<Range>& ranges, int64_t n,
         const Options& o, const Outputs& result) {
  using O = acc_t<T>;
  O* clean = out<O>(result.clean);
  std::vector<A> own;  // unless y has the output's type, and is stored there
  A* y;
  if constexpr (std::is_same_v<A, O>) {
    y = clean;
  } else {
    own.resize(n);
    y = own.data();
  }
  Frame frame = enter_frame(x, ranges, n, o.normalize, y);
  Start start{};
  Mixture first;
  const auto begin = [&](const auto* samples) {
    start = seed(samples, n, o.uniforms);
    first = lloyd(samples, n, start, o.reg_covar / frame.scale / frame.scale);
  };
  if (frame.scale > 0) {
    bool exactly = false;
    if constexpr (std::is_same_v<A, float>) exactly = ties(y, n);
    if (exactly) {
      std::vector<double> exact(n);
      frame = enter_frame(x, ranges, n, o.normalize, exact.data());
      begin(exact.data());
      std::copy(exact.begin(), exact.end(), y);
    } else {
      begin(y);
    }
  }
  const double reg = o.reg_covar / frame.scale / frame.scale;
  const Fit f = frame.scale > 0 ? fit(y, n, first, o.max_iter, o.tol, reg) : Fit{};
  Mixture p = f.mixture;
  if (p.mean[0] > p.mean[1])
    for (Two* two : {&p.mean, &p.variance, &p.weight}) std::swap((*two)[0], (*two)[1]);
  const bool sound = p.sound(n);
  if (sound) {
    const LogDensity<A> low(p, 0), high(p, 1);
    torch::stable::parallel_for(0, n, grain(1), [&](int64_t begin, int64_t end) {
      posterior_pass(y + begin, end - begin, low, high, clean + begin);
    });
  } else {  // degenerate: one Gaussian, and all labels count as clean
    std::fill_n(clean, n, O(1));
    p = {{start.mean, start.mean}, {start.variance, start.variance}, {1, 0}};
  }
  const double unit = frame.scale * frame.scale, added = sound ? 0 : o.reg_covar;
  for (int k = 0; k < 2; ++k) {
    out<double>(result.means)[k] = frame.offset + frame.scale * p.mean[k];
    out<double>(result.variances)[k] =
        std::min(unit * p.variance[k] + added, std::numeric_limits<double>::max());
    out<double>(result.weights)[k] = p.weight[k];
  }
  *out<int64_t>(result.n_iter) = sound ? f.n_iter : 0;
  *out<bool>(result.converged) = sound && f.converged;
  *out<bool>(result.degenerate) = !sound;
}

// losses (N,), history (E, N), uniforms (3,) → clean probability (N,), means, variances,
// weights (2,), n_iter, converged, degenerate ()
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fit_label_quality(
    const Tensor& losses_, const std::optional<Tensor>& history_, std::vector<double> uniforms,
    int64_t max_iter, double tol, double reg_covar, bool normalize) {
  check_fit_label_quality(losses_, history_, uniforms);
  const Tensor losses = packed(losses_);
  const int64_t n = losses.size(0);
  std::optional<Tensor> history;
  if (history_) history = packed(*history_);
  const Outputs result{new_tensor({n}, acc_type(losses)),   new_tensor({2}, ScalarType::Double),
                       new_tensor({2}, ScalarType::Double), new_tensor({2}, ScalarType::Double),
                       new_tensor({}, ScalarType::Long),    new_tensor({}, ScalarType::Bool),
                       new_tensor({}, ScalarType::Bool)};
  dispatch(losses.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<const T*> x;
    std::vector<Range> ranges;
    double widest = normalize ? 1 : 0;  // bounds the scale: the range of a mean ≤ the mean range
    const auto add = [&](const T* epoch, const char* name, const std::string& row) {
      x.push_back(epoch);
      ranges.push_back(n > 0 ? checked_range(epoch, n, name, row) : Range{0, 0});
      if (!normalize) widest = std::max(widest, ranges.back().high - ranges.back().low);
    };
    for (int64_t e = 0; history && e < history->size(0); ++e)
      add(in<T>(*history) + e * n, "history[-4:]", std::to_string(e) + ", ");
    add(in<T>(losses), "losses", "");
    const Options options{uniforms, max_iter, tol, reg_covar, normalize};
    if (n >= kFewSamples && std::sqrt(reg_covar) * kBins >= kMinBinsPerDeviation * widest)
      run<float>(x, ranges, n, options, result);
    else
      run<double>(x, ranges, n, options, result);
  });
  return {result.clean,  result.means,     result.variances, result.weights,
          result.n_iter, result.converged, result.degenerate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("fit_label_quality.cpu", TORCH_BOX(&fit_label_quality));
}

}  // namespace sanm
