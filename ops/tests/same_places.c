/* Are the places and types of src/ort.h those of ONNX Runtime's own header? It compiles where they are. */

#include <onnxruntime_c_api.h>

/* ort.h in names of its own */
#define Operator OurOperator
#define Shape OurShape
#include "../src/ort.h"
#include <assert.h>

#define PLACE(number, function) static_assert(offsetof(OrtApi, function) == number * sizeof(void *), #function)
#define SAME(ours, theirs) static_assert(offsetof(OurOperator, ours) == offsetof(OrtCustomOp, theirs), #theirs)

PLACE(0, CreateStatus);
PLACE(26, CreateCustomOpDomain);
PLACE(27, CustomOpDomain_Add);
PLACE(28, AddCustomOpDomain);
PLACE(51, GetTensorMutableData);
PLACE(57, CreateTensorTypeAndShapeInfo);
PLACE(58, SetTensorElementType);
PLACE(59, SetDimensions);
PLACE(60, GetTensorElementType);
PLACE(61, GetDimensionsCount);
PLACE(62, GetDimensions);
PLACE(64, GetTensorShapeElementCount);
PLACE(65, GetTensorTypeAndShape);
PLACE(90, KernelContext_GetInput);
PLACE(91, KernelContext_GetOutput);
PLACE(RELEASE_STATUS, ReleaseStatus);
PLACE(99, ReleaseTensorTypeAndShapeInfo);
PLACE(230, KernelInfo_GetInputCount);
PLACE(249, KernelInfoGetConstantInput_tensor);
PLACE(267, ShapeInferContext_GetInputCount);
PLACE(268, ShapeInferContext_GetInputTypeShape);
PLACE(270, ShapeInferContext_SetOutputTypeShape);
PLACE(274, KernelContext_ParallelFor);

SAME(version, version);
SAME(create_kernel, CreateKernel);
SAME(name, GetName);
SAME(provider, GetExecutionProviderType);
SAME(input_type, GetInputType);
SAME(inputs, GetInputTypeCount);
SAME(output_type, GetOutputType);
SAME(outputs, GetOutputTypeCount);
SAME(compute, KernelCompute);
SAME(destroy, KernelDestroy);
SAME(input_kind, GetInputCharacteristic);
SAME(output_kind, GetOutputCharacteristic);
SAME(input_memory, GetInputMemoryType);
SAME(least_inputs, GetVariadicInputMinArity);
SAME(like_inputs, GetVariadicInputHomogeneity);
SAME(least_outputs, GetVariadicOutputMinArity);
SAME(like_outputs, GetVariadicOutputHomogeneity);
SAME(create, CreateKernelV2);
SAME(run, KernelComputeV2);
SAME(infer, InferOutputShapeFn);
SAME(first_version, GetStartVersion);
SAME(last_version, GetEndVersion);
SAME(in_place, GetMayInplace);
SAME(free_in_place, ReleaseMayInplace);
SAME(aliases, GetAliasMap);
SAME(free_aliases, ReleaseAliasMap);

static_assert(offsetof(ApiBase, get_api) == offsetof(OrtApiBase, GetApi), "GetApi");
static_assert(REFUSED_AS == ORT_INVALID_ARGUMENT, "the code of what is refused");
static_assert(ORT_UINT8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "the type of bytes");
static_assert(INPUT_OUTPUT_REQUIRED == 0, "what is required");
static_assert(INPUT_OUTPUT_VARIADIC == ANY_NUMBER, "any number");
static_assert(OrtMemTypeDefault == 0, "the usual memory");
