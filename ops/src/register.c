/* The operator Lookup of domain dsconvert, as ONNX Runtime sees it.

   Lookup(x, table): every byte of x through a table. `table` is a constant of bytes (256,), or (channels, 256): then x has
   its channels last, and each of them has a table of its own. The output has the shape of x. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "lookup.h"
#include "ort.h"

#define EXPORTED __attribute__((visibility("default")))
#define MOST_DIMENSIONS 16

/* Returns from the function with what a call says, unless all is well. */
#define TRY(call)                   \
  do {                              \
    Status *said_ = (call);         \
    if (said_) return said_;        \
  } while (0)

typedef struct {
  const Api *api;
  Lookup lookup;
  size_t piece;
  size_t channels; /* 0: one table for all */
  uint8_t tables[];
} Table;

typedef struct {
  Operator operator_; /* what ONNX Runtime sees of it */
  const Api *api;
} Ours;

typedef struct {
  const Table *table;
  const uint8_t *from;
  uint8_t *to;
  size_t units, piece; /* bytes, or pixels where channels have tables: how many, and how many at a time */
} Job;

static Status *refused(const Api *api, const char *said) { return CREATE_STATUS(api)(REFUSED_AS, said); }

/* Whether it is a constant of bytes (256,) or (channels, 256); how many channels then, 0 for the former. */
static Status *channels_of(const Api *api, const Value *value, size_t *channels) {
  Shape *shape = NULL;
  int type = 0;
  size_t rank = 0;
  int64_t sides[2] = {0, 0};
  TRY(SHAPE_OF(api)(value, &shape));
  Status *said = ELEMENT_TYPE(api)(shape, &type);
  if (!said) said = RANK(api)(shape, &rank);
  if (!said && (rank == 1 || rank == 2)) said = DIMENSIONS(api)(shape, sides, rank);
  RELEASE_SHAPE(api)(shape);
  if (said) return said;
  int good = type == ORT_UINT8 && (rank == 1 || (rank == 2 && sides[0] > 0)) && rank && sides[rank - 1] == TABLE;
  if (!good) return refused(api, "The table of a dsconvert Lookup is not of 256 bytes, or of 256 for each channel.");
  *channels = rank == 1 ? 0 : (size_t)sides[0];
  return NULL;
}

static Status *create(const Operator *operator_, const Api *api, const KernelInfo *info, void **kernel) {
  (void)operator_;
  int constant = 0;
  const Value *value = NULL;
  TRY(CONSTANT_INPUT(api)(info, 1, &constant, &value));
  if (!constant || !value) return refused(api, "The table of a dsconvert Lookup is not a constant.");
  size_t channels = 0;
  void *data = NULL;
  TRY(channels_of(api, value, &channels));
  TRY(TENSOR_DATA(api)((Value *)value, &data));
  size_t size = TABLE * (channels ? channels : 1);
  Table *made = malloc(sizeof(Table) + size);
  if (!made) return refused(api, "There is no memory for the table of a dsconvert Lookup.");
  const Kernel *chosen = chosen_kernel();
  made->api = api, made->lookup = chosen->lookup, made->piece = chosen->piece, made->channels = channels;
  memcpy(made->tables, data, size);
  *kernel = made;
  return NULL;
}

static void destroy(void *kernel) { free(kernel); }

static void one_piece(void *data, size_t index) {
  const Job *job = data;
  const Table *t = job->table;
  size_t first = index * job->piece, left = job->units - first, many = left < job->piece ? left : job->piece;
  if (t->channels)
    lookup_channels(t->tables, t->channels, job->from + first * t->channels, job->to + first * t->channels, many);
  else
    t->lookup(t->tables, job->from + first, job->to + first, many);
}

/* The shape of the map, whose bytes are counted. Refuses other types, and channels that have no table. */
static Status *shape_of(const Table *t, const Value *x, int64_t *sides, size_t *rank, size_t *count) {
  const Api *api = t->api;
  Shape *shape = NULL;
  int type = 0;
  TRY(SHAPE_OF(api)(x, &shape));
  Status *said = ELEMENT_TYPE(api)(shape, &type);
  if (!said) said = RANK(api)(shape, rank);
  if (!said) said = COUNT(api)(shape, count);
  if (!said && *rank <= MOST_DIMENSIONS) said = DIMENSIONS(api)(shape, sides, *rank);
  RELEASE_SHAPE(api)(shape);
  if (said) return said;
  if (type != ORT_UINT8 || *rank > MOST_DIMENSIONS) return refused(api, "A dsconvert Lookup is for maps of bytes.");
  if (t->channels && (*rank == 0 || sides[*rank - 1] != (int64_t)t->channels))
    return refused(api, "A dsconvert Lookup has tables for another number of channels than its map's last dimension.");
  return NULL;
}

static Status *run(void *kernel, Context *context) {
  const Table *t = kernel;
  const Api *api = t->api;
  const Value *x = NULL;
  Value *y = NULL;
  void *from = NULL, *to = NULL;
  int64_t sides[MOST_DIMENSIONS];
  size_t rank = 0, count = 0;
  TRY(INPUT(api)(context, 0, &x));
  TRY(shape_of(t, x, sides, &rank, &count));
  TRY(OUTPUT(api)(context, 0, sides, rank, &y));
  TRY(TENSOR_DATA(api)((Value *)x, &from));
  TRY(TENSOR_DATA(api)(y, &to));
  if (!count) return NULL;
  Job job = {t, from, to, count, t->piece};
  if (t->channels) {
    job.units = count / t->channels;
    job.piece = (32 << 10) / t->channels + 1;
  }
  size_t pieces = (job.units + job.piece - 1) / job.piece;
  if (pieces == 1) {
    one_piece(&job, 0);
    return NULL;
  }
  return PARALLEL_FOR(api)(context, one_piece, pieces, 0, &job);
}

static Status *infer(const Operator *operator_, ShapeContext *context) {
  const Api *api = ((const Ours *)operator_)->api;
  Shape *shape = NULL; /* the context's own */
  Status *said = INPUT_SHAPE(api)(context, 0, &shape);
  if (!said) return OUTPUT_SHAPE(api)(context, 0, shape);
  FREE(api, RELEASE_STATUS, Status)(said); /* a shape that is not known yet is no fault */
  return NULL;
}

static const char *name(const Operator *o) { return (void)o, "Lookup"; }
static const char *provider(const Operator *o) { return (void)o, (const char *)NULL; }
static int type(const Operator *o, size_t index) { return (void)o, (void)index, ORT_UINT8; }
static size_t two(const Operator *o) { return (void)o, 2; }
static size_t one(const Operator *o) { return (void)o, 1; }
static int usual(const Operator *o, size_t index) { return (void)o, (void)index, 0; }
static int none(const Operator *o) { return (void)o, 0; }
static int version(const Operator *o) { return (void)o, 1; }

static size_t in_place(int **inputs, int **outputs) {
  static int map = 0, made = 0;
  *inputs = &map, *outputs = &made;
  return 1;
}

static void keep(int *inputs, int *outputs) { (void)inputs, (void)outputs; }

static const Operator LOOKUP = {
    .version = ORT_VERSION, .name = name,           .provider = provider,     .input_type = type,
    .inputs = two,          .output_type = type,    .outputs = one,           .destroy = destroy,
    .input_kind = usual,    .output_kind = usual,   .input_memory = usual,    .least_inputs = none,
    .like_inputs = none,    .least_outputs = none,  .like_outputs = none,     .create = create,
    .run = run,             .infer = infer,         .first_version = version, .last_version = version,
    .in_place = in_place,   .free_in_place = keep,
};

/* The domain for an interface. It lives as long as the process: sessions refer to it. */
static Status *domain_of(const Api *api, Domain **domain) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static struct {
    Ours ours;
    Domain *domain;
  } * last;
  Status *said = NULL;
  pthread_mutex_lock(&lock);
  if (!last || last->ours.api != api) { /* another ONNX Runtime in the same process gets another one */
    void *fresh = calloc(1, sizeof(*last));
    if (!fresh) {
      pthread_mutex_unlock(&lock);
      return refused(api, "There is no memory for the operators of dsconvert.");
    }
    last = fresh;
    last->ours = (Ours){LOOKUP, api};
    said = CREATE_DOMAIN(api)("dsconvert", &last->domain);
    if (!said) said = ADD_OPERATOR(api)(last->domain, &last->ours);
    if (said) last = NULL;
  }
  if (!said) *domain = last->domain;
  pthread_mutex_unlock(&lock);
  return said;
}

/* What ONNX Runtime calls when the library is registered with a session's options. */
EXPORTED Status *RegisterCustomOps(Options *options, const ApiBase *base) {
  const Api *api = base->get_api(ORT_VERSION);
  Domain *domain = NULL;
  if (!api) {
    const Api *old = base->get_api(1);
    return old ? refused(old, "dsconvert-ops needs ONNX Runtime 1.18 or a later one.") : NULL;
  }
  TRY(domain_of(api, &domain));
  return ADD_DOMAIN(api)(options, domain);
}

/* The name of the kernel that was chosen. */
EXPORTED const char *dsconvert_ops_kernel(void) { return chosen_kernel()->name; }

/* So many bytes through a table by the kernel of a name, on this thread; 0 where this processor has no such one. */
EXPORTED int dsconvert_ops_lookup(const char *kernel, const uint8_t *table, const uint8_t *from, uint8_t *to,
                                  size_t count) {
  for (const Kernel *k = KERNELS; k->name; k++)
    if (!strcmp(k->name, kernel) && k->runs()) return k->lookup(table, from, to, count), 1;
  return 0;
}
