// x as integers of one or two bytes, and what the instruction sets' files share: scratch memory, floats of three types.
// Included like forward.h.

// Zeroed floats, aligned to a cache line.
struct Scratch {
  explicit Scratch(int64_t count) : data(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {
    std::memset(data, 0, count * 4);
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  float* data;
};

// Rows of the next smaller tile, for the rows that tiles of `rows` leave over.
constexpr int fewer_rows(int rows) { return rows > 4 ? 4 : rows / 2; }

// kLanes floats stored in `type` from element `at` on.
template <class Simd>
typename Simd::F load_floats(const void* from, Float type, int64_t at) {
  if (type == Float::kF32) return Simd::load_f(static_cast<const float*>(from) + at);
  const uint16_t* half = static_cast<const uint16_t*>(from) + at;
  return type == Float::kF16 ? Simd::load_f16(half) : Simd::load_bf16(half);
}

// s and -z * s (or the minimum) of one group, as floats: two vectors of columns from `column` on, which may lie beyond W.
// SPLIT: in the order of forward.h.
template <class Simd, bool SPLIT>
[[gnu::always_inline]] inline void two_scales(const Weight& w, int64_t group, int64_t column, typename Simd::F* s,
                                              typename Simd::F* o) {
  for (int i = 0; i < 2; ++i, column += Simd::kLanes) {
    s[i] = o[i] = Simd::zero_f();
    if (column >= w.np) continue;
    const int64_t at = group * w.np + column;
    s[i] = load_floats<Simd>(w.scale, w.scale_type, at);
    if (w.bits == 8) continue;
    o[i] = w.minimum ? load_floats<Simd>(w.minimum, w.minimum_type, at)
                     : Simd::neg_mul(Simd::nibbles(w.zero + group / 2 * w.np + column, group % 2), s[i]);
  }
  if constexpr (SPLIT) {
    Simd::to_split(s[0], s[1]);
    Simd::to_split(o[0], o[1]);
  }
}

// The same of `columns` columns.
template <class Simd, bool SPLIT>
void load_scales(const Weight& w, int64_t group, int64_t begin, int columns, float* scale, float* offset) {
  for (int c = 0; c < columns; c += 2 * Simd::kLanes) {
    typename Simd::F s[2], o[2];
    two_scales<Simd, SPLIT>(w, group, begin + c, s, o);
    for (int i = 0; i < 2; ++i) {
      Simd::store_f(scale + c + i * Simd::kLanes, s[i]);
      Simd::store_f(offset + c + i * Simd::kLanes, o[i]);
    }
  }
}

// `y` and one segment's dot products, as floats. The one place where floats are made.
template <class Simd>
typename Simd::F add_products(typename Simd::F products, float x_scale, float x_sum, typename Simd::F scale,
                              typename Simd::F offset, typename Simd::F y) {
  y = Simd::fma(products, Simd::mul(scale, Simd::broadcast(x_scale)), y);
  return Simd::fma(Simd::broadcast(x_sum), offset, y);
}

// Plain loops that the compiler makes vectors of. A superblock with a NaN or an infinity gets the scale NaN, and so does
// its whole row of y; one whose scale would be below float's range counts as zero. Value is int8_t for planes of bytes,
// int16_t where one value holds both.
template <class Value>
void quantize(const Plan& plan, int64_t k, const float* x, int64_t first, int64_t last, const Quantized& out) {
  constexpr bool kWhole = sizeof(Value) == 2;
  const int limit = out.planes == 2 ? 127 * 256 + 127 : 127, width = kWhole ? kSlice : out.planes * kSlice;
  for (int64_t m = first; m < last; ++m)
    for (int64_t b = 0; b < plan.superblocks; ++b) {
      const Superblock& block = plan.superblock[b];
      const float* row = x + m * k + b * kSuperblock;
      const int count = static_cast<int>(k - b * kSuperblock < kSuperblock ? k - b * kSuperblock : kSuperblock);
      float padded[kSuperblock];
      if (count < kSuperblock) {
        std::memset(padded, 0, sizeof(padded));
        std::memcpy(padded, row, count * sizeof(float));
        row = padded;
      }
      uint32_t largest = 0;  // the bits of a positive float grow with it, NaN last
      for (int i = 0; i < kSuperblock; ++i) {
        uint32_t bits;
        std::memcpy(&bits, row + i, 4);
        largest = std::max(largest, bits & 0x7fffffffu);
      }
      float biggest;
      std::memcpy(&biggest, &largest, 4);
      const bool finite = largest < 0x7f800000u;
      const bool counts = finite && biggest > 1e-30f;
      const float inverse = counts ? static_cast<float>(limit) / biggest : 0.0f;
      const float scale = finite ? (counts ? biggest / static_cast<float>(limit) : 0.0f) : NAN;
      out.scale[b * out.rows + m] = scale;
      if (!finite) {
        std::memset(padded, 0, sizeof(padded));
        row = padded;
      }
      int32_t integer[kSuperblock];
      for (int i = 0; i < kSuperblock; ++i) {
        const float v = row[i] * inverse;
        integer[i] = static_cast<int32_t>(v + (v < 0 ? -0.5f : 0.5f));
      }
      Value* to = reinterpret_cast<Value*>(out.values) + (block.first_piece * out.rows + m * block.pieces) * width;
      for (int64_t s = block.first_segment; s < block.first_segment + block.segments; ++s) {
        int32_t sum = 0;
        for (int p = plan.segment[s].first_piece; p < plan.segment[s].last_piece; ++p, to += width) {
          const Piece& piece = plan.piece[block.first_piece + p];
          const int32_t* from = integer + piece.slice * kSlice;
          int32_t inside[kSlice];
          for (int i = 0; i < kSlice; ++i) inside[i] = (i >= piece.first) & (i < piece.last) ? from[i] : 0;
          for (int i = 0; i < kSlice; ++i) sum += inside[i];
          Value* low = to + width - kSlice;
          for (int i = 0; i < kSlice; ++i) low[i] = static_cast<Value>(inside[i]);
          if (width > kSlice)
            for (int i = 0; i < kSlice; ++i) to[i] = static_cast<Value>((inside[i] + 128) >> 8);
        }
        out.sum[s * out.rows + m] = finite ? scale * static_cast<float>(sum) : NAN;
      }
    }
}
