/* For any processor. */

#include "lookup.h"

void lookup_plain(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint8_t made[8]; /* all are read before one is written, so the loads need not wait for the stores */
    for (int k = 0; k < 8; k++) made[k] = table[from[i + k]];
    for (int k = 0; k < 8; k++) to[i + k] = made[k];
  }
  for (; i < count; i++) to[i] = table[from[i]];
}

void lookup_channels(const uint8_t *tables, size_t channels, const uint8_t *from, uint8_t *to, size_t pixels) {
  for (size_t p = 0; p < pixels; p++, from += channels, to += channels)
    for (size_t c = 0; c < channels; c++) to[c] = tables[c * TABLE + from[c]];
}
