/* The part of ONNX Runtime's C interface that this library uses, in our own words: the header itself is in no package of
   PyPI, so that a wheel could not be built from there.

   ONNX Runtime promises that its table of functions only ever grows at the end: a function's place in it is as good as
   its name. `tests/same_places.c` holds these places and types against the real header, where there is one. All of
   them are there from ONNX Runtime 1.18 on. */

#ifndef DSCONVERT_ORT_H
#define DSCONVERT_ORT_H

#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 18 /* of the interface */
#define ORT_UINT8 2    /* the type of bytes, as ONNX counts types */
#define ANY_NUMBER 2   /* the kind of a last input that stands for any number of them */
#define REFUSED_AS 2   /* the code of a status: an argument is wrong */

typedef struct OrtStatus Status; /* NULL: all is well */
typedef struct OrtValue Value;
typedef struct OrtTensorTypeAndShapeInfo Shape;
typedef struct OrtSessionOptions Options;
typedef struct OrtCustomOpDomain Domain;
typedef struct OrtKernelInfo KernelInfo;
typedef struct OrtKernelContext Context;
typedef struct OrtShapeInferContext ShapeContext;

typedef void (*Function)(void);
typedef Function Api; /* the first of all functions */

typedef struct {
  const Api *(*get_api)(uint32_t version);
  const char *(*version)(void);
} ApiBase;

/* A function by its place, as what it is. */
#define CALL(api, place, ...) ((Status * (*)(__VA_ARGS__))(api)[place])
#define FREE(api, place, type) ((void (*)(type *))(api)[place])

#define CREATE_STATUS(api) CALL(api, 0, int code, const char *said)
#define CREATE_DOMAIN(api) CALL(api, 26, const char *name, Domain **made)
#define ADD_OPERATOR(api) CALL(api, 27, Domain *domain, const void *operator_)
#define ADD_DOMAIN(api) CALL(api, 28, Options *options, Domain *domain)
#define TENSOR_DATA(api) CALL(api, 51, Value *value, void **data)
#define NEW_SHAPE(api) CALL(api, 57, Shape **made)
#define SET_TYPE(api) CALL(api, 58, Shape *shape, int type)
#define SET_DIMENSIONS(api) CALL(api, 59, Shape *shape, const int64_t *dimensions, size_t rank)
#define ELEMENT_TYPE(api) CALL(api, 60, const Shape *shape, int *type)
#define RANK(api) CALL(api, 61, const Shape *shape, size_t *rank)
#define DIMENSIONS(api) CALL(api, 62, const Shape *shape, int64_t *dimensions, size_t rank)
#define COUNT(api) CALL(api, 64, const Shape *shape, size_t *count)
#define SHAPE_OF(api) CALL(api, 65, const Value *value, Shape **shape)
#define INPUT(api) CALL(api, 90, const Context *context, size_t index, const Value **value)
#define OUTPUT(api) CALL(api, 91, Context *context, size_t index, const int64_t *dimensions, size_t rank, Value **value)
#define RELEASE_STATUS 93
#define RELEASE_SHAPE(api) FREE(api, 99, Shape)
#define INPUTS(api) CALL(api, 230, const KernelInfo *info, size_t *count)
#define CONSTANT_INPUT(api) CALL(api, 249, const KernelInfo *info, size_t index, int *is_constant, const Value **value)
#define INFERRED_INPUTS(api) CALL(api, 267, const ShapeContext *context, size_t *count)
#define INPUT_SHAPE(api) CALL(api, 268, const ShapeContext *context, size_t index, Shape **shape)
#define OUTPUT_SHAPE(api) CALL(api, 270, const ShapeContext *context, size_t index, const Shape *shape)
#define PARALLEL_FOR(api) \
  CALL(api, 274, const Context *context, void (*one)(void *, size_t), size_t total, size_t batches, void *data)

/* What an operator is, function by function. Those that say how many and which have the operator itself first. */
typedef struct Operator {
  uint32_t version;
  void *(*create_kernel)(const struct Operator *, const Api *, const KernelInfo *);
  const char *(*name)(const struct Operator *);
  const char *(*provider)(const struct Operator *); /* NULL: the CPU's */
  int (*input_type)(const struct Operator *, size_t index);
  size_t (*inputs)(const struct Operator *);
  int (*output_type)(const struct Operator *, size_t index);
  size_t (*outputs)(const struct Operator *);
  void (*compute)(void *kernel, Context *);
  void (*destroy)(void *kernel);
  int (*input_kind)(const struct Operator *, size_t index); /* 0: required */
  int (*output_kind)(const struct Operator *, size_t index);
  int (*input_memory)(const struct Operator *, size_t index); /* 0: the usual one */
  int (*least_inputs)(const struct Operator *);               /* these four are for any number of inputs or outputs */
  int (*like_inputs)(const struct Operator *);
  int (*least_outputs)(const struct Operator *);
  int (*like_outputs)(const struct Operator *);
  Status *(*create)(const struct Operator *, const Api *, const KernelInfo *, void **kernel);
  Status *(*run)(void *kernel, Context *);
  Status *(*infer)(const struct Operator *, ShapeContext *);
  int (*first_version)(const struct Operator *);
  int (*last_version)(const struct Operator *);
  size_t (*in_place)(int **inputs, int **outputs); /* which outputs may take the memory of which inputs */
  void (*free_in_place)(int *inputs, int *outputs);
  size_t (*aliases)(int **inputs, int **outputs);
  void (*free_aliases)(int *inputs, int *outputs);
} Operator;

#endif
