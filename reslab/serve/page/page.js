// The page: image files go to /predict one after the other, and what comes back is shown. Nothing is stored anywhere.
"use strict";

const KEPT = 8;
const TINY = 160; // pixels below which an image is shown with its pixels visible
const at = (id) => document.getElementById(id);
const percent = (share, more = 0) => {
  const digits = (share > 0.0995 ? 0 : 1) + more;
  const text = (100 * share).toFixed(digits);
  if (share < 0.001) return "< 0.1\u00a0%";
  return share < 1 && text >= 100 ? `> ${(100 - 10 ** -digits).toFixed(digits)}\u00a0%` : `${text}\u00a0%`;
};

let model = null; // what /model says
let entries = []; // {url, name, ratio, side, answer}, newest first
let failed = []; // the files to try again
const queue = [];
let working = false;

async function start() {
  try {
    const reply = await fetch("model");
    if (!reply.ok) throw new Error((await reply.json()).detail);
    model = await reply.json();
  } catch (error) {
    complain("The server does not answer", error.message);
    return;
  }
  const trained = [model.net, model.data && `trained on ${model.data}`].filter(Boolean).join(" ");
  const test = model.test && `${percent(model.test.top1, 1)} of ${model.test.n.toLocaleString("en")} test images right`;
  at("name").textContent = model.name;
  at("about").textContent = [trained, `${model.classes.length} classes`, test].filter(Boolean).join(" · ");
  at("report").hidden = !model.report;
  document.title = `${model.name} · reslab`;
}

function take(files) {
  if (!files.length) return; // a text was pasted
  if (!working) clear();
  const room = KEPT - queue.length;
  queue.push(...[...files].slice(0, room));
  const over = files.length - room;
  if (over > 0) complain("Too many images at once", `At most ${KEPT} wait for an answer; of these ${files.length} the last ${over} are left out: give them once the others are done.`);
  if (!working) work();
}

async function work() {
  working = true;
  document.body.classList.add("busy");
  while (queue.length) await classify(queue.shift());
  document.body.classList.remove("busy");
  at("again").hidden = !failed.length;
  working = false;
}

async function classify(file) {
  at("status").textContent = queue.length ? `Looking at the image, ${queue.length} more to come` : "Looking at the image";
  await started;
  const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  try {
    if (model && file.size > model.max_body_bytes) {
      throw { status: 413, title: "The file is too large", detail: `${(file.size / 2 ** 20).toFixed(0)} MiB; the server takes ${Math.floor(model.max_body_bytes / 2 ** 20)} MiB.` };
    }
    const reply = await fetch(model && model.heat_map ? "predict?heat_map=true" : "predict", { method: "POST", body: file, headers: { "Content-Type": type } });
    const body = await reply.json();
    if (!reply.ok) throw body;
    await keep(file, body);
  } catch (error) {
    if (![413, 422].includes(error.status)) failed.push(file); // those would fail again
    const unread = error.status === 422 && error.images;
    at("status").textContent = "";
    complain(unread ? "This file cannot be read as an image" : error.title || "The server does not answer", `${file.name}: ${unread ? error.images[0].detail : error.detail || error.message}`);
  }
}

async function keep(file, body) {
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  const shown = await image.decode().then(() => true, () => false); // the server reads more formats than a browser
  const [width, height] = shown ? [image.naturalWidth, image.naturalHeight] : [1, 1];
  const entry = { url, shown, name: file.name, width, height, answer: body.predictions[0], sureFrom: body.sure_from };
  for (const old of entries.splice(KEPT - 1)) URL.revokeObjectURL(old.url);
  entries.unshift(entry);
  show(entry);
}

// The two in as few digits as tell them apart.
function apart(one, other) {
  let more = 0;
  while (more < 4 && one !== other && percent(one, more) === percent(other, more)) more += 1;
  return [percent(one, more), percent(other, more)];
}

function show(entry) {
  const { answer, sureFrom } = entry;
  document.body.classList.add("answered");
  at("result").hidden = false;
  at("answer").classList.toggle("unsure", !answer.sure);
  at("verdict").textContent = answer.sure ? "Confident" : "Not sure";
  at("label").textContent = answer.label;
  const [probability, threshold] = apart(answer.probability, sureFrom);
  at("confidence").textContent = answer.sure
    ? `${probability} probability; this model is sure from ${threshold} on.`
    : `Only ${probability} probability. This model is sure from ${threshold} on, so look for yourself.`;
  at("bars").replaceChildren(...answer.top.map((each, i) => bar(each, i === 0 ? sureFrom : null)));
  at("status").textContent = `${answer.sure ? "" : "Not sure. "}${answer.label}, ${percent(answer.probability)}`;
  at("file").textContent = entry.shown ? entry.name : `${entry.name}: this browser cannot show the format; the server can read it.`;
  showImage(entry);
  showRecent(entry);
}

function bar(each, sureFrom) {
  const row = document.createElement("li");
  const [name, share, track, fill] = ["span", "span", "div", "div"].map((tag) => document.createElement(tag));
  name.textContent = each.label;
  share.textContent = percent(each.probability);
  share.className = "share";
  track.className = "track";
  fill.className = "fill";
  track.append(fill);
  if (sureFrom !== null) {
    const mark = document.createElement("div");
    mark.className = "mark";
    mark.style.left = `calc(${Math.min(1, sureFrom) * 100}% - 1px)`;
    mark.title = `sure from ${percent(sureFrom)}`;
    track.append(mark);
  }
  requestAnimationFrame(() => requestAnimationFrame(() => (fill.style.width = `${100 * each.probability}%`)));
  row.append(name, share, track);
  return row;
}

function showImage(entry) {
  const { width, height, answer } = entry;
  const frame = at("frame");
  frame.style.setProperty("--ratio", width / height);
  frame.classList.toggle("tiny", Math.max(width, height) < TINY);
  at("image").hidden = !entry.shown;
  at("image").src = entry.url;
  at("image").alt = `The image ${entry.name}`;
  at("heat").hidden = at("heat-control").hidden = !answer.heat_map;
  if (answer.heat_map) drawHeat(entry);
}

// The net sees the middle square of an image, and of it the middle image_size of canvas pixels.
async function drawHeat(entry) {
  const canvas = at("heat");
  const grey = new Image();
  grey.src = entry.answer.heat_map;
  await grey.decode();
  canvas.width = grey.naturalWidth;
  canvas.height = grey.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(grey, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set(colour(pixels.data[i] / 255), i);
  context.putImageData(pixels, 0, 0);
  const side = (Math.min(entry.width, entry.height) * model.image_size) / model.canvas;
  const [across, down] = [side / entry.width, side / entry.height];
  Object.assign(canvas.style, { width: `${100 * across}%`, height: `${100 * down}%`, left: `${50 * (1 - across)}%`, top: `${50 * (1 - down)}%` });
  canvas.setAttribute("aria-label", `Heat map: the parts of the image that spoke for ${entry.answer.label}`);
}

function fade() {
  at("heat").style.opacity = at("opacity").value / 100;
  at("opacity-value").textContent = `${at("opacity").value}\u00a0%`;
}

// Cold is transparent, so that the image shows; warm goes from violet over orange to yellow.
function colour(heat) {
  const stops = [[88, 28, 135], [219, 68, 85], [255, 232, 100]];
  const [low, high, part] = heat < 0.5 ? [stops[0], stops[1], 2 * heat] : [stops[1], stops[2], 2 * heat - 1];
  return [...low.map((c, i) => c + (high[i] - c) * part), 255 * Math.min(1, 1.6 * heat)];
}

function showRecent(current) {
  at("recent").hidden = entries.length < 2;
  at("thumbs").replaceChildren(
    ...entries.map((entry) => {
      const [row, button, image, text] = ["li", "button", "img", "span"].map((tag) => document.createElement(tag));
      button.type = "button";
      image.src = entry.shown ? entry.url : "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
      image.alt = "";
      text.textContent = entry.answer.sure ? entry.answer.label : `${entry.answer.label}?`;
      button.setAttribute("aria-label", `${entry.name}: ${entry.answer.label}, ${percent(entry.answer.probability)}`);
      if (entry === current) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => {
        show(entry);
        at("thumbs").querySelector("[aria-current]").focus();
      });
      button.append(image, text);
      row.append(button);
      return row;
    }),
  );
}

function complain(title, text) {
  const [row, head, line] = ["li", "p", "p"].map((tag) => document.createElement(tag));
  head.className = "verdict";
  head.textContent = title;
  line.textContent = text;
  row.append(head, line);
  at("problems").append(row);
  at("problem").hidden = false;
}

function clear() {
  failed = [];
  at("problems").replaceChildren();
  at("problem").hidden = at("again").hidden = true;
}

for (const id of ["choose", "photo"]) {
  at(id).addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = ""; // the same file can be chosen again
  });
}
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
at("again").addEventListener("click", () => take(failed));
at("opacity").addEventListener("input", fade);
fade();
const started = start();
