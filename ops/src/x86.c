/* For x86-64. Each function is compiled for the instructions that its attribute names, whatever the rest is. */

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))
#define AVX2 __attribute__((target("avx2")))

/* 64 bytes: the lower half of the table by the lower 7 bits, the upper half by the same, and the top bit chooses. */
VBMI static inline __m512i of_four(__m512i x, __m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i low = _mm512_permutex2var_epi8(a, x, b), high = _mm512_permutex2var_epi8(c, x, d);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
}

VBMI void lookup_vbmi(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count) {
  __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
  __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
  size_t i = 0;
  for (; i + 128 <= count; i += 128) {
    __m512i x = _mm512_loadu_si512(from + i), y = _mm512_loadu_si512(from + i + 64);
    _mm512_storeu_si512(to + i, of_four(x, a, b, c, d));
    _mm512_storeu_si512(to + i + 64, of_four(y, a, b, c, d));
  }
  while (i < count) {
    size_t left = count - i < 64 ? count - i : 64;
    __mmask64 some = ~0ULL >> (64 - left);
    _mm512_mask_storeu_epi8(to + i, some, of_four(_mm512_maskz_loadu_epi8(some, from + i), a, b, c, d));
    i += left;
  }
}

/* A shuffle looks 16 bytes up by the lower 4 bits, and gives 0 where the top bit is set. So x minus 16, minus 32, ...
   (as signed numbers that stop at -128) is looked up in the parts of the table one after the other; each part but the
   first is stored as what differs from the part before, and all that is found is put together by exclusive or: then
   the parts up to x's own cancel to that part. Numbers from 128 on do the same with the top bit turned over. */
AVX2 void lookup_avx2(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count) {
  __m256i parts[16], before = _mm256_setzero_si256();
  for (int k = 0; k < 16; k++) {
    __m256i part = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16 * k)));
    parts[k] = k == 8 ? part : _mm256_xor_si256(part, before);
    before = part;
  }
  const __m256i step = _mm256_set1_epi8(16), top = _mm256_set1_epi8(-128);
  size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m256i x = _mm256_loadu_si256((const __m256i *)(from + i));
    __m256i y = _mm256_loadu_si256((const __m256i *)(from + i + 32));
    __m256i u = _mm256_xor_si256(x, top), v = _mm256_xor_si256(y, top);
    __m256i p = _mm256_setzero_si256(), q = p;
    for (int k = 0; k < 8; k++) {
      p = _mm256_xor_si256(p, _mm256_xor_si256(_mm256_shuffle_epi8(parts[k], x), _mm256_shuffle_epi8(parts[k + 8], u)));
      q = _mm256_xor_si256(q, _mm256_xor_si256(_mm256_shuffle_epi8(parts[k], y), _mm256_shuffle_epi8(parts[k + 8], v)));
      x = _mm256_subs_epi8(x, step), u = _mm256_subs_epi8(u, step);
      y = _mm256_subs_epi8(y, step), v = _mm256_subs_epi8(v, step);
    }
    _mm256_storeu_si256((__m256i *)(to + i), p);
    _mm256_storeu_si256((__m256i *)(to + i + 32), q);
  }
  lookup_plain(table, from + i, to + i, count - i);
}

int runs_vbmi(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vbmi");
}

int runs_avx2(void) { return __builtin_cpu_supports("avx2"); }

#endif
