/* What each file of kernels has. */

#ifndef DSCONVERT_KERNELS_H
#define DSCONVERT_KERNELS_H

#include "lookup.h"

#if defined(__x86_64__)
void lookup_vbmi(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count);
void lookup_avx2(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count);
int runs_vbmi(void);
int runs_avx2(void);
#elif defined(__aarch64__)
void lookup_neon(const uint8_t *table, const uint8_t *from, uint8_t *to, size_t count);
#endif

#endif
