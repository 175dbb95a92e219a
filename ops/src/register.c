/* The operator Lookup of domain dsconvert, as ONNX Runtime sees it.

   Lookup(tables, x): every byte of x through a table. `tables` is a constant of bytes (256,); or (channels, 256): then x
   has its channels last, and each of them has a table of its own. The output has the shape of x.

   Lookup(tables, x, y, ...): maps of one shape but for their channels, which are last, are joined along these. `tables`
   is (maps, 256), one for each of them. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "lookup.h"
#include "ort.h"

#define EXPORTED __attribute__((visibility("default")))
#define MOST_DIMENSIONS 16
#define MOST_MAPS 64
#define NEAR 4096                  /* bytes that stay in the nearest cache */
#define CHANNELS_PIECE (32 << 10)  /* bytes that are worth a thread's while where channels have tables */

/* Returns from the function with what a call says, unless all is well. */
#define TRY(call)                   \
  do {                              \
    Status *said_ = (call);         \
    if (said_) return said_;        \
  } while (0)

typedef struct {
  const Api *api;
  Lookup lookup;
  size_t piece;    /* bytes that are worth a thread's while */
  size_t channels; /* each of which has a table; 0: all have one */
  size_t maps;     /* that are joined; 1: there is one */
  uint8_t tables[];
} Table;

typedef struct {
  Operator operator_; /* what ONNX Runtime sees of it */
  const Api *api;
} Ours;

typedef struct {
  const uint8_t *from;
  size_t width; /* bytes of a pixel */
  int as_it_is; /* its table changes nothing */
} Map;

typedef struct {
  const Table *table;
  const Map *maps;
  uint8_t *to;
  size_t width, units, piece; /* bytes of a pixel of the output; pixels, or bytes where there is one map and one table:
                                 how many, and how many at a time */
} Job;

typedef struct {
  int64_t sides[MOST_DIMENSIONS];
  size_t rank, count; /* dimensions; bytes */
} Sides;

static Status *refused(const Api *api, const char *said) { return CREATE_STATUS(api)(REFUSED_AS, said); }

/* How many tables a constant of bytes (256,) or (tables, 256) holds; 0 of the former. */
static Status *tables_of(const Api *api, const Value *value, size_t *tables) {
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
  if (!good) return refused(api, "The tables of a dsconvert Lookup are not of 256 bytes each.");
  *tables = rank == 1 ? 0 : (size_t)sides[0];
  return NULL;
}

static Status *create(const Operator *operator_, const Api *api, const KernelInfo *info, void **kernel) {
  (void)operator_;
  int constant = 0;
  size_t inputs = 0, tables = 0;
  const Value *value = NULL;
  void *data = NULL;
  TRY(INPUTS(api)(info, &inputs));
  if (inputs < 2) return refused(api, "A dsconvert Lookup has no map.");
  TRY(CONSTANT_INPUT(api)(info, 0, &constant, &value));
  if (!constant || !value) return refused(api, "The tables of a dsconvert Lookup are not a constant.");
  TRY(tables_of(api, value, &tables));
  if (inputs > 2 && tables != inputs - 1) return refused(api, "A dsconvert Lookup has another number of tables than of maps.");
  if (inputs > 2 && tables > MOST_MAPS) return refused(api, "A dsconvert Lookup joins too many maps.");
  TRY(TENSOR_DATA(api)((Value *)value, &data));
  size_t size = TABLE * (tables ? tables : 1);
  Table *made = malloc(sizeof(Table) + size);
  if (!made) return refused(api, "There is no memory for the tables of a dsconvert Lookup.");
  const Kernel *chosen = chosen_kernel();
  made->api = api, made->lookup = chosen->lookup, made->piece = chosen->piece;
  made->maps = inputs - 1, made->channels = inputs > 2 ? 0 : tables;
  memcpy(made->tables, data, size);
  *kernel = made;
  return NULL;
}

static void destroy(void *kernel) { free(kernel); }

static int changes_nothing(const uint8_t *table) {
  for (int i = 0; i < TABLE; i++)
    if (table[i] != i) return 0;
  return 1;
}

/* Rows of so many bytes from one place to places that are further apart. */
static void spread(const uint8_t *from, size_t width, uint8_t *to, size_t apart, size_t rows) {
  if (width % 16) {
    for (; rows--; from += width, to += apart) memcpy(to, from, width);
    return;
  }
  for (; rows--; from += width, to += apart)
    for (size_t i = 0; i < width; i += 16) memcpy(to + i, from + i, 16); /* one load and one store */
}

/* One map of several: looked up by some rows at a time, into memory that is near, and put where it belongs. */
static void join(const Job *job, size_t index, uint8_t *to, size_t first, size_t pixels) {
  const Map *map = job->maps + index;
  const uint8_t *from = map->from + first * map->width, *table = job->table->tables + index * TABLE;
  uint8_t near[NEAR];
  if (map->as_it_is || map->width > NEAR) {
    if (map->as_it_is) {
      spread(from, map->width, to, job->width, pixels);
      return;
    }
    for (; pixels--; from += map->width, to += job->width) job->table->lookup(table, from, to, map->width);
    return;
  }
  for (size_t rows = NEAR / map->width; pixels; pixels -= rows, from += rows * map->width, to += rows * job->width) {
    if (rows > pixels) rows = pixels;
    job->table->lookup(table, from, near, rows * map->width);
    spread(near, map->width, to, job->width, rows);
  }
}

static void one_piece(void *data, size_t index) {
  const Job *job = data;
  const Table *t = job->table;
  size_t first = index * job->piece, left = job->units - first, many = left < job->piece ? left : job->piece;
  if (t->maps > 1) {
    uint8_t *to = job->to + first * job->width;
    for (size_t i = 0; i < t->maps; to += job->maps[i++].width)
      if (job->maps[i].width) join(job, i, to, first, many);
  } else if (t->channels) {
    lookup_channels(t->tables, t->channels, job->maps->from + first * t->channels, job->to + first * t->channels, many);
  } else {
    t->lookup(t->tables, job->maps->from + first, job->to + first, many);
  }
}

/* The shape of a map, whose bytes are counted. Refuses other types. */
static Status *sides_of(const Api *api, const Value *x, Sides *s) {
  Shape *shape = NULL;
  int type = 0;
  TRY(SHAPE_OF(api)(x, &shape));
  Status *said = ELEMENT_TYPE(api)(shape, &type);
  if (!said) said = RANK(api)(shape, &s->rank);
  if (!said) said = COUNT(api)(shape, &s->count);
  if (!said && s->rank <= MOST_DIMENSIONS) said = DIMENSIONS(api)(shape, s->sides, s->rank);
  RELEASE_SHAPE(api)(shape);
  if (said) return said;
  if (type != ORT_UINT8 || s->rank > MOST_DIMENSIONS) return refused(api, "A dsconvert Lookup is for maps of bytes.");
  return NULL;
}

/* The maps, and the shape of what they are joined to. Refuses maps that do not fit, and channels without a table. */
static Status *maps_of(const Table *t, Context *context, Map *maps, Sides *all) {
  const Api *api = t->api;
  for (size_t i = 0; i < t->maps; i++) {
    const Value *x = NULL;
    void *from = NULL;
    Sides own;
    TRY(INPUT(api)(context, i + 1, &x));
    TRY(sides_of(api, x, &own));
    TRY(TENSOR_DATA(api)((Value *)x, &from));
    size_t last = own.rank ? own.rank - 1 : 0;
    maps[i] = (Map){from, own.rank ? (size_t)own.sides[last] : 1, changes_nothing(t->tables + i * TABLE)};
    if (i == 0) {
      *all = own;
    } else {
      if (own.rank != all->rank || !own.rank || memcmp(own.sides, all->sides, last * sizeof(int64_t)))
        return refused(api, "The maps of a dsconvert Lookup differ in more than their channels.");
      all->sides[last] += own.sides[last];
      all->count += own.count;
    }
  }
  if (t->channels && (!all->rank || all->sides[all->rank - 1] != (int64_t)t->channels))
    return refused(api, "A dsconvert Lookup has tables for another number of channels than its map's last dimension.");
  return NULL;
}

static Status *run(void *kernel, Context *context) {
  const Table *t = kernel;
  const Api *api = t->api;
  Value *y = NULL;
  void *to = NULL;
  Map maps[MOST_MAPS];
  Sides all;
  TRY(maps_of(t, context, maps, &all));
  TRY(OUTPUT(api)(context, 0, all.sides, all.rank, &y));
  TRY(TENSOR_DATA(api)(y, &to));
  if (!all.count) return NULL;
  Job job = {t, maps, to, 1, all.count, t->piece};
  if (t->channels || t->maps > 1) {
    job.width = (size_t)all.sides[all.rank - 1];
    job.units = all.count / job.width;
    job.piece = (t->channels ? CHANNELS_PIECE : t->piece) / job.width + 1;
  }
  size_t pieces = (job.units + job.piece - 1) / job.piece;
  if (pieces == 1) {
    one_piece(&job, 0);
    return NULL;
  }
  return PARALLEL_FOR(api)(context, one_piece, pieces, 0, &job);
}

/* The shape of the output, where all sides of all maps are known. ONNX Runtime says of a shape that it does not know that
   it has no dimension, and of a side that it is -1. */
static Status *infer_known(const Api *api, ShapeContext *context) {
  Sides all = {.rank = 0}, own;
  size_t inputs = 0;
  TRY(INFERRED_INPUTS(api)(context, &inputs));
  for (size_t i = 1; i < inputs; i++) {
    Shape *shape = NULL; /* the context's own */
    TRY(INPUT_SHAPE(api)(context, i, &shape));
    TRY(RANK(api)(shape, &own.rank));
    if (!own.rank || own.rank > MOST_DIMENSIONS || (i > 1 && own.rank != all.rank)) return NULL;
    TRY(DIMENSIONS(api)(shape, own.sides, own.rank));
    for (size_t k = 0; k < own.rank; k++)
      if (own.sides[k] < 0) return NULL;
    int64_t before = i > 1 ? all.sides[own.rank - 1] : 0;
    all = own;
    all.sides[own.rank - 1] += before;
  }
  if (!all.rank) return NULL;
  Shape *made = NULL;
  TRY(NEW_SHAPE(api)(&made));
  Status *said = SET_TYPE(api)(made, ORT_UINT8);
  if (!said) said = SET_DIMENSIONS(api)(made, all.sides, all.rank);
  if (!said) said = OUTPUT_SHAPE(api)(context, 0, made);
  RELEASE_SHAPE(api)(made);
  return said;
}

static Status *infer(const Operator *operator_, ShapeContext *context) {
  const Api *api = ((const Ours *)operator_)->api;
  Status *said = infer_known(api, context);
  if (said) FREE(api, RELEASE_STATUS, Status)(said); /* a shape that is not known yet is no fault */
  return NULL;
}

static const char *name(const Operator *o) { return (void)o, "Lookup"; }
static const char *provider(const Operator *o) { return (void)o, (const char *)NULL; }
static int type(const Operator *o, size_t index) { return (void)o, (void)index, ORT_UINT8; }
static size_t two(const Operator *o) { return (void)o, 2; }
static size_t one(const Operator *o) { return (void)o, 1; }
static int usual(const Operator *o, size_t index) { return (void)o, (void)index, 0; }
static int kind(const Operator *o, size_t index) { return (void)o, index ? ANY_NUMBER : 0; }
static int at_least_one(const Operator *o) { return (void)o, 1; }
static int alike(const Operator *o) { return (void)o, 1; }
static int version(const Operator *o) { return (void)o, 1; }

static size_t in_place(int **inputs, int **outputs) {
  static int map = 1, made = 0; /* one map alone: several are never as large as what they are joined to */
  *inputs = &map, *outputs = &made;
  return 1;
}

static void keep(int *inputs, int *outputs) { (void)inputs, (void)outputs; }

static const Operator LOOKUP = {
    .version = ORT_VERSION,  .name = name,           .provider = provider,     .input_type = type,
    .inputs = two,           .output_type = type,    .outputs = one,           .destroy = destroy,
    .input_kind = kind,      .output_kind = usual,   .input_memory = usual,    .least_inputs = at_least_one,
    .like_inputs = alike,    .least_outputs = alike, .like_outputs = alike,    .create = create,
    .run = run,              .infer = infer,         .first_version = version, .last_version = version,
    .in_place = in_place,    .free_in_place = keep,
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
