// Products of one row, which wait for memory: the words of a superblock go through registers into the dot products, all
// four slices at once. The sums are those of forward.h's tile, bit by bit, and so are the floats. Included before it.

constexpr int kLine = 32;  // columns whose words fill a cache line
constexpr int kRun = 128;  // columns that are read together

// One row of x and one superblock of W, whose slices are a piece each.
struct OneRow {
  const Superblock& block;
  const Segment* segments;
  const int8_t* x;  // its pieces' planes
  float x_scale;
  const float* x_sum;
};

inline bool slices_are_pieces(const Superblock& block, const Piece* pieces) {
  for (int p = 0; p < block.pieces; ++p)
    if (pieces[p].slice != p) return false;
  return true;
}

// Brings the cache lines of superblock b's scales, or of its zeros or minima, that column `column` lies in.
template <class Simd>
void prefetch_groups(const Weight& w, int64_t b, int64_t column, bool scales) {
  const auto bytes = [](Float type) { return type == Float::kF32 ? 4 : 2; };
  const int64_t last = std::min(w.k, (b + 1) * kSuperblock);
  for (int64_t row = b * kSuperblock; row < last; row += kSlice) {
    const int64_t group = row / w.group_size, at = group * w.np + column;
    if (scales)
      Simd::prefetch(static_cast<const char*>(w.scale) + at * bytes(w.scale_type));
    else if (w.minimum)
      Simd::prefetch(static_cast<const char*>(w.minimum) + at * bytes(w.minimum_type));
    else
      Simd::prefetch(w.zero + group / 2 * w.np + column);
  }
}

// The slices' sums of two vectors of columns, added to `out` as floats.
template <class Simd, class Sum>
void add_slices(const OneRow& row, const Weight& w, int64_t column, const Sum (*sums)[2], float* out) {
  typename Simd::F scale[2], offset[2], y[2] = {Simd::load_f(out), Simd::load_f(out + Simd::kLanes)};
  for (int s = 0; s < row.block.segments; ++s) {
    const Segment& segment = row.segments[s];
    two_scales<Simd, true>(w, segment.group, column, scale, offset);
    for (int half = 0; half < 2; ++half) {
      Sum sum = sums[segment.first_piece][half];
      for (int p = segment.first_piece + 1; p < segment.last_piece; ++p) sum.merge(sums[p][half]);
      y[half] = add_products<Simd>(sum.to_float(), row.x_scale, row.x_sum[s], scale[half], offset[half], y[half]);
    }
  }
  for (int half = 0; half < 2; ++half) Simd::store_f(out + half * Simd::kLanes, y[half]);
}

// Two vectors of columns by dot products of bytes. words has row stride `stride`; x has the four slices' values. Of the cache
// line's 32 words in `next` it prefetches its share.
template <class Simd, int PLANES>
void multiply_bytes(const uint16_t* words, int64_t stride, int valid, const uint16_t* next, int64_t next_stride,
                    const int8_t* const* x, typename Simd::template Sum<PLANES> (*sums)[2]) {
  typename Simd::template Sum<PLANES> own[kSlices][2];
  for (auto& slice : own)
    for (auto& sum : slice) sum.clear();
  for (int quad = 0; quad < kQuads; ++quad) {
    typename Simd::Words row[4], slices[2][kSlices];
    for (int i = 0; i < 4; ++i) row[i] = Simd::load_words(words + (4 * quad + i) * stride, valid);
    for (int i = 0; i < 2 * Simd::kLanes / 8; ++i) Simd::prefetch(next + (quad * (kLine / 8) + i) * next_stride);
    for (int half = 0; half < 2; ++half) Simd::split(row, half, slices[half]);
    for (int s = 0; s < kSlices; ++s)
      for (int plane = 0; plane < PLANES; ++plane) {
        const typename Simd::Words four = Simd::broadcast4(x[s] + plane * kSlice + 4 * quad);
        for (int half = 0; half < 2; ++half) own[s][half].add(plane, slices[half][s], four);
      }
  }
  for (int s = 0; s < kSlices; ++s)
    for (int half = 0; half < 2; ++half) {
      own[s][half].end_piece();
      sums[s][half] = own[s][half];
    }
}

template <class Simd, int PLANES>
void row_of_bytes(const OneRow& row, const Weight& w, int64_t b, int64_t begin, int columns, float* out) {
  constexpr int kWide = 2 * Simd::kLanes;
  static constexpr int8_t kZeros[PLANES * kSlice] = {};
  const int8_t* from[kSlices];
  for (int s = 0; s < kSlices; ++s) from[s] = s < row.block.pieces ? row.x + s * PLANES * kSlice : kZeros;
  for (int line = 0; line < columns; line += kLine) {
    const uint16_t* words = w.words + b * kSlice * w.np + begin + line;
    const int held = static_cast<int>(std::min<int64_t>(w.np - begin - line, kLine));
    const uint16_t* next = words + 3 * kLine;  // three cache lines on in each row, past its end harmlessly
    int64_t stride = w.np;
    alignas(64) uint16_t staged[kSlice * kLine];
    if constexpr (kWide < kLine) {  // rows often fall on the same few sets of the cache: take each line once
      for (int r = 0; r < kSlice; ++r) {
        std::memcpy(staged + r * kLine, words + r * w.np, 32);
        if (held == kLine) std::memcpy(staged + r * kLine + 16, words + r * w.np + 16, 32);
      }
      words = staged;
      stride = kLine;
    }
    for (int c = 0; c < held; c += kWide) {
      typename Simd::template Sum<PLANES> sums[kSlices][2];
      multiply_bytes<Simd, PLANES>(words + c, stride, held, next + c / 8 * w.np, w.np, from, sums);
      add_slices<Simd>(row, w, begin + line + c, sums, out + line + c);
    }
  }
}

template <class Simd>
struct PairSum {
  typename Simd::Words sum;
  void merge(const PairSum& other) { sum = Simd::add_ints(sum, other.sum); }
  typename Simd::F to_float() const { return Simd::to_float(sum); }
};

// Two vectors of columns by dot products of pairs, from words [pair of rows][kRun columns in split order][2]; x has the four
// slices' values. Of each pair of rows from `next` on it prefetches one cache line.
template <class Simd>
void multiply_pairs(const uint16_t* words, const int16_t (*x)[kSlice], const uint16_t* next, int64_t next_stride,
                    PairSum<Simd> (*sums)[2]) {
  typename Simd::Words own[kSlices][2];
  for (auto& slice : own)
    for (auto& sum : slice) sum = Simd::zero_words();
  for (int pair = 0; pair < kSlice / 2; ++pair) {
    Simd::prefetch(next + 2 * pair * next_stride);
    typename Simd::Words both[2];
    for (int half = 0; half < 2; ++half) both[half] = Simd::load_bytes(words + (pair * kRun + half * Simd::kLanes) * 2);
#pragma GCC unroll 4
    for (int s = 0; s < kSlices; ++s) {
      const typename Simd::Words two = Simd::broadcast4(x[s] + 2 * pair);
      for (int half = 0; half < 2; ++half) {
        if (s == 2) both[half] = Simd::upper_bytes(both[half]);
        // the upper nibble of a byte where it is, so 16 times too large
        own[s][half] = Simd::add_pairs(own[s][half], Simd::nibbles_in_place(both[half], s % 2), two);
      }
    }
  }
  for (int s = 0; s < kSlices; ++s)
    for (int half = 0; half < 2; ++half) sums[s][half].sum = s % 2 ? Simd::sixteenth(own[s][half]) : own[s][half];
}

template <class Simd, int PLANES>
void row_of_pairs(const OneRow& row, const Weight& w, int64_t b, int64_t begin, int columns, float* out) {
  constexpr int kWide = 2 * Simd::kLanes;
  int16_t x[kSlices][kSlice] = {};
  for (int s = 0; s < row.block.pieces; ++s)
    for (int i = 0; i < kSlice; ++i) {
      const int8_t* low = row.x + (s + 1) * PLANES * kSlice - kSlice + i;
      x[s][i] = PLANES == 2 ? 256 * low[-kSlice] + low[0] : low[0];
    }
  const uint16_t* first = w.words + b * kSlice * w.np + begin;
  for (int run = 0; run < columns; run += kRun) {
    const int held = static_cast<int>(std::min<int64_t>({w.np - begin - run, columns - run, kRun}));
    alignas(64) uint16_t staged[kSlice * kRun];  // rows often fall on the same few sets of the cache: take each line once
    for (int r = 0; r < kSlice; r += 2) {
      const uint16_t* words = first + r * w.np + run;
      for (int c = 0; c < held; c += kWide) {
        const typename Simd::Words even = Simd::load_words(words + c, held), odd = Simd::load_words(words + w.np + c, held);
        uint16_t* to = staged + r * kRun + 2 * c;
        Simd::store_words(to, Simd::template interleave<0>(even, odd));
        Simd::store_words(to + kWide, Simd::template interleave<1>(even, odd));
      }
    }
    // What comes next: the next columns, or the next superblock, or nothing, and then what is there already.
    const bool along = run + kRun < columns, below = !along && (b + 1) * kSuperblock < w.k;
    const int64_t next_column = begin + (along ? run + kRun : 0), next_block = b + below;
    const uint16_t* next = w.words + next_block * kSlice * w.np + next_column;
    const int lines = (held + kLine - 1) / kLine;
    for (int c = 0; c < held; c += kWide) {
      PairSum<Simd> sums[kSlices][2];
      const int step = c / kWide;
      prefetch_groups<Simd>(w, next_block, next_column + step / 2 * kLine, step % 2);
      multiply_pairs<Simd>(staged + 2 * c, x, next + step / lines * w.np + step % lines * kLine, w.np, sums);
      add_slices<Simd>(row, w, begin + run + c, sums, out + run + c);
    }
  }
}

// y's columns [begin, begin + columns) in split order += superblock b's products.
template <class Simd, int PLANES>
void one_row(const OneRow& row, const Weight& w, int64_t b, int64_t begin, int columns, float* out) {
  if constexpr (Simd::kOneRowInPairs)
    row_of_pairs<Simd, PLANES>(row, w, b, begin, columns, out);
  else
    row_of_bytes<Simd, PLANES>(row, w, b, begin, columns, out);
}
