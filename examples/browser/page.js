// What the page does when a model or a picture is chosen.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { classNames, detect } from "./detect.js";

const [model, picture, status, canvas, found] = ["model", "picture", "status", "canvas", "found"].map(
  (id) => document.getElementById(id),
);
let loaded; // { session, names } of the chosen model

async function load() {
  loaded = undefined;
  status.textContent = "Loading the model ...";
  const bytes = new Uint8Array(await model.files[0].arrayBuffer());
  const names = classNames(bytes);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  loaded = { session, names };
}

async function look() {
  if (!loaded || !picture.files.length) {
    status.textContent = loaded ? "Choose a picture." : "Choose a model.";
    return;
  }
  status.textContent = "Looking ...";
  const image = await createImageBitmap(picture.files[0]);
  const began = performance.now();
  const objects = await detect(loaded.session, ort.Tensor, image);
  const took = performance.now() - began;
  show(image, objects);
  status.textContent = `Found ${objects.length} objects in ${took.toFixed(0)} ms.`;
}

function show(image, objects) {
  canvas.width = image.width;
  canvas.height = image.height;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const line = Math.max(2, image.width / 300);
  context.lineWidth = line;
  context.font = `${6 * line}px sans-serif`;
  context.textBaseline = "bottom";
  const rows = objects.map(({ kind, score, box }) => {
    const name = loaded.names[kind] ?? `class ${kind}`;
    const [x1, y1, x2, y2] = box;
    context.strokeStyle = context.fillStyle = `hsl(${(kind * 222) % 360} 90% 45%)`;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const label = `${name} ${score.toFixed(2)}`;
    const top = Math.max(y1, 8 * line);
    context.fillRect(x1, top - 8 * line, context.measureText(label).width + 2 * line, 8 * line);
    context.fillStyle = "#fff";
    context.fillText(label, x1 + line, top - line / 2);
    const row = document.createElement("tr");
    row.append(...[name, score.toFixed(4), ...box.map((v) => v.toFixed(2))].map((value) => {
      const cell = document.createElement("td");
      cell.textContent = value;
      return cell;
    }));
    return row;
  });
  found.tBodies[0].replaceChildren(...rows);
  found.hidden = !rows.length;
}

/** One at a time, and what goes wrong is said on the page. */
let turn = Promise.resolve();
function later(...steps) {
  turn = turn.then(async () => {
    for (const step of steps) await step();
  }).catch((error) => {
    status.textContent = `That did not work: ${error.message}`;
  });
}

model.addEventListener("change", () => later(load, look));
picture.addEventListener("change", () => later(look));
