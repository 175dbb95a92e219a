/* Bytes through a table of 256 bytes, and through one table for each channel.

   A kernel does `count` bytes one after the other. It reads `table[0..255]`, `from[0..count-1]`, and writes
   `to[0..count-1]`; `from` and `to` may be the same memory. Every byte is a place in the table, so that no input can
   make it read elsewhere. */

#ifndef DSCONVERT_LOOKUP_H
#define DSCONVERT_LOOKUP_H

#include <stddef.h>
#include <stdint.h>

#define TABLE 256

typedef void (*Lookup)(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count);

typedef struct {
  const char *name;  /* for people, and for DSCONVERT_OPS_KERNEL */
  Lookup lookup;
  size_t piece;      /* bytes that are worth a thread's while */
  int (*runs)(void); /* whether this processor has what it needs */
} Kernel;

void lookup_plain(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count);

/* Each of so many pixels has `channels` bytes, and `tables` one table for each of them. */
void lookup_channels(const uint8_t *tables, size_t channels, const uint8_t *from, uint8_t *to, size_t pixels);

/* All kernels of this build, the fastest first; the last has no name. */
extern const Kernel KERNELS[];

/* The one that was chosen when the library was loaded. */
const Kernel *chosen_kernel(void);

#endif
