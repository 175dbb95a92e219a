// Runs a file of `dsconvert export --onnx` (any layout, float input) on a picture, with ONNX Runtime's C API alone.
//
//     run_onnx best.onnx picture.ppm boxes.f32
//
// The picture is a binary PPM (P6, 8 bits) of just the model's size: scale and pad it first, as YOLOv5's letterbox
// does. boxes.f32 gets the first output's floats: without --nms 1 x boxes x (5 + classes), with it n x 7. The shape is
// printed.

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_c_api.h>

namespace {

const OrtApi* const api = OrtGetApiBase()->GetApi(ORT_API_VERSION);

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// What ONNX Runtime hands out, given back when it goes out of scope.
template <typename T>
using Held = std::unique_ptr<T, void(ORT_API_CALL*)(T*)>;

std::vector<int64_t> shape_of(const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(api->GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  check(api->GetDimensions(info, shape.data(), rank));
  return shape;
}

std::vector<int64_t> input_shape(const OrtSession* session) {
  OrtTypeInfo* type = nullptr;
  check(api->SessionGetInputTypeInfo(session, 0, &type));
  const Held<OrtTypeInfo> held(type, api->ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* info = nullptr;  // belongs to the type
  check(api->CastTypeInfoToTensorInfo(type, &info));
  ONNXTensorElementDataType kind = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  check(api->GetTensorElementType(info, &kind));
  const std::vector<int64_t> shape = shape_of(info);
  if (kind != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.size() != 4 || shape[1] != 3)
    throw std::runtime_error("the model's input is not float32, 1 x 3 x height x width");
  return {1, 3, shape[2], shape[3]};
}

// A PPM's pixels as the model takes them: planes of red, green and blue, 0..1.
std::vector<float> read_picture(const char* path, int64_t height, int64_t width) {
  std::ifstream stream(path, std::ios::binary);
  std::string magic;
  int64_t wide = 0, high = 0, most = 0;
  stream >> magic >> wide >> high >> most;
  stream.get();  // the one white space before the pixels
  if (!stream || magic != "P6" || most != 255) throw std::runtime_error(std::string(path) + " is not a P6 PPM of 8 bits");
  if (wide != width || high != height)
    throw std::runtime_error("the picture is " + std::to_string(wide) + " x " + std::to_string(high) + ", the model takes " +
                             std::to_string(width) + " x " + std::to_string(height));
  const size_t pixels = static_cast<size_t>(wide * high);
  std::vector<unsigned char> bytes(3 * pixels);
  if (!stream.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error(std::string(path) + " ends early");
  std::vector<float> planes(3 * pixels);
  for (size_t i = 0; i < pixels; ++i)
    for (size_t c = 0; c < 3; ++c) planes[c * pixels + i] = static_cast<float>(bytes[3 * i + c]) / 255.0F;
  return planes;
}

void run(const char* model, const char* picture, const char* target) {
  if (api == nullptr) throw std::runtime_error("ONNX Runtime's library is older than its header");
  OrtEnv* env = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "run_onnx", &env));
  const Held<OrtEnv> held_env(env, api->ReleaseEnv);
  OrtSessionOptions* options = nullptr;
  check(api->CreateSessionOptions(&options));
  const Held<OrtSessionOptions> held_options(options, api->ReleaseSessionOptions);
  OrtSession* session = nullptr;
  check(api->CreateSession(env, model, options, &session));
  const Held<OrtSession> held_session(session, api->ReleaseSession);

  const std::vector<int64_t> shape = input_shape(session);
  std::vector<float> planes = read_picture(picture, shape[2], shape[3]);
  OrtMemoryInfo* memory = nullptr;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  const Held<OrtMemoryInfo> held_memory(memory, api->ReleaseMemoryInfo);
  OrtValue* image = nullptr;
  check(api->CreateTensorWithDataAsOrtValue(memory, planes.data(), planes.size() * sizeof(float), shape.data(),
                                            shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &image));
  const Held<OrtValue> held_image(image, api->ReleaseValue);

  OrtAllocator* allocator = nullptr;  // ONNX Runtime's own, not to be given back
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  char* name = nullptr;
  check(api->SessionGetOutputName(session, 0, allocator, &name));
  const std::string first = name;
  check(api->AllocatorFree(allocator, name));
  const char* const inputs[] = {"images"};
  const char* const outputs[] = {first.c_str()};
  OrtValue* boxes = nullptr;
  check(api->Run(session, nullptr, inputs, &image, 1, outputs, 1, &boxes));
  const Held<OrtValue> held_boxes(boxes, api->ReleaseValue);

  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(boxes, &info));
  const Held<OrtTensorTypeAndShapeInfo> held_info(info, api->ReleaseTensorTypeAndShapeInfo);
  size_t count = 0;
  check(api->GetTensorShapeElementCount(info, &count));
  void* values = nullptr;
  check(api->GetTensorMutableData(boxes, &values));
  std::ofstream stream(target, std::ios::binary);
  stream.write(static_cast<const char*>(values), static_cast<std::streamsize>(count * sizeof(float)));
  stream.close();
  if (!stream) throw std::runtime_error(std::string(target) + " cannot be written");
  const char* between = "";
  for (const int64_t size : shape_of(info)) {
    std::printf("%s%lld", between, static_cast<long long>(size));
    between = " x ";
  }
  std::printf("\n");
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: run_onnx MODEL.onnx PICTURE.ppm BOXES.f32\n");
    return 2;
  }
  try {
    run(words[1], words[2], words[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_onnx: %s\n", error.what());
    return 1;
  }
  return 0;
}
