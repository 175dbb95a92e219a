/* Every kernel of this processor gives what the table says, and touches no byte beside its own: build with the address
   sanitizer, which ends the program otherwise. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../src/lookup.h"

static uint8_t drawn(void) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return (uint8_t)(state >> 24);
}

static uint8_t *some(size_t count) {
  uint8_t *made = malloc(count ? count : 1); /* no byte more, so that the sanitizer sees one that is */
  if (!made) exit(2);
  for (size_t i = 0; i < count; i++) made[i] = drawn();
  return made;
}

static int wrong(const Kernel *k, size_t count) {
  uint8_t *table = some(TABLE), *from = some(count), *to = some(count);
  int bad = 0;
  k->lookup(table, from, to, count);
  for (size_t i = 0; i < count; i++) bad |= to[i] != table[from[i]];
  k->lookup(table, from, from, count);
  bad |= memcmp(from, to, count) != 0;
  free(table), free(from), free(to);
  return bad;
}

static int wrong_channels(size_t channels, size_t pixels) {
  uint8_t *tables = some(channels * TABLE), *from = some(channels * pixels), *to = some(channels * pixels);
  int bad = 0;
  lookup_channels(tables, channels, from, to, pixels);
  for (size_t i = 0; i < channels * pixels; i++) bad |= to[i] != tables[i % channels * TABLE + from[i]];
  free(tables), free(from), free(to);
  return bad;
}

int main(void) {
  int bad = 0;
  for (const Kernel *k = KERNELS; k->name; k++) {
    if (!k->runs()) continue;
    printf("%s%s\n", k->name, k == chosen_kernel() ? ", which was chosen" : "");
    for (size_t count = 0; count < 700; count++) bad |= wrong(k, count);
    bad |= wrong(k, 100003);
  }
  for (size_t channels = 1; channels < 70; channels++) bad |= wrong_channels(channels, 33);
  puts(bad ? "wrong" : "exact");
  return bad;
}
