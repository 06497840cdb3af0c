// y = x @ W with x as integers: unpack a tile of W into L1, then integer dot products, a float only per group.
//
// Included by each instruction set's file, in whose unnamed namespace everything stays (`Simd` says how). Four rows of K
// make one 32-bit lane of a column: four words are interleaved so that masks and shifts leave, for every slice, the
// bytes q[k .. k + 3] of a column side by side, which is what the dot-product instructions take. Interleaving leaves the
// columns of two vectors in an order of its own ("split order"), in which the scales are loaded too.

constexpr int kPanel = kSlices * kQuads * 4 * kMaxTiled;  // bytes of the widest unpacked tile

// Words of superblock b, columns [begin, begin + columns) -> panel [slice][quad][columns][4 rows] as bytes.
template <class Simd>
void unpack(const Weight& w, int64_t b, int64_t begin, int columns, uint8_t* panel) {
  constexpr int kWide = 2 * Simd::kLanes;
  for (int c = 0; c < columns; c += kWide) {
    const int valid = static_cast<int>(std::min<int64_t>(w.np - begin - c, kWide));
    const uint16_t* words = w.words + b * kSlice * w.np + begin + c;
    for (int quad = 0; quad < kQuads; ++quad) {
      typename Simd::Words row[4], slices[kSlices];
      for (int i = 0; i < 4; ++i) row[i] = Simd::load_words(words + (4 * quad + i) * w.np, valid);
      for (int half = 0; half < 2; ++half) {
        Simd::split(row, half, slices);
        for (int s = 0; s < kSlices; ++s)
          Simd::store_bytes(panel + ((s * kQuads + quad) * columns + c + half * Simd::kLanes) * 4, slices[s]);
      }
    }
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
      Simd::store_f(to, add_products<Simd>(sums[i][v].to_float(), x_scale[i], x_sum[i], s, o, Simd::load_f(to)));
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
      tiles<Simd, PLANES, fewer_rows(MR)>(segment, pieces, rows, m, x, x_stride, panel, columns, x_scale, x_sum,
                                                 scale, offset, out);
}

// Sums [rows, columns] in split order -> y's columns [begin, end).
template <class Simd>
void write_rows(float* sums, int64_t rows, int columns, int64_t begin, int64_t end, int64_t n, float* y) {
  for (int64_t m = 0; m < rows; ++m) {
    float* row = sums + m * columns;
    for (int c = 0; c < columns; c += 2 * Simd::kLanes) {
      typename Simd::F low = Simd::load_f(row + c), high = Simd::load_f(row + c + Simd::kLanes);
      Simd::from_split(low, high);
      Simd::store_f(row + c, low);
      Simd::store_f(row + c + Simd::kLanes, high);
    }
    std::memcpy(y + m * n + begin, row, (end - begin) * sizeof(float));
  }
}

template <class Simd, int PLANES>
void forward_planes(const Plan& plan, const Weight& w, const Quantized& x, int64_t begin, int64_t end, float* y) {
  constexpr int kWide = std::max(2, Simd::kVectors) * Simd::kLanes;
  const int columns = static_cast<int>((end - begin + kWide - 1) / kWide) * kWide;
  alignas(64) uint8_t panel[kPanel];
  alignas(64) float scales[kMaxTiled], offsets[kMaxTiled];
  Scratch out(x.rows * columns);
  for (int64_t b = 0; b < plan.superblocks; ++b) {
    const Superblock& block = plan.superblock[b];
    const Segment* segments = plan.segment + block.first_segment;
    const Piece* pieces = plan.piece + block.first_piece;
    const int8_t* values = x.values + block.first_piece * x.rows * PLANES * kSlice;
    const float *x_scale = x.scale + b * x.rows, *x_sum = x.sum + block.first_segment * x.rows;
    if (x.rows == 1 && slices_are_pieces(block, pieces)) {
      one_row<Simd, PLANES>({block, segments, values, *x_scale, x_sum}, w, b, begin, columns, out.data);
      continue;
    }
    unpack<Simd>(w, b, begin, columns, panel);
    for (int s = 0; s < block.segments; ++s) {
      load_scales<Simd, true>(w, segments[s].group, begin, columns, scales, offsets);
      tiles<Simd, PLANES, Simd::kRows>(segments[s], pieces, x.rows, 0, values, block.pieces * PLANES * kSlice, panel,
                                       columns, x_scale, x_sum + s * x.rows, scales, offsets, out.data);
    }
  }
  write_rows<Simd>(out.data, x.rows, columns, begin, end, w.n, y);
}

template <class Simd>
void forward(const Plan& plan, const Weight& w, const Quantized& x, int64_t begin, int64_t end, float* y) {
  if (x.planes == 2)
    forward_planes<Simd, 2>(plan, w, x, begin, end, y);
  else
    forward_planes<Simd, 1>(plan, w, x, begin, end, y);
}
