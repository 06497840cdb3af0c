// Attention of one token over the slots of a cache: plain loops of a fixed length, of which the compiler makes vectors
// of the including unit's instruction set. XLA would copy a layer's keys and values out of a cache of all layers first,
// and reads all slots, also those that are not written yet.

constexpr int kFloats = 16;  // partial sums of a product

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// exp(x) for x <= 0: 2^n exp(r), |r| <= ln(2) / 2, by the series of exp; relative error 2e-7.
float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer, in the lowest bits
  x = std::max(x, -87.0f);
  const float rounded = x * 1.44269504f + kRound, n = rounded - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts: n times the first is exact
  const float series =
      1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return series * bits_to_float((bits << 23) + 0x3f800000u);
}

float dot(const float* a, const float* b, int64_t n) {
  float sums[kFloats] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats)
    for (int j = 0; j < kFloats; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) sum += a[i] * b[i];
  for (int width = kFloats / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sum + sums[0];
}

// out [queries, h] = softmax(q keys^T) values for the queries [queries, h] of one kv head, over its first `visible`
// slots, keys and values [visible, h]. weights: room for visible floats.
void attend(const float* q, const float* keys, const float* values, int64_t queries, int64_t visible, int64_t h,
            float* __restrict weights, float* __restrict out) {
  for (int64_t i = 0; i < queries; ++i, q += h, out += h) {
    float highest = -INFINITY, total = 0;
    for (int64_t s = 0; s < visible; ++s) highest = std::max(highest, weights[s] = dot(q, keys + s * h, h));
    for (int64_t s = 0; s < visible; ++s) weights[s] = exp_of(weights[s] - highest);
    std::fill(out, out + h, 0.0f);
    int64_t s = 0;
    for (; s + 4 <= visible; s += 4) {  // four at once: out is read and written less often
      const float *w = weights + s, *v = values + s * h;
      total += (w[0] + w[1]) + (w[2] + w[3]);
      for (int64_t j = 0; j < h; ++j)
        out[j] += (w[0] * v[j] + w[1] * v[h + j]) + (w[2] * v[2 * h + j] + w[3] * v[3 * h + j]);
    }
    for (; s < visible; ++s) {
      total += weights[s];
      for (int64_t j = 0; j < h; ++j) out[j] += weights[s] * values[s * h + j];
    }
    for (int64_t j = 0; j < h; ++j) out[j] /= total;
  }
}
