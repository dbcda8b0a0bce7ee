// Load each folder with transformers.js and print its answers as JSON. Runs under Node, beside its node_modules.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import * as js from "@huggingface/transformers";

const CLASSES = {
  "text-classification": "AutoModelForSequenceClassification",
  "token-classification": "AutoModelForTokenClassification",
  "question-answering": "AutoModelForQuestionAnswering",
  "fill-mask": "AutoModelForMaskedLM",
};
const OUTPUTS = { "question-answering": ["start_logits", "end_logits"] };

function version(name) {
  const file = new URL(`./node_modules/${name}/package.json`, import.meta.url);
  return JSON.parse(readFileSync(file, "utf-8")).version;
}

// The outputs of each input, without padding, and the label names.
async function answer(task) {
  js.env.allowRemoteModels = false;
  js.env.localModelPath = dirname(task.folder);
  const name = basename(task.folder);
  const options = { dtype: task.file.includes("quantized") ? "q8" : "fp32", device: "cpu" };
  const first = task.inputs.map((input) => input[0]);
  if (task.task === "feature-extraction") {
    const extract = await js.pipeline(task.task, name, options);
    const vectors = (await extract(first, { pooling: "mean", normalize: true })).tolist();
    return { loaded: `pipeline, ${options.dtype}`, outputs: vectors.map((vector) => ({ embedding: vector })) };
  }
  const tokenizer = await js.AutoTokenizer.from_pretrained(name);
  const model = await js[CLASSES[task.task]].from_pretrained(name, options);
  const pair = task.inputs[0].length > 1 ? task.inputs.map((input) => input[1]) : null;
  const batch = tokenizer(first, { text_pair: pair, padding: true, truncation: true });
  const raw = await model(batch);
  const lengths = batch.attention_mask.tolist().map((row) => row.filter((value) => Number(value) === 1).length);
  const names = OUTPUTS[task.task] ?? ["logits"];
  const values = names.map((output) => raw[output].tolist());
  const outputs = lengths.map((length, row) =>
    Object.fromEntries(
      names.map((output, i) => [
        output,
        task.task === "text-classification" ? values[i][row] : values[i][row].slice(0, length),
      ]),
    ),
  );
  const labels = Object.entries(model.config.id2label ?? {}).sort((a, b) => a[0] - b[0]);
  return { loaded: `${CLASSES[task.task]}, ${options.dtype}`, outputs, labels: labels.map((entry) => entry[1]) };
}

const results = [];
for (const task of JSON.parse(readFileSync(process.argv[2], "utf-8"))) {
  try {
    results.push({ case: task.name, ...(await answer(task)) });
  } catch (error) {
    console.error(error);
    results.push({ case: task.name, error: String(error) });
  }
}
const versions = Object.fromEntries(["@huggingface/transformers", "onnxruntime-node"].map((n) => [n, version(n)]));
console.log(JSON.stringify({ versions, results }));
