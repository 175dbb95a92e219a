// A YOLOv5 ONNX file on a picture: letterbox, run, suppress. No page here: it takes and returns plain values.

const GREY = 114; // YOLOv5 pads with it

/** Picture (ImageBitmap) -> { input: Float32Array (3, high, wide) in 0..1, gain, left, top } */
export function letterbox(picture, high, wide) {
  const gain = Math.min(wide / picture.width, high / picture.height);
  const width = Math.max(1, Math.round(picture.width * gain));
  const height = Math.max(1, Math.round(picture.height * gain));
  const left = Math.round((wide - width) / 2 - 0.1);
  const top = Math.round((high - height) / 2 - 0.1);
  const context = new OffscreenCanvas(wide, high).getContext("2d", { willReadFrequently: true });
  context.fillStyle = `rgb(${GREY} ${GREY} ${GREY})`;
  context.fillRect(0, 0, wide, high);
  context.drawImage(picture, left, top, width, height);
  const { data } = context.getImageData(0, 0, wide, high);
  const area = high * wide;
  const input = new Float32Array(3 * area);
  for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) input[c * area + i] = data[4 * i + c] / 255;
  return { input, gain, left, top };
}

/** Rows (n, columns): cx, cy, w, h, objectness, scores -> objects { kind, score, box: [x1, y1, x2, y2] }, best first.
 *  A box has one class, its best, as in YOLOv5's detect.py. */
export function suppress(rows, columns, confidence = 0.25, overlap = 0.45) {
  const sure = [];
  for (let at = 0; at < rows.length; at += columns) {
    let kind = 0;
    for (let c = 1; c < columns - 5; c++) if (rows[at + 5 + c] > rows[at + 5 + kind]) kind = c;
    const score = rows[at + 4] * rows[at + 5 + kind];
    const [x, y, w, h] = rows.subarray(at, at + 4);
    if (score > confidence) sure.push({ kind, score, box: [x - w / 2, y - h / 2, x + w / 2, y + h / 2] });
  }
  sure.sort((a, b) => b.score - a.score);
  const kept = [];
  for (const one of sure) {
    if (kept.every((other) => other.kind !== one.kind || iou(other.box, one.box) <= overlap)) kept.push(one);
  }
  return kept;
}

function iou(a, b) {
  const w = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const h = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  const shared = Math.max(w, 0) * Math.max(h, 0);
  return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared);
}

/** The objects in a picture, boxes in its own pixels. `session` and `Tensor` are onnxruntime-web's. */
export async function detect(session, Tensor, picture) {
  const [high, wide] = session.inputMetadata[0].shape.slice(2);
  const { input, gain, left, top } = letterbox(picture, high, wide);
  const { output0 } = await session.run({ images: new Tensor("float32", input, [1, 3, high, wide]) });
  const place = (value, pad, most) => Math.min(Math.max((value - pad) / gain, 0), most);
  return suppress(output0.data, output0.dims[2]).map(({ kind, score, box: [x1, y1, x2, y2] }) => ({
    kind,
    score,
    box: [place(x1, left, picture.width), place(y1, top, picture.height),
      place(x2, left, picture.width), place(y2, top, picture.height)],
  }));
}

/** Class names from the ONNX file's metadata, which onnxruntime-web does not hand out. An ONNX file is a protobuf
 *  message; its field 14 has pairs of key (1) and value (2), and YOLOv5 writes `names` as a Python dictionary. */
export function classNames(bytes) {
  const text = (part) => new TextDecoder().decode(part);
  for (const [number, entry] of fields(bytes)) {
    if (number !== 14) continue;
    const pair = new Map(fields(entry));
    if (text(pair.get(1)) !== "names") continue;
    const names = text(pair.get(2)).matchAll(/\d+: (?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")/g);
    return [...names].map((match) => (match[1] ?? match[2]).replace(/\\(.)/g, "$1"));
  }
  return [];
}

/** [number, bytes] of a protobuf message's fields that are made of bytes. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let unit = 1; ; unit *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * unit;
      if (!(byte & 128)) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const type = tag % 8;
    if (type === 0) varint();
    else if (type === 1) at += 8;
    else if (type === 5) at += 4;
    else if (type === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, (at += length))];
    } else throw new Error("This is not an ONNX file.");
  }
}
