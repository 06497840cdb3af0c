// dx = dy @ W^T in fp32: dequantize a transposed tile of W into L2, then a plain GEMM micro-kernel on it.
//
// Included like forward.h. The lanes are rows of K here, so no sum runs across lanes, and groups of any size cost nothing
// in the inner loop. Gradients are not rounded to integers (those of many rows are where pairs.h serves).

constexpr int kBackwardColumns = 128;  // columns of W in a tile: 128 x 128 floats are 64 KiB

// Columns [begin, begin + count) of superblock b as floats: tile [count][128 rows of K].
template <class Simd>
void dequantize(const Plan& plan, const Weight& w, int64_t b, int64_t begin, int count, float* out) {
  alignas(64) uint16_t words[kBackwardColumns * kSlice];  // transposed: [count][32]
  const uint16_t* from = w.words + b * kSlice * w.np + begin;
  for (int r = 0; r < kSlice; ++r)
    for (int c = 0; c < count; ++c) words[c * kSlice + r] = from[r * w.np + c];
  alignas(64) float scale[kBackwardColumns], offset[kBackwardColumns];
  const Superblock& block = plan.superblock[b];
  for (int64_t s = block.first_segment; s < block.first_segment + block.segments; ++s) {
    const Segment& segment = plan.segment[s];
    load_scales<Simd, false>(w, segment.group, begin, (count + 31) / 32 * 32, scale, offset);
    for (int p = segment.first_piece; p < segment.last_piece; ++p) {
      const Piece& piece = plan.piece[block.first_piece + p];
      const int shift = 4 * piece.slice;
      for (int c = 0; c < count; ++c) {
        const uint16_t* column = words + c * kSlice;
        float* to = out + c * kSuperblock + piece.slice * kSlice;
        const typename Simd::F s_c = Simd::broadcast(scale[c]), o_c = Simd::broadcast(offset[c]);
        int r = piece.first;
        for (; r % Simd::kLanes && r < piece.last; ++r)
          to[r] = std::fma(static_cast<float>(column[r] >> shift & 15), scale[c], offset[c]);
        for (; r + Simd::kLanes <= piece.last; r += Simd::kLanes)
          Simd::store_f(to + r, Simd::fma(Simd::nibbles16(column + r, shift), s_c, o_c));
        for (; r < piece.last; ++r)
          to[r] = std::fma(static_cast<float>(column[r] >> shift & 15), scale[c], offset[c]);
      }
    }
  }
}

// out [MR][128] (NV vectors of it) += dy [MR, count] @ tile [count, 128].
template <class Simd, int MR, int NV>
void multiply(const float* dy, int64_t stride, const float* tile, int count, float* out) {
  typename Simd::F sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = Simd::load_f(out + i * kSuperblock + v * Simd::kLanes);
  for (int c = 0; c < count; ++c) {
    typename Simd::F w[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) w[v] = Simd::load_f(tile + c * kSuperblock + v * Simd::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename Simd::F d = Simd::broadcast(dy[i * stride + c]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[i][v] = Simd::fma(d, w[v], sums[i][v]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) Simd::store_f(out + i * kSuperblock + v * Simd::kLanes, sums[i][v]);
}

template <class Simd, int MR>
void multiply_rows(const float* dy, int64_t stride, int64_t rows, int64_t first, const float* tile, int count, int kept,
                   float* out) {
  constexpr int kStep = Simd::kFloatVectors * Simd::kLanes;
  int64_t m = first;
  for (; m + MR <= rows; m += MR)
    for (int k = 0; k < kept; k += kStep)
      multiply<Simd, MR, Simd::kFloatVectors>(dy + m * stride, stride, tile + k, count, out + m * kSuperblock + k);
  if constexpr (MR > 1)
    if (m < rows) multiply_rows<Simd, fewer_rows(MR)>(dy, stride, rows, m, tile, count, kept, out);
}

template <class Simd>
void backward(const Plan& plan, const Weight& w, const float* dy, int64_t rows, int64_t b, float* dx) {
  const int kept = static_cast<int>(std::min<int64_t>(kSuperblock, w.k - b * kSuperblock));
  Scratch out(rows * kSuperblock), tile(kBackwardColumns * kSuperblock);  // rows beyond K stay zero in the tile
  for (int64_t begin = 0; begin < w.n; begin += kBackwardColumns) {
    const int count = static_cast<int>(std::min<int64_t>(kBackwardColumns, w.n - begin));
    dequantize<Simd>(plan, w, b, begin, count, tile.data);
    multiply_rows<Simd, Simd::kFloatRows>(dy + begin, w.n, rows, 0, tile.data, count, kept, out.data);
  }
  for (int64_t m = 0; m < rows; ++m)
    std::memcpy(dx + m * w.k + b * kSuperblock, out.data + m * kSuperblock, kept * sizeof(float));
}
