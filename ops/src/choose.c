/* Which kernel this processor shall run: the first of the list that it can, or the one that DSCONVERT_OPS_KERNEL names. */

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static int runs_always(void) { return 1; }

const Kernel KERNELS[] = {
#if defined(__x86_64__)
    {"AVX-512 VBMI", lookup_vbmi, 256 << 10, runs_vbmi},
    {"AVX2", lookup_avx2, 64 << 10, runs_avx2},
#elif defined(__aarch64__)
    {"NEON", lookup_neon, 64 << 10, runs_always},
#endif
    {"plain", lookup_plain, 32 << 10, runs_always},
    {NULL, NULL, 0, NULL},
};

static const Kernel *chosen;

__attribute__((constructor)) static void choose(void) {
  const char *wanted = getenv("DSCONVERT_OPS_KERNEL");
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Kernel *k = KERNELS; k->name; k++) {
    if (!k->runs()) continue;
    if (!chosen) chosen = k;
    if (wanted && !strcmp(wanted, k->name)) chosen = k;
  }
}

const Kernel *chosen_kernel(void) { return chosen; }
