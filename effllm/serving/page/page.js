"use strict";

const $ = (id) => document.getElementById(id);
let models = [];
let key = "";
let task; /* of the model that is chosen */
const drafts = new Map(); /* task -> what was written for it */

const TASKS = {
  "fill-mask": {
    fields: [["text", "Text with [MASK]", "The quick brown [MASK] jumps over the lazy dog."]],
    path: "predict",
    body: (f) => ({ inputs: f.text }),
    show: showFillings,
    compare: compareFillings,
  },
  "text-classification": {
    fields: [["text", "Text", "A quiet, lovely film."], ["pair", "Second text, for models of pairs", "", true]],
    path: "predict",
    body: (f) => ({ inputs: f.pair ? [f.text, f.pair] : f.text }),
    show: (value, box) => box.append(bars(value.map((one) => [one.label, one.score]))),
    compare: (a, b) => scoreDifference(a.map((x) => [x.label, x.score]), b.map((x) => [x.label, x.score])),
  },
  "token-classification": {
    fields: [["text", "Text", "Ada Lovelace was born in London and never worked in Berlin."]],
    path: "predict",
    body: (f) => ({ inputs: f.text }),
    show: showEntities,
    compare: compareEntities,
  },
  "question-answering": {
    fields: [
      ["question", "Question", "Where does Ada live?"],
      ["context", "Passage", "Ada moved to Paris in 1840. She works in Berlin, but she lives in Paris."],
    ],
    path: "predict",
    body: (f) => ({ inputs: { question: f.question, context: f.context } }),
    show: showAnswer,
    compare: compareAnswers,
  },
  "feature-extraction": {
    fields: [
      ["first", "One sentence", "A cat sits outside."],
      ["second", "Another sentence", "A kitten is sitting in front of the house."],
    ],
    path: "embed",
    body: (f) => ({ inputs: [f.first, f.second] }),
    show: showSimilarity,
    compare: compareVectors,
  },
};
TASKS["sentence-similarity"] = TASKS["feature-extraction"];

function node(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function bars(pairs) {
  const table = node("table");
  for (const [name, score] of pairs) {
    const row = table.insertRow();
    row.append(node("th", name));
    row.cells[0].scope = "row";
    const meter = node("meter");
    meter.value = score;
    meter.setAttribute("aria-label", name);
    row.insertCell().append(meter);
    row.append(node("td", score.toFixed(4), "number"));
  }
  return table;
}

function scoreDifference(a, b) {
  const other = new Map(b);
  const shared = a.filter(([name]) => other.has(name)).map(([name, score]) => [name, Math.abs(score - other.get(name))]);
  if (!shared.length) return "nothing in common";
  const [name, most] = shared.reduce((best, one) => (one[1] > best[1] ? one : best));
  const same = a[0][0] === b[0][0] ? "same best answer" : "different best answers";
  return `${same}; largest |\u2060Δscore| ${most.toFixed(6)} (${name})`;
}

function perMask(value) {
  return Array.isArray(value[0]) ? value : [value];
}

function showFillings(value, box) {
  perMask(value).forEach((mask, index, all) => {
    if (all.length > 1) box.append(node("h3", `Mask ${index + 1}`));
    box.append(bars(mask.map((one) => [one.token_str, one.score])));
  });
}

function compareFillings(a, b) {
  const masks = perMask(a).map((mask, i) => [mask, perMask(b)[i]]);
  return masks
    .map(([x, y]) => scoreDifference(x.map((o) => [o.token_str, o.score]), y.map((o) => [o.token_str, o.score])))
    .join(" · ");
}

/* Server offsets count characters; JavaScript strings count UTF-16 units. */
function marked(text, spans) {
  const characters = Array.from(text);
  const box = node("p", undefined, "passage");
  let place = 0;
  for (const { start, end, label, title } of spans) {
    box.append(characters.slice(place, start).join(""));
    const mark = node("mark", characters.slice(start, end).join(""));
    if (label) mark.append(node("b", label));
    mark.title = title;
    box.append(mark);
    place = end;
  }
  box.append(characters.slice(place).join(""));
  return box;
}

function showEntities(value, box, fields) {
  if (!value.length) box.append(node("p", "No entities.", "note"));
  const spans = value.map((one) => ({ ...one, label: one.entity_group, title: one.score.toFixed(4) }));
  box.append(marked(fields.text, spans));
  box.append(bars(value.map((one) => [`${one.word} (${one.entity_group})`, one.score])));
}

function compareEntities(a, b) {
  const name = (one) => `${one.entity_group} ${one.start}–${one.end}`;
  const other = new Map(b.map((one) => [name(one), one.score]));
  const shared = a.filter((one) => other.has(name(one)));
  const all = new Set([...a, ...b].map(name)).size;
  const most = Math.max(0, ...shared.map((one) => Math.abs(one.score - other.get(name(one)))));
  return `${shared.length} of ${all} entities are the same; largest |\u2060Δscore| ${most.toFixed(6)}`;
}

function showAnswer(value, box, fields) {
  box.append(node("p", value.answer || "No answer.", "big"));
  box.append(marked(fields.context, [{ ...value, title: value.score.toFixed(4) }]));
  box.append(bars([["share of the best five", value.score]]));
}

function compareAnswers(a, b) {
  const same = a.start === b.start && a.end === b.end ? "same answer" : "different answers";
  return `${same}; |\u2060Δscore| ${Math.abs(a.score - b.score).toFixed(6)}`;
}

function cosine(a, b) {
  let ab = 0, aa = 0, bb = 0;
  a.forEach((x, i) => { ab += x * b[i]; aa += x * x; bb += b[i] * b[i]; });
  return ab / Math.sqrt(aa * bb);
}

function showSimilarity(value, box) {
  box.append(node("p", cosine(value[0], value[1]).toFixed(4), "big"));
  box.append(node("p", `cosine of two vectors of ${value[0].length} numbers`, "note"));
}

function compareVectors(a, b) {
  const change = Math.abs(cosine(a[0], a[1]) - cosine(b[0], b[1])).toFixed(6);
  if (a[0].length !== b[0].length) return `|\u2060Δsimilarity| ${change}; their vectors have different sizes`;
  const across = a.map((vector, i) => cosine(vector, b[i]).toFixed(6)).join(" and ");
  return `|\u2060Δsimilarity| ${change}; cosine between the models' vectors ${across}`;
}

async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const started = performance.now();
  const response = await fetch(path, options);
  const text = await response.text();
  const ms = performance.now() - started;
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
    $("more").hidden = true; /* a link cannot carry the key */
  }
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    value = { error: text };
  }
  if (!response.ok) throw new Error(`${response.status}: ${value.error}`);
  return { value, ms, headers: response.headers };
}

function times({ ms, headers }) {
  const server = (name) => `${headers.get(`x-${name}-time`)} ms`;
  const cut = Number(headers.get("x-truncated-tokens"));
  return node(
    "p",
    `${ms.toFixed(1)} ms here · server ${server("total")}: queue ${server("queue")}, tokenise ` +
      `${server("tokenization")}, model ${server("inference")} · ${headers.get("x-compute-tokens")} tokens` +
      (cut ? ` · ${cut} tokens cut off` : ""),
    "times",
  );
}

function chosen(id) {
  return models.find((model) => model.name === $(id).value);
}

function note(id) {
  const model = chosen(id);
  $(`${id}-note`).textContent = model
    ? `${model.task}, ${(model.size_bytes / 1e6).toFixed(1)} MB, ${model.engine}, up to ${model.max_length} tokens` +
      (model.batch_dependent ? "; run one text at a time" : "")
    : "";
}

function readFields() {
  return Object.fromEntries([...$("fields").querySelectorAll("textarea")].map((one) => [one.name, one.value]));
}

function modelChosen() {
  const model = chosen("model");
  const other = $("other").value;
  $("other").replaceChildren(new Option("nothing", ""));
  for (const one of models) {
    if (one !== model && TASKS[one.task] === TASKS[model.task]) $("other").append(new Option(one.name, one.name));
  }
  $("other").value = [...$("other").options].some((option) => option.value === other) ? other : "";
  if (task) drafts.set(task, readFields());
  task = TASKS[model.task];
  const kept = drafts.get(task) ?? {};
  $("fields").replaceChildren();
  for (const [name, title, example, optional] of task.fields) {
    const box = node("div");
    const label = node("label", title);
    const area = node("textarea");
    area.id = `field-${name}`;
    area.name = name;
    area.required = !optional;
    area.value = kept[name] ?? example;
    label.htmlFor = area.id;
    box.append(label, area);
    $("fields").append(box);
  }
  for (const id of ["results", "difference"]) $(id).replaceChildren();
  $("difference").hidden = $("error").hidden = true;
  note("model");
  note("other");
}

async function run() {
  if ($("run").disabled) return;
  const own = task; /* another model may be chosen meanwhile */
  const fields = readFields();
  const wanted = [chosen("model"), chosen("other")].filter(Boolean);
  const found = [];
  for (const id of ["results", "difference"]) $(id).replaceChildren();
  $("difference").hidden = $("error").hidden = true;
  $("run").disabled = true;
  try {
    for (const model of wanted) { /* one after the other, so that neither waits for the other */
      const answer = await ask(`/models/${encodeURIComponent(model.name)}/${own.path}`, own.body(fields));
      const box = node("article");
      box.append(node("h2", model.name));
      own.show(answer.value, box, fields);
      box.append(times(answer));
      $("results").append(box);
      found.push(answer.value);
    }
    if (found.length === 2) {
      $("difference").append(node("p", own.compare(found[0], found[1])));
      $("difference").hidden = false;
    }
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
  } finally {
    $("run").disabled = false;
  }
}

async function start() {
  try {
    const { value } = await ask("/info");
    models = value.models.filter((model) => TASKS[model.task]);
    $("state").textContent = `${models.length} model${models.length === 1 ? "" : "s"}, effllm ${value.version}`;
    $("model").replaceChildren(...models.map((model) => new Option(`${model.name} — ${model.task}`, model.name)));
    $("key-form").hidden = true;
    $("form").hidden = false;
    modelChosen();
  } catch (error) {
    $("state").textContent = error.message;
  }
}

$("model").addEventListener("change", modelChosen);
$("other").addEventListener("change", () => note("other"));
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  start();
});
start();
