// ONNX Runtime Web, its wasm build: onnx_web.mjs MODULES TASK RESULT; see tests/serving/node.py.
// Greedy tokens of a decoder's graph with the blocks of each adapter as inputs, and logits of the first prompt.
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [modules, taskFile, resultFile] = process.argv.slice(2);
const web = `${modules}/onnxruntime-web`;
const ort = await import(pathToFileURL(`${web}/dist/ort.wasm.min.mjs`));
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = pathToFileURL(`${web}/dist/`).href;
ort.env.logLevel = "error";
const task = JSON.parse(readFileSync(taskFile));

// The format: the header's length, the header as JSON, the tensors.
function safetensors(path) {
    const bytes = readFileSync(path);
    const length = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.subarray(8, 8 + length).toString());
    delete header.__metadata__;
    return Object.fromEntries(Object.entries(header).map(([name, {shape, data_offsets: [start, end]}]) => {
        const data = new Float32Array(bytes.buffer.slice(bytes.byteOffset + 8 + length + start,
            bytes.byteOffset + 8 + length + end));
        return [name, new ort.Tensor("float32", data, shape)];
    }));
}

const ints = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(task.graph)),
    {executionProviders: ["wasm"]});
const pasts = session.inputNames.filter((name) => name.startsWith("past_key_values."));
const empty = () => new ort.Tensor("float32", new Float32Array(0), [1, task.heads, 0, task.head]);
const result = {inputs: session.inputNames, answers: {}, logits: {}};
for (const [name, file] of Object.entries(task.adapters)) {
    const blocks = file ? safetensors(file) : {};
    result.answers[name] = [];
    for (const prompt of task.prompts) {
        let ids = prompt;
        let past = Object.fromEntries(pasts.map((given) => [given, empty()]));
        const tokens = [];
        while (tokens.length < task.count) {
            const total = prompt.length + tokens.length;
            const positions = Array.from(ids, (_, i) => total - ids.length + i);
            const fed = {input_ids: ints(ids), attention_mask: ints(Array(total).fill(1)),
                position_ids: ints(positions)};
            const found = await session.run({...fed, ...past, ...blocks});
            const [, length, size] = found.logits.dims;
            const last = found.logits.data.subarray((length - 1) * size, length * size);
            result.logits[name] ??= Array.from(last);
            ids = [last.reduce((best, value, at) => (value > last[best] ? at : best), 0)];
            tokens.push(ids[0]);
            past = Object.fromEntries(pasts.map((given) => [given, found[given.replace("past_key_values", "present")]]));
        }
        result.answers[name].push(tokens);
    }
}
writeFileSync(resultFile, JSON.stringify(result));
process.exit(0);
