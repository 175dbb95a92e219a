// DSConv the paper's way (arXiv 1901.01928, section 3.4): activations in block floating point, products of a block of
// 32 channels summed as integers, one multiplication by alpha and the block's exponent, a sum over blocks in float.
// One thread, AVX2; channels last; VQK of up to 4 bits, mantissas of 8, so that a block's sum fits 16 bits:
// 32 * 8 * 127 = 32512. Partial sums may wrap around, as addition modulo 2^16 forgives that.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

static const int B = 32, LANES = 16;

// x (h, w, chi) float -> mantissa + 128 as bytes and 2^exponent, both with a border of `pad` zeros.
extern "C" void to_block_float(const float *x, int h, int w, int chi, int pad, uint8_t *mantissa, float *step) {
    const int wide = w + 2 * pad, high = h + 2 * pad, blocks = chi / B;
    memset(mantissa, 128, size_t(high) * wide * chi);
    memset(step, 0, sizeof(float) * size_t(high) * wide * blocks);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int y = 0; y < h; y++)
        for (int c = 0; c < w; c++) {
            const size_t from = size_t(y) * w + c, to = size_t(y + pad) * wide + c + pad;
            for (int b = 0; b < blocks; b++) {
                const float *p = x + from * chi + b * B;
                __m256 v[4], most = _mm256_setzero_ps();
                for (int i = 0; i < 4; i++) {
                    v[i] = _mm256_loadu_ps(p + 8 * i);
                    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
                }
                __m128 m = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
                m = _mm_max_ps(m, _mm_movehl_ps(m, m));
                m = _mm_max_ss(m, _mm_shuffle_ps(m, m, 1));
                // the largest is [0.5, 1) * 2^e: a mantissa of 7 bits and sign has steps of 2^(e - 7)
                const int e = int(uint32_t(_mm_cvtsi128_si32(_mm_castps_si128(m))) >> 23) - 126 - 7;
                if (e < -100) continue; // nothing but zeros
                const uint32_t up = uint32_t(127 - e) << 23, down = uint32_t(127 + e) << 23;
                float scale;
                memcpy(&scale, &up, 4);
                memcpy(step + to * blocks + b, &down, 4);
                __m256i q[4];
                for (int i = 0; i < 4; i++) {
                    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(scale)));
                    q[i] = _mm256_max_epi32(_mm256_min_epi32(q[i], _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
                }
                __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
                all = _mm256_permutevar8x32_epi32(all, order);
                all = _mm256_xor_si256(all, _mm256_set1_epi8(char(128)));
                _mm256_storeu_si256((__m256i *)(mantissa + to * chi + b * B), all);
            }
        }
}

// One row's P neighbouring outputs in 16 output channels.
template <int P>
static inline void tile(const uint8_t *mantissa, const float *step, const int8_t *weights, const float *alpha,
                        const int16_t *start, int wide, int chi, int k, int stride, float *out, int cho) {
    const int blocks = chi / B;
    __m256 sum[P][2];
    for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = _mm256_setzero_ps();
    for (int ky = 0; ky < k; ky++)
        for (int kx = 0; kx < k; kx++)
            for (int b = 0; b < blocks; b++) {
                const size_t at = size_t(ky) * wide + kx;
                const __m256i first = _mm256_loadu_si256((const __m256i *)start);
                __m256i acc[P];
                for (int p = 0; p < P; p++) acc[p] = first;
                for (int i = 0; i < B / 2; i++) {
                    const __m256i wv = _mm256_loadu_si256((const __m256i *)(weights + 2 * LANES * i));
                    for (int p = 0; p < P; p++) {
                        int16_t pair;
                        memcpy(&pair, mantissa + (at + p * stride) * chi + b * B + 2 * i, 2);
                        acc[p] = _mm256_add_epi16(acc[p], _mm256_maddubs_epi16(_mm256_set1_epi16(pair), wv));
                    }
                }
                const __m256 low = _mm256_loadu_ps(alpha), high = _mm256_loadu_ps(alpha + 8);
                for (int p = 0; p < P; p++) {
                    const __m256 s = _mm256_set1_ps(step[(at + p * stride) * blocks + b]);
                    const __m256i l = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(acc[p]));
                    const __m256i h = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(acc[p], 1));
                    sum[p][0] = _mm256_fmadd_ps(_mm256_mul_ps(s, low), _mm256_cvtepi32_ps(l), sum[p][0]);
                    sum[p][1] = _mm256_fmadd_ps(_mm256_mul_ps(s, high), _mm256_cvtepi32_ps(h), sum[p][1]);
                }
                weights += B * LANES;
                alpha += LANES;
                start += LANES;
            }
    for (int p = 0; p < P; p++) {
        _mm256_storeu_ps(out + size_t(p) * cho, sum[p][0]);
        _mm256_storeu_ps(out + size_t(p) * cho + 8, sum[p][1]);
    }
}

// weights (cho / 16, k, k, chi / 32, 16 pairs, 16 outputs, 2), alpha and start (cho / 16, k, k, chi / 32, 16), start
// being -128 times the sum of a block's VQK; out (h', w', cho).
extern "C" void dsconv(const uint8_t *mantissa, const float *step, const int8_t *weights, const float *alpha,
                       const int16_t *start, int high, int wide, int chi, int cho, int k, int stride, float *out) {
    const int rows = (high - k) / stride + 1, columns = (wide - k) / stride + 1, blocks = chi / B;
    for (int y = 0; y < rows; y++)
        for (int o = 0; o < cho / LANES; o++) {
            const size_t part = size_t(o) * k * k * blocks * LANES;
            int x = 0;
            for (; x + 4 <= columns; x += 4) {
                const size_t at = size_t(y * stride) * wide + x * stride;
                tile<4>(mantissa + at * chi, step + at * blocks, weights + part * B, alpha + part, start + part, wide,
                        chi, k, stride, out + (size_t(y) * columns + x) * cho + o * LANES, cho);
            }
            for (; x < columns; x++) {
                const size_t at = size_t(y * stride) * wide + x * stride;
                tile<1>(mantissa + at * chi, step + at * blocks, weights + part * B, alpha + part, start + part, wide,
                        chi, k, stride, out + (size_t(y) * columns + x) * cho + o * LANES, cho);
            }
        }
}
