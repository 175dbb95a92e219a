// Runs ONNX files in onnxruntime-web (WebAssembly, under node): node run_web.cjs PACKAGE JOBS
// JOBS: a JSON list of {model, type, shape, input, output}; writes each first output's floats to `output`, prints a JSON
// list with its dims, or the engine's message.
const fs = require("fs");

const [, , packagePath, jobsPath] = process.argv;
const ort = require(packagePath);
const ARRAYS = { float32: Float32Array, float16: Uint16Array, uint8: Uint8Array };

async function run({ model, type, shape, input, output }) {
  try {
    const session = await ort.InferenceSession.create(fs.readFileSync(model), { executionProviders: ["wasm"] });
    const bytes = fs.readFileSync(input);
    const data = new ARRAYS[type](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    const results = await session.run({ images: new ort.Tensor(type, data, shape) });
    const first = results[session.outputNames[0]];
    fs.writeFileSync(output, new Uint8Array(first.data.buffer, first.data.byteOffset, first.data.byteLength));
    return { dims: first.dims };
  } catch (error) {
    return { message: String(error.message || error) };
  }
}

(async () => {
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const done = [];
  for (const job of JSON.parse(fs.readFileSync(jobsPath))) done.push(await run(job));
  process.stdout.write(JSON.stringify(done));
})();
