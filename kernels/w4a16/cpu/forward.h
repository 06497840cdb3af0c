// y = x @ W with x as integers: unpack a tile of W into L1, then integer dot products, a float only per group.
//
// Included by each instruction set's file, in whose unnamed namespace everything stays (`Simd` says how). Four rows of K
// make one 32-bit lane of a column: four words are interleaved so that masks and shifts leave, for every slice, the
// bytes q[k .. k + 3] of a column side by side, which is what the dot-product instructions take.

constexpr int kPanel = kSlices * kQuads * 4 * kMaxColumns;  // bytes of the widest unpacked tile

// Words of superblock b, columns [begin, begin + columns) -> panel [slice][quad][columns][4 rows] as bytes.
template <class Simd>
void unpack(const Weight& w, int64_t b, int64_t begin, int columns, uint8_t* panel) {
  constexpr int kWide = 2 * Simd::kLanes;
  const int64_t prefetch = (b + 1) * kSuperblock < w.k ? kSlice * w.np : 0;  // the same columns, one superblock on
  for (int c = 0; c < columns; c += kWide) {
    const int valid = static_cast<int>(w.np - begin - c < kWide ? w.np - begin - c : kWide);
    const uint16_t* words = w.words + b * kSlice * w.np + begin + c;
    for (int quad = 0; quad < kQuads; ++quad) {
      typename Simd::Words row[4];
      for (int i = 0; i < 4; ++i) {
        const uint16_t* from = words + (4 * quad + i) * w.np;
        row[i] = Simd::load_words(from, valid);
        Simd::prefetch(from + prefetch);
      }
      for (int half = 0; half < 2; ++half) {
        typename Simd::Words slices[kSlices];
        Simd::split(row, half, slices);
        for (int s = 0; s < kSlices; ++s)
          Simd::store_bytes(panel + ((s * kQuads + quad) * columns + c + half * Simd::kLanes) * 4, slices[s]);
      }
    }
  }
}

// s and -z * s (or the minimum) of one group's columns, as floats.
template <class Simd>
void load_scales(const Weight& w, int64_t group, int64_t begin, int columns, float* scale, float* offset) {
  for (int c = 0; c < columns; c += Simd::kLanes) {
    const int64_t at = group * w.np + begin + c;
    typename Simd::F s = Simd::zero_f(), o = Simd::zero_f();
    if (begin + c < w.np) {
      s = load_floats<Simd>(w.scale, w.scale_type, at);
      if (w.minimum) {
        o = load_floats<Simd>(w.minimum, w.minimum_type, at);
      } else {
        const typename Simd::F z = Simd::nibbles(w.zero + group / 2 * w.np + begin + c, group % 2);
        o = Simd::neg_mul(z, s);
      }
    }
    Simd::store_f(scale + c, s);
    Simd::store_f(offset + c, o);
  }
}

// One segment's integer dot products of MR rows with NV vectors of columns, added to `out` as floats.
template <class Simd, int MR, int NV, int PLANES>
void tile(const int8_t* x, int64_t x_stride, const Segment& segment, const Piece* pieces, const uint8_t* panel,
          int columns, const float* x_scale, const float* x_sum, const float* scale, const float* offset, float* out) {
  typename Simd::template Sum<PLANES> sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v].clear();
  for (int p = segment.first_piece; p < segment.last_piece; ++p) {
    const uint8_t* weights = panel + pieces[p].slice * kQuads * columns * 4;
    const int8_t* from = x + p * PLANES * kSlice;
#pragma GCC unroll 8
    for (int quad = 0; quad < kQuads; ++quad) {
      typename Simd::Words q[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) q[v] = Simd::load_bytes(weights + (quad * columns + v * Simd::kLanes) * 4);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int plane = 0; plane < PLANES; ++plane) {
          const typename Simd::Words four = Simd::broadcast4(from + i * x_stride + plane * kSlice + 4 * quad);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) sums[i][v].add(plane, q[v], four);
        }
    }
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) sums[i][v].end_piece();
  }
  for (int v = 0; v < NV; ++v) {
    const typename Simd::F s = Simd::load_f(scale + v * Simd::kLanes), o = Simd::load_f(offset + v * Simd::kLanes);
    for (int i = 0; i < MR; ++i) {
      float* to = out + i * columns + v * Simd::kLanes;
      const typename Simd::F scaled = Simd::mul(s, Simd::broadcast(x_scale[i]));
      typename Simd::F y = Simd::fma(sums[i][v].to_float(), scaled, Simd::load_f(to));
      Simd::store_f(to, Simd::fma(Simd::broadcast(x_sum[i]), o, y));
    }
  }
}

// `tile` for every row and column of a task; the rows left over go in smaller tiles.
template <class Simd, int PLANES, int MR>
void tiles(const Segment& segment, const Piece* pieces, int64_t rows, int64_t first, const int8_t* x, int64_t x_stride,
           const uint8_t* panel, int columns, const float* x_scale, const float* x_sum, const float* scale,
           const float* offset, float* out) {
  constexpr int kStep = Simd::kVectors * Simd::kLanes;
  int64_t m = first;
  for (; m + MR <= rows; m += MR)
    for (int c = 0; c < columns; c += kStep)
      tile<Simd, MR, Simd::kVectors, PLANES>(x + m * x_stride, x_stride, segment, pieces, panel + 4 * c, columns,
                                             x_scale + m, x_sum + m, scale + c, offset + c, out + m * columns + c);
  if constexpr (MR > 1)
    if (m < rows)
      tiles<Simd, PLANES, (MR > 2 ? MR / 2 : 1)>(segment, pieces, rows, m, x, x_stride, panel, columns, x_scale, x_sum,
                                                 scale, offset, out);
}

template <class Simd, int PLANES>
void forward_planes(const Plan& plan, const Weight& w, const Quantized& x, int64_t begin, int64_t end, float* y) {
  constexpr int kWide = 2 * Simd::kLanes;
  const int columns = static_cast<int>((end - begin + kWide - 1) / kWide) * kWide;
  alignas(64) uint8_t panel[kPanel];
  alignas(64) float scale[kMaxColumns], offset[kMaxColumns];
  Scratch out(x.rows * columns);
  int64_t group = -1;
  for (int64_t b = 0; b < plan.superblocks; ++b) {
    const Superblock& block = plan.superblock[b];
    unpack<Simd>(w, b, begin, columns, panel);
    const int64_t stride = block.pieces * PLANES * kSlice;
    const int8_t* values = x.values + block.first_piece * x.rows * PLANES * kSlice;
    for (int64_t s = block.first_segment; s < block.first_segment + block.segments; ++s) {
      if (plan.segment[s].group != group) {
        group = plan.segment[s].group;
        load_scales<Simd>(w, group, begin, columns, scale, offset);
      }
      tiles<Simd, PLANES, Simd::kRows>(plan.segment[s], plan.piece + block.first_piece, x.rows, 0, values, stride, panel,
                                       columns, x.scale + b * x.rows, x.sum + s * x.rows, scale, offset, out.data);
    }
  }
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t c = begin; c < end; ++c) y[m * w.n + c] = out.data[m * columns + c - begin];
}

template <class Simd>
void forward(const Plan& plan, const Weight& w, const Quantized& x, int64_t begin, int64_t end, float* y) {
  if (x.planes == 2)
    forward_planes<Simd, 2>(plan, w, x, begin, end, y);
  else
    forward_planes<Simd, 1>(plan, w, x, begin, end, y);
}
