// The recurrence as anyone would write it in C++: one channel after the other, no intrinsics. What a good compiler
// makes of these loops is the peer. Inputs are contiguous, channels-first, float32.
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" void plain_scan(const float* u, const float* delta, const float* A, const float* B, const float* C,
                           const float* D, const float* z, const float* delta_bias, float* out, int64_t batch,
                           int64_t dim, int64_t seqlen, int64_t dstate, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t row = (b * dim + d) * seqlen;
      std::vector<float> state(dstate, 0.0f);
      float* h = state.data();
      const float* a = A + d * dstate;
      for (int64_t t = 0; t < seqlen; ++t) {
        const float raw = delta[row + t] + delta_bias[d];
        const float step = raw > 20.0f ? raw : std::log1p(std::exp(raw));
        const float entry = step * u[row + t];
        const float* b_t = B + (b * seqlen + t) * dstate;  // B and C time-first, so that the states are contiguous
        const float* c_t = C + (b * seqlen + t) * dstate;
        float y = 0.0f;
        for (int64_t n = 0; n < dstate; ++n) {
          h[n] = std::exp(step * a[n]) * h[n] + entry * b_t[n];
          y += c_t[n] * h[n];
        }
        y += D[d] * u[row + t];
        const float gate = z[row + t];
        out[row + t] = y * gate / (1.0f + std::exp(-gate));
      }
    }
  }
}
