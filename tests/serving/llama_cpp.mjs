// llama.cpp: llama_cpp.mjs MODULES TASK RESULT; see tests/serving/node.py. Greedy tokens of each file for each prompt.
// A prompt is a list of token ids; "texts" are tokenized instead, and nothing is generated.
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [modules, taskFile, resultFile] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(`${modules}/node-llama-cpp/dist/index.js`));
const task = JSON.parse(readFileSync(taskFile));
const llama = await getLlama({build: "never", gpu: false, maxThreads: 1, skipDownload: true, progressLogs: false,
    logLevel: "error"});
// By itself it keeps keys and values in float16 and has an attention that rounds: near ties up to 0.003 fall otherwise.
const exact = {flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = {contextSize: 256, sequences: 1, batchSize: 256, ...(task.defaults ? {} : exact)};
const results = {};
for (const [name, modelPath] of Object.entries(task.runs)) {
    try {
        const model = await llama.loadModel({modelPath, gpuLayers: 0});
        if (task.texts) {
            results[name] = task.texts.map((text) => model.tokenize(text, true));
        } else {
            const used = await model.createContext(context);
            const sequence = used.getSequence();
            results[name] = [];
            for (const prompt of task.prompts) {
                await sequence.clearHistory();
                const tokens = [];
                for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
                    if (tokens.push(token) >= task.count) break;
                }
                results[name].push(tokens);
            }
            await used.dispose();
        }
        await model.dispose();
    } catch (error) {
        results[name] = String(error); // the test says what was expected
    }
}
writeFileSync(resultFile, JSON.stringify(results));
process.exit(0);
