/* For ARM of 64 bits, all of which have NEON. */

#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

/* 16 bytes: a lookup of 64 bytes gives 0 (or leaves what was there) where its place is beyond them. */
static inline uint8x16_t of_four(uint8x16_t x, const uint8x16x4_t *parts, uint8x16_t step) {
  uint8x16_t found = vqtbl4q_u8(parts[0], x);
  for (int k = 1; k < 4; k++) {
    x = vsubq_u8(x, step);
    found = vqtbx4q_u8(found, parts[k], x);
  }
  return found;
}

void lookup_neon(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count) {
  const uint8x16x4_t parts[4] = {vld1q_u8_x4(table), vld1q_u8_x4(table + 64), vld1q_u8_x4(table + 128),
                                 vld1q_u8_x4(table + 192)};
  const uint8x16_t step = vdupq_n_u8(64);
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    uint8x16_t x = vld1q_u8(from + i), y = vld1q_u8(from + i + 16);
    vst1q_u8(to + i, of_four(x, parts, step));
    vst1q_u8(to + i + 16, of_four(y, parts, step));
  }
  lookup_plain(table, from + i, to + i, count - i);
}

#endif
