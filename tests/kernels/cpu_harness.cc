// Runs one instruction set's kernels without XLA: `harness IN OUT`, IN and OUT written and read by test_cpu.py.
// IN: int64 rows, k, n, group_size, kp, np, planes, minimum; uint16 words; float16 scale; uint8 zero or float16 minimum;
// float32 x, dy. OUT: float32 y, dx.
#include <cstdio>
#include <cstdlib>

#include "make_plan.h"

using namespace w4a16;

#if defined(__aarch64__)
const Kernels& kernels = kNeon;
#else
const Kernels& kernels = kAvx2;
#endif

template <class T>
std::vector<T> read(FILE* file, int64_t count) {
  std::vector<T> values(count + 64);
  if (std::fread(values.data(), sizeof(T), count, file) != static_cast<size_t>(count)) std::abort();
  return values;
}

int main(int, char** argv) {
  FILE* in = std::fopen(argv[1], "rb");
  const auto header = read<int64_t>(in, 8);
  const int64_t rows = header[0], k = header[1], n = header[2], group_size = header[3], np = header[5];
  const int planes = static_cast<int>(header[6]);
  const int64_t groups = (k + group_size - 1) / group_size;
  const auto words = read<uint16_t>(in, header[4] / 4 * np);
  const auto scale = read<uint16_t>(in, groups * np);
  const auto zero = read<uint8_t>(in, header[7] ? 2 * groups * np : (groups + 1) / 2 * np);
  const auto x = read<float>(in, rows * k), dy = read<float>(in, rows * n);
  Weight weight{k, n, header[4], np, group_size, words.data(), scale.data(), Float::kF16, nullptr, nullptr, Float::kF16};
  if (header[7])
    weight.minimum = zero.data();
  else
    weight.zero = zero.data();
  const OwnedPlan owned = make_plan(k, group_size);
  const Plan plan = owned.view();
  std::vector<int8_t> values(rows * plan.pieces * planes * kSlice);
  std::vector<float> scales(rows * plan.superblocks), sums(rows * plan.segments), y(rows * n), dx(rows * k);
  const Quantized quantized{rows, planes, values.data(), scales.data(), sums.data()};
  kernels.quantize(plan, k, x.data(), 0, rows, quantized);
  for (int64_t begin = 0; begin < n; begin += 64)
    kernels.forward(plan, weight, quantized, begin, std::min(n, begin + 64), y.data());
  for (int64_t b = 0; b < plan.superblocks; ++b) kernels.backward(plan, weight, dy.data(), rows, b, dx.data());
  FILE* out = std::fopen(argv[2], "wb");
  std::fwrite(y.data(), sizeof(float), y.size(), out);
  std::fwrite(dx.data(), sizeof(float), dx.size(), out);
  return std::fclose(out);
}
