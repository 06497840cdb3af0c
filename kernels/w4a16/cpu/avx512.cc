// x86-64 with AVX-512 (F, BW, VL) and VNNI: Intel from Ice Lake on, AMD from Zen 4 on.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "plan.h"

namespace w4a16 {
namespace {

#include "avx512.h"
#include "quantize.h"
#include "one_row.h"
#include "forward.h"
#include "backward.h"
#include "attend.h"
#include "pairs.h"

}  // namespace

const Kernels kAvx512 = {quantize<int8_t>, forward<Avx512>, backward<Avx512>, attend, &kPairKernels<Avx512>};

}  // namespace w4a16
