// The XLA custom calls: they check what they are given, cut K into pieces and share the work among XLA's own threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "make_plan.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;

namespace w4a16 {
namespace {

constexpr int64_t kForwardRows = 64, kBackwardRows = 32;  // from which on the matrix unit is faster
constexpr int64_t kPairRows = 16;       // and products of pairs, both ways
constexpr int64_t kTurnedRows = 128;  // of dy in a task

// What multiplies many rows where `name` is "best" or "amx"; null where this CPU or its system has no matrix unit.
const MatrixKernels* find_matrix_kernels(std::string_view name) {
#if defined(__x86_64__) && defined(__linux__)
  static const bool permitted = [] {
    unsigned a, b, c, d, bf16;
    if (!__get_cpuid_count(7, 1, &bf16, &b, &c, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if (!(bf16 & kAvx512Bf16) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, arch/x86/include/asm/fpu/types.h
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;  // for all threads of the process
  }();
  if (permitted && (name == "best" || name == "amx")) return kAmx;
#endif
  return nullptr;
}

// The instruction set called `name`, or the best of this CPU for "best"; null where this CPU lacks it.
const Kernels* find_kernels(std::string_view name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (avx512 && (name == "best" || name == "avx512" || (name == "amx" && find_matrix_kernels(name)))) return &kAvx512;
  if (avx2 && (name == "best" || name == "avx2")) return &kAvx2;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  if ((getauxval(AT_HWCAP) & kDotProduct) && (name == "best" || name == "neon")) return &kNeon;
#elif defined(__aarch64__) && defined(__APPLE__)
  if (name == "best" || name == "neon") return &kNeon;
#endif
  return nullptr;
}

// Calls task(i) for every i in [0, count), on XLA's threads and on this one. This one takes tasks like the others and
// then waits only for tasks that a thread has begun: a pool that is busy, or is waiting for us, cannot block it.
void parallel_for(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> task) {
  struct State {
    std::function<void(int64_t)> task;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) task(i);
    }
  };
  auto state = std::make_shared<State>();  // a helper may start after the call has returned; it finds no task then
  state->task = std::move(task);
  state->count = count;
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// The columns of a task, at most `widest` and a multiple of 32, such that all threads get as many tasks.
int64_t column_share(int64_t columns, int64_t threads, int64_t widest) {
  const int64_t tasks = threads * ((columns + threads * widest - 1) / (threads * widest));
  return ((columns + tasks - 1) / tasks + 31) / 32 * 32;
}

ffi::ErrorOr<Float> float_type(ffi::DataType type) {
  if (type == ffi::F32) return Float::kF32;
  if (type == ffi::F16) return Float::kF16;
  if (type == ffi::BF16) return Float::kBF16;
  return ffi::Unexpected(ffi::Error::InvalidArgument("w4a16: scales must be float32, float16 or bfloat16"));
}

struct Product {
  Weight weight;
  OwnedPlan plan;
  const Kernels* kernels;
  const MatrixKernels* matrix;  // or null
};

ffi::ErrorOr<Product> make_product(ffi::AnyBuffer words, ffi::AnyBuffer scale, ffi::AnyBuffer zero, int64_t k, int64_t n,
                                   int64_t group_size, int64_t bits, std::string_view instructions) {
  const auto w = words.dimensions(), s = scale.dimensions(), z = zero.dimensions();
  const bool minimum = zero.element_type() != ffi::S32, bytes = bits == 8;
  if (bytes && (k % kSlice || k % group_size || minimum))
    return ffi::Unexpected(ffi::Error::InvalidArgument("w4a16: 8-bit values need whole slices and groups, and no minima"));
  const int64_t rows = bytes ? 2 * k : k, groups = (rows + group_size - 1) / group_size;
  if (w.size() != 2 || s.size() != 2 || z.size() != 2 || words.element_type() != ffi::S32 || w[0] * 4 < rows ||
      w[0] % kSlice || w[1] * 2 < n || w[1] % 8 || s[0] != groups || s[1] != w[1] * 2 ||
      z[0] != (minimum ? groups : (groups + 1) / 2) || z[1] != (minimum ? s[1] : s[1] / 4))
    return ffi::Unexpected(ffi::Error::InvalidArgument("w4a16: arrays are not the packed form of a [k, n] weight"));
  Product product;
  product.kernels = find_kernels(instructions);
  product.matrix = bytes || group_size < kMatrixGroup ? nullptr : find_matrix_kernels(instructions);
  if (!product.kernels || (bytes && !product.kernels->pairs))
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kUnimplemented, "w4a16: this CPU lacks the instructions that were asked for"));
  Weight& weight = product.weight;
  weight = {k, n, w[0] * 4, w[1] * 2, group_size, static_cast<const uint16_t*>(words.untyped_data()),
            scale.untyped_data(), Float::kF32, nullptr, nullptr, Float::kF32, static_cast<int>(bits)};
  auto scale_type = float_type(scale.element_type());
  if (scale_type.has_error()) return ffi::Unexpected(scale_type.error());
  weight.scale_type = scale_type.value();
  if (bytes)  // those of the lower halves, which are the values' own
    weight.scale = static_cast<const char*>(weight.scale) + groups / 2 * s[1] * (weight.scale_type == Float::kF32 ? 4 : 2);
  if (minimum) {
    auto type = float_type(zero.element_type());
    if (type.has_error()) return ffi::Unexpected(type.error());
    weight.minimum = zero.untyped_data();
    weight.minimum_type = type.value();
  } else {
    weight.zero = static_cast<const uint8_t*>(zero.untyped_data());
  }
  product.plan = make_plan(k, group_size);
  return product;
}

using Rows = ffi::Buffer<ffi::F32, 2>;

// The calling thread's memory for x as a product takes it, until the thread asks again: new pages for every product would
// cost more than filling them.
void* activations_memory(int64_t bytes) {
  struct Memory {
    int64_t bytes = 0;
    std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
  };
  thread_local Memory memory;
  if (memory.bytes < bytes) {
    memory.data.reset();
    memory.data.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    memory.bytes = bytes;
  }
  return memory.data.get();
}

// The planes of x [rows, depth], its rows `stride` floats apart, in `activations_memory`.
const uint16_t* make_planes(const MatrixKernels& matrix, ffi::ThreadPool& pool, const float* x, int64_t stride,
                            int64_t rows, int64_t depth) {
  auto* planes = static_cast<uint16_t*>(activations_memory(matrix.plane_bytes(rows, depth)));
  parallel_for(pool, matrix.row_tiles(rows), [&](int64_t i) { matrix.split(x, stride, rows, depth, i, i + 1, planes); });
  return planes;
}

// Calls task(planes, start, rows, i) for i in [0, tasks), with the planes of the rows of x [.., depth] from `start` on:
// at most kMaxRows at a time.
template <class Task>
void on_matrix_unit(const MatrixKernels& matrix, ffi::ThreadPool& pool, const Rows& x, int64_t tasks, Task task) {
  const int64_t all = x.dimensions()[0], depth = x.dimensions()[1];
  for (int64_t start = 0; start < all; start += kMaxRows) {
    const int64_t rows = std::min<int64_t>(kMaxRows, all - start);
    const uint16_t* planes = make_planes(matrix, pool, x.typed_data() + start * depth, depth, rows, depth);
    parallel_for(pool, tasks, [&](int64_t i) { task(planes, start, rows, i); });
  }
}

ffi::Error forward(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer words, ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                   ffi::Result<Rows> y, int64_t k, int64_t n, int64_t group_size, int64_t bits,
                   int64_t activation_bits, std::string_view instructions) {
  auto made = make_product(words, scale, zero, k, n, group_size, bits, instructions);
  if (made.has_error()) return made.error();
  const Product& product = made.value();
  const Plan plan = product.plan.view();
  const int64_t rows = x.dimensions()[0], most = std::min<int64_t>(rows, kMaxRows);
  if (product.matrix && activation_bits == 16 && rows >= kForwardRows) {
    const auto task = [&](const uint16_t* planes, int64_t start, int64_t count, int64_t i) {
      product.matrix->forward(plan, product.weight, planes, count, i * kMatrixColumns, std::min(n, (i + 1) * kMatrixColumns),
                              y->typed_data() + start * n);
    };
    on_matrix_unit(*product.matrix, pool, x, (n + kMatrixColumns - 1) / kMatrixColumns, task);
    return ffi::Error::Success();
  }
  const int planes = activation_bits == 8 ? 1 : 2;
  const PairKernels* pairs = planes == 2 && (bits == 8 || rows >= kPairRows) ? product.kernels->pairs : nullptr;
  if (bits == 8 && !pairs) return ffi::Error::InvalidArgument("w4a16: 8-bit values go with 16-bit activations");
  auto* values = static_cast<int8_t*>(activations_memory(most * plan.pieces * planes * kSlice));
  std::vector<float> scales(most * plan.superblocks), sums(most * plan.segments);
  // Few rows: wide columns, since memory is what takes time; many: narrow ones, which stay in the first-level cache.
  const int64_t widest = most == 1 ? kMaxColumns : most <= 8 ? kMaxTiled : 64;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t share = n / (4 * threads);
  const int64_t width = pairs ? column_share(n, threads, kMaxPaired) : std::clamp<int64_t>(share / 32 * 32, 32, widest);
  const int64_t blocks = (n + width - 1) / width;
  for (int64_t start = 0; start < rows; start += kMaxRows) {
    const int64_t count = std::min<int64_t>(kMaxRows, rows - start);
    const Quantized quantized{count, planes, values, scales.data(), sums.data()};
    const float* from = x.typed_data() + start * k;
    float* to = y->typed_data() + start * n;
    const auto quantize = pairs ? pairs->quantize : product.kernels->quantize;
    const auto multiply = pairs ? pairs->forward : product.kernels->forward;
    parallel_for(pool, (count + 15) / 16, [&](int64_t i) {
      quantize(plan, k, from, 16 * i, std::min(count, 16 * i + 16), quantized);
    });
    parallel_for(pool, blocks, [&](int64_t i) {
      multiply(plan, product.weight, quantized, i * width, std::min(n, (i + 1) * width), to);
    });
  }
  return ffi::Error::Success();
}

// `forward` with the weight of one layer: `weights` holds the words of all layers, then their scales, then their zeros.
// A loop over layers so has one call and no copy of a layer's weight.
ffi::Error forward_layer(ffi::ThreadPool pool, Rows x, ffi::BufferR0<ffi::S32> layer, ffi::RemainingArgs weights,
                         ffi::Result<Rows> y, int64_t k, int64_t n, int64_t group_size, int64_t activation_bits,
                         std::string_view instructions) {
  const int64_t layers = weights.size() / 3, i = *layer.typed_data();
  if (layers * 3 != static_cast<int64_t>(weights.size()) || i < 0 || i >= layers)
    return ffi::Error::InvalidArgument("w4a16: no such layer");
  const auto words = weights.get<ffi::AnyBuffer>(i), scale = weights.get<ffi::AnyBuffer>(layers + i),
             zero = weights.get<ffi::AnyBuffer>(2 * layers + i);
  if (words.has_error() || scale.has_error() || zero.has_error())
    return ffi::Error::InvalidArgument("w4a16: a layer's weight is no array");
  return forward(pool, x, *words, *scale, *zero, y, k, n, group_size, 4, activation_bits, instructions);
}

void backward_pairs(const PairKernels& pairs, ffi::ThreadPool& pool, const Plan& plan, const Weight& w, const Rows& dy,
                    float* dx) {
  const int64_t rows = dy.dimensions()[0], blocks = (w.n + kPairColumns - 1) / kPairColumns;
  std::vector<float> largest(w.np + kSlice), step(rows * blocks);
  pairs.largest_scales(plan, w, largest.data());
  parallel_for(pool, (rows + 15) / 16, [&](int64_t i) {
    pairs.backward_steps(w, largest.data(), dy.typed_data(), 16 * i, std::min(rows, 16 * i + 16), step.data());
  });
  const int64_t chunks = (rows + kTurnedRows - 1) / kTurnedRows;
  parallel_for(pool, chunks * plan.superblocks, [&](int64_t i) {
    const int64_t start = i / plan.superblocks * kTurnedRows, count = std::min<int64_t>(kTurnedRows, rows - start);
    pairs.backward(w, dy.typed_data() + start * w.n, step.data() + start * blocks, count, i % plan.superblocks,
                   dx + start * w.k);
  });
}

ffi::Error backward(ffi::ThreadPool pool, Rows dy, ffi::AnyBuffer words, ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                    ffi::Result<Rows> dx, int64_t k, int64_t n, int64_t group_size, int64_t bits,
                    std::string_view instructions) {
  auto made = make_product(words, scale, zero, k, n, group_size, bits, instructions);
  if (made.has_error()) return made.error();
  const Product& product = made.value();
  const Plan plan = product.plan.view();
  const int64_t rows = dy.dimensions()[0], chunks = (rows + kMaxRows - 1) / kMaxRows;
  if (product.matrix && rows >= kBackwardRows) {
    const auto task = [&](const uint16_t* planes, int64_t start, int64_t count, int64_t b) {
      product.matrix->backward(plan, product.weight, planes, count, b, dx->typed_data() + start * k);
    };
    on_matrix_unit(*product.matrix, pool, dy, plan.superblocks, task);
    return ffi::Error::Success();
  }
  const bool whole_slices = group_size % kSlice == 0 || group_size >= k;
  if (product.kernels->pairs && whole_slices && (bits == 8 || rows >= kPairRows)) {
    backward_pairs(*product.kernels->pairs, pool, plan, product.weight, dy, dx->typed_data());
    return ffi::Error::Success();
  }
  if (bits == 8) return ffi::Error::InvalidArgument("w4a16: 8-bit values need groups of whole slices");
  parallel_for(pool, chunks * plan.superblocks, [&](int64_t i) {
    const int64_t start = i / plan.superblocks * kMaxRows, count = std::min<int64_t>(kMaxRows, rows - start);
    product.kernels->backward(plan, product.weight, dy.typed_data() + start * n, count, i % plan.superblocks,
                              dx->typed_data() + start * k);
  });
  return ffi::Error::Success();
}

using Heads = ffi::Buffer<ffi::F32, 4>;
using Positions = ffi::Buffer<ffi::S32, 1>;
using Caches = ffi::Buffer<ffi::F32, 5>;

// Attention of one token a row, queries [B, K, G, H] scaled, in one layer of a cache [B, L, K, S, H]: row b sees the
// slots up to positions[b].
ffi::Error attend(ffi::ThreadPool pool, Heads q, ffi::BufferR0<ffi::S32> layer, Positions positions, Caches keys,
                  Caches values, ffi::Result<Heads> out, std::string_view instructions) {
  const auto size = keys.dimensions(), queries = q.dimensions();
  const int64_t rows = size[0], layers = size[1], heads = size[2], slots = size[3], h = size[4], i = *layer.typed_data();
  const bool fits = queries[0] == rows && queries[1] == heads && queries[3] == h && positions.dimensions()[0] == rows &&
                    std::equal(size.begin(), size.end(), values.dimensions().begin()) && i >= 0 && i < layers;
  const Kernels* kernels = find_kernels(instructions);
  if (!fits || !kernels) return ffi::Error::InvalidArgument("w4a16: attention is given arrays that do not fit");
  auto task = [&](int64_t t) {
    const int64_t row = t / heads, head = t % heads, first = ((row * layers + i) * heads + head) * slots * h;
    const int64_t visible = std::clamp<int64_t>(int64_t{positions.typed_data()[row]} + 1, 1, slots);
    std::vector<float> weights(visible);
    const int64_t at = t * queries[2] * h;
    kernels->attend(q.typed_data() + at, keys.typed_data() + first, values.typed_data() + first, queries[2], visible, h,
                    weights.data(), out->typed_data() + at);
  };
  parallel_for(pool, rows * heads, task);
  return ffi::Error::Success();
}

// y = x @ W, W [depth, width] in floats, or [width, depth] turned.
ffi::Error float_product(ffi::ThreadPool pool, Rows x, Rows w, ffi::Result<Rows> y, bool turned) {
  const MatrixKernels* matrix = find_matrix_kernels("best");
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], width = y->dimensions()[1];
  if (w.dimensions()[turned] != depth || w.dimensions()[!turned] != width || y->dimensions()[0] != rows)
    return ffi::Error::InvalidArgument("float product: shapes do not fit");
  if (!matrix) return ffi::Error(ffi::ErrorCode::kUnimplemented, "float product: this CPU has no matrix unit");
  const int64_t share = column_share(width, std::max<int64_t>(1, pool.num_threads()), kFloatColumns);
  for (int64_t start = 0; start < rows; start += kMaxRows) {
    const int64_t count = std::min<int64_t>(kMaxRows, rows - start);
    for (int64_t from = 0; from < depth; from += kFloatDepth) {
      const int64_t to = std::min(depth, from + kFloatDepth);
      const uint16_t* planes = make_planes(*matrix, pool, x.typed_data() + start * depth + from, depth, count, to - from);
      parallel_for(pool, (width + share - 1) / share, [&](int64_t i) {
        matrix->float_product(w.typed_data(), depth, width, turned, planes, count, from, to, i * share,
                              std::min(width, (i + 1) * share), y->typed_data() + start * width);
      });
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace w4a16

#define W4A16_EXPORT extern "C" __attribute__((visibility("default")))

W4A16_EXPORT XLA_FFI_Error* w4a16_forward(XLA_FFI_CallFrame*);
W4A16_EXPORT XLA_FFI_Error* w4a16_forward_layer(XLA_FFI_CallFrame*);
W4A16_EXPORT XLA_FFI_Error* w4a16_backward(XLA_FFI_CallFrame*);
W4A16_EXPORT XLA_FFI_Error* w4a16_attend(XLA_FFI_CallFrame*);
W4A16_EXPORT XLA_FFI_Error* float_product(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(w4a16_forward, w4a16::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<w4a16::Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<w4a16::Rows>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("activation_bits")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w4a16_forward_layer, w4a16::forward_layer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<w4a16::Rows>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<w4a16::Rows>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("activation_bits")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w4a16_backward, w4a16::backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<w4a16::Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<w4a16::Rows>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(w4a16_attend, w4a16::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<w4a16::Heads>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<w4a16::Positions>()
                                  .Arg<w4a16::Caches>()
                                  .Arg<w4a16::Caches>()
                                  .Ret<w4a16::Heads>()
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(float_product, w4a16::float_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<w4a16::Rows>()
                                  .Arg<w4a16::Rows>()
                                  .Ret<w4a16::Rows>()
                                  .Attr<bool>("turned"));

// Whether this CPU has what one of the kernels needs; asked before they are registered.
W4A16_EXPORT int w4a16_runs_here(const char* instructions) {
  return w4a16::find_kernels(instructions) != nullptr;
}
