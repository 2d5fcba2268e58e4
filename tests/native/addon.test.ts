import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import test from 'node:test';
import type { NativeRunner, RunnerOptions } from '../../server/engine/addon.js';
import { ADDON_PATH, loadAddon } from '../../server/engine/load-addon.js';
import type { StepBatch } from '../../server/engine/step-batch.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';

const addon = loadAddon();
const checkpoint = readCheckpoint(fileURLToPath(new URL('../../models/pocket-r1', import.meta.url)));
const OPTIONS: RunnerOptions = {
  spec: checkpoint.spec,
  tensors: checkpoint.tensors,
  device: 'cpu',
  compute: 'auto',
  cpuPath: 'auto',
  numThreads: 2,
  blockSize: 8,
  numBlocks: 16,
  gpuMemoryUtilization: 0,
  kvCacheDtype: 'auto',
  headDtype: 'auto',
  deterministic: true,
  maxStepTokens: 32,
  maxNumSeqs: 4,
  loadMtp: true,
};
const PROMPT = [0, 3, 979, 234, 34, 36, 36, 521, 234, 35, 32, 4, 5];

async function loadRunner(t: test.TestContext, options = OPTIONS): Promise<NativeRunner> {
  const runner = addon.createRunner(options);
  t.after(() => runner.close());
  await runner.load();
  return runner;
}

/** One greedy sequence of `ids` at positions 0.. in blocks 0.. */
function batchOf(ids: number[]): StepBatch {
  const numBlocks = Math.ceil(ids.length / OPTIONS.blockSize);
  return {
    tokenIds: Int32Array.from(ids),
    positions: Int32Array.from(ids, (_, i) => i),
    slotMapping: Int32Array.from(ids, (_, i) => i),
    qStart: Int32Array.of(0, ids.length),
    blockTableStart: Int32Array.of(0, numBlocks),
    blockTable: Int32Array.from({ length: numBlocks }, (_, i) => i),
    numSampled: Int32Array.of(1),
    runMtp: Uint8Array.of(1),
    numDrafts: Int32Array.of(1),
    temperature: Float32Array.of(0),
    topP: Float32Array.of(1),
    topK: Int32Array.of(0),
    minP: Float32Array.of(0),
    seedLow: Uint32Array.of(0),
    seedHigh: Uint32Array.of(0),
    presencePenalty: Float32Array.of(0),
    frequencyPenalty: Float32Array.of(0),
    repetitionPenalty: Float32Array.of(1),
    numLogprobs: Int32Array.of(2),
    historyStart: Int32Array.of(0, 0),
    historyIds: new Int32Array(),
    historyCounts: new Int32Array(),
    biasStart: Int32Array.of(0, 0),
    maskStart: Int32Array.of(0, 0),
    masks: new Int32Array(0),
    biasIds: new Int32Array(),
    biasValues: new Float32Array(),
    logitRows: Int32Array.of(ids.length - 1),
    draftLogitRows: Int32Array.of(ids.length - 1),
  };
}

test('what the machine offers', () => {
  assert.equal(addon.cpuPaths().at(-1), 'portable');
  assert.ok(addon.devices().usable.includes('cpu'));
  for (const { device, reason } of addon.devices().unusable) assert.ok(device !== 'cpu' && reason.length > 10);
});

test('bytes of one cached token', () => {
  const { spec } = checkpoint;
  const perLayer = spec.kvLoraRank + spec.qkRopeHeadDim;
  const bytes = (compute: 'auto' | 'float32', loadMtp: boolean) =>
    addon.cacheBytesPerToken({ spec, compute, device: 'cpu', kvCacheDtype: 'auto', loadMtp });
  assert.equal(bytes('auto', false), spec.numHiddenLayers * perLayer * 2);
  assert.equal(bytes('auto', true), (spec.numHiddenLayers + 1) * perLayer * 2);
  assert.equal(bytes('float32', false), spec.numHiddenLayers * perLayer * 4);
  assert.throws(() => addon.cacheBytesPerToken({} as never), /options\.spec must be an object/);
  const options = { spec, compute: 'auto' as const, device: 'cpu', kvCacheDtype: 'auto' as const, loadMtp: true };
  assert.throws(() => addon.cacheBytesPerToken({ ...options, device: 'tpu' }), /tpu/);
  assert.throws(() => addon.cacheBytesPerToken({ ...options, kvCacheDtype: 'fp8' }), /--kv-cache-dtype fp8/);
});

test('options are checked one by one', () => {
  const refused: [unknown, RegExp][] = [
    [undefined, /options must be an object/],
    [null, /options must be an object/],
    [[], /options must be an object/],
    [{}, /options\.spec must be an object/],
    [{ ...OPTIONS, spec: { ...OPTIONS.spec, vocabSize: '1024' } }, /options\.spec\.vocabSize must be a number/],
    [{ ...OPTIONS, spec: { ...OPTIONS.spec, hiddenSize: 1.5 } }, /hiddenSize must be an integer/],
    [{ ...OPTIONS, spec: { ...OPTIONS.spec, ropeTheta: NaN } }, /ropeTheta must be a finite number/],
    [{ ...OPTIONS, spec: { ...OPTIONS.spec, yarn: undefined } }, /yarn must be an object/],
    [{ ...OPTIONS, spec: { ...OPTIONS.spec, weightBlockSize: [128] } }, /weightBlockSize must be null or/],
    [{ ...OPTIONS, numThreads: 0 }, /numThreads is 0/],
    [{ ...OPTIONS, numThreads: -1 }, /numThreads must be an integer of at least 0/],
    [{ ...OPTIONS, numBlocks: 2 ** 60 }, /numBlocks must be an integer/],
    [{ ...OPTIONS, numBlocks: 2 ** 40 }, /numBlocks is 1099511627776/],
    [{ ...OPTIONS, blockSize: 0 }, /blockSize is 0/],
    [{ ...OPTIONS, compute: 'int4' }, /compute is 'int4'/],
    [{ ...OPTIONS, loadMtp: 1 }, /loadMtp must be true or false/],
    [{ ...OPTIONS, tensors: {} }, /tensors must be an array/],
    [{ ...OPTIONS, tensors: [null] }, /tensors\[0\] must be an object/],
    [{ ...OPTIONS, tensors: [{ ...OPTIONS.tensors[0], shape: [-1] }] }, /tensors\[0\]\.shape\[0\] must be an integer/],
  ];
  for (const [options, message] of refused) assert.throws(() => addon.createRunner(options as never), message);
});

test('load, step, close', async () => {
  const runner = addon.createRunner(OPTIONS);
  assert.equal(runner.progress().loadedBytes, 0);
  await assert.rejects(runner.step(batchOf(PROMPT)), /not loaded/);
  const info = await runner.load();
  assert.match(info.device, /^cpu \(/);
  assert.ok(info.weightBytes > 0.9 * checkpoint.weightBytes && info.weightBytes <= checkpoint.weightBytes);
  const { spec, blockSize, numBlocks } = OPTIONS;
  const slotBytes = addon.cacheBytesPerToken(OPTIONS);
  assert.equal(info.cacheBytes, slotBytes * blockSize * numBlocks);
  assert.deepEqual(runner.progress(), { loadedBytes: info.weightBytes, totalBytes: info.weightBytes });
  await assert.rejects(runner.load(), /load\(\) was called already/);

  const result = await runner.step(batchOf(PROMPT));
  const logits = Array.from(result.logits);
  assert.equal(logits.length, spec.vocabSize);
  assert.equal(result.draftLogits.length, spec.vocabSize);
  assert.deepEqual(Array.from(result.sampledIds), [logits.indexOf(Math.max(...logits))]);
  assert.deepEqual(Array.from(result.topStart), [0, 2]);
  assert.equal(result.topIds[0], result.sampledIds[0]);
  assert.equal(result.topLogprobs[0], result.sampledLogprobs[0]);
  const logSum = Math.log(logits.reduce((sum, x) => sum + Math.exp(x), 0));
  assert.ok(Math.abs((result.sampledLogprobs[0] ?? NaN) - (Math.max(...logits) - logSum)) < 1e-5);
  assert.deepEqual(Array.from(result.nonFinite), [0]);
  assert.ok(result.stepMicros > 0);

  const first = runner.step(batchOf(PROMPT));
  const second = runner.step(batchOf(PROMPT));
  await assert.rejects(runner.step(batchOf(PROMPT)), /two steps are running/);
  const closed = [runner.close(), runner.close()];
  await assert.rejects(runner.step(batchOf(PROMPT)), /the runner is closed/);
  const order: number[] = [];
  await Promise.all([first, second].map((step, index) => step.then(() => order.push(index))));
  assert.deepEqual(order, [0, 1]);
  assert.deepEqual((await first).logits, result.logits, 'a step before close() is finished');
  assert.deepEqual((await second).logits, result.logits, 'and the one behind it');
  await Promise.all(closed);
  await runner.close();
  await assert.rejects(runner.step(batchOf(PROMPT)), /the runner is closed/);
  await assert.rejects(runner.load(), /the runner is closed/);
  assert.equal(runner.progress().totalBytes, info.weightBytes);
});

test('a token id below 0 is what a row of the step before has sampled', async (t) => {
  const runner = await loadRunner(t);
  const plain = { runMtp: Uint8Array.of(0), numDrafts: Int32Array.of(0), draftLogitRows: new Int32Array() };
  const prompt = { ...batchOf(PROMPT), ...plain };
  const at = PROMPT.length;
  const next = (id: number): StepBatch => ({
    ...batchOf([...PROMPT, 0]),
    ...plain,
    tokenIds: Int32Array.of(id),
    positions: Int32Array.of(at),
    slotMapping: Int32Array.of(at),
    qStart: Int32Array.of(0, 1),
    logitRows: Int32Array.of(0),
  });
  const { sampledIds } = await runner.step(prompt);
  const known = await runner.step(next(sampledIds[0]!));
  const [, ahead] = await Promise.all([runner.step(prompt), runner.step(next(-1))]);
  assert.deepEqual(ahead.logits, known.logits);
  assert.deepEqual(ahead.sampledIds, known.sampledIds);
  const mtp = { ...next(-1), runMtp: Uint8Array.of(1) };
  await assert.rejects(runner.step(mtp), /token_ids\[0\] is -1, outside 0/, 'the MTP module needs the token');
  await assert.rejects(runner.step(next(-1)), /no row of the step before, which had 0/, 'a step that failed has none');
  await runner.step(prompt);
  await assert.rejects(runner.step(next(-2)), /no row of the step before, which had 1/);
});

test('a head made FP8 has half the bytes, and logits near those of the checkpoint', async (t) => {
  const plain = await loadRunner(t);
  const runner = addon.createRunner({ ...OPTIONS, headDtype: 'fp8' });
  t.after(() => runner.close());
  const { weightBytes } = await runner.load();
  const head = OPTIONS.tensors.find(({ name }) => name === 'lm_head.weight') ?? OPTIONS.tensors[0]!;
  assert.ok(weightBytes < checkpoint.weightBytes - 0.4 * head.bytes, `${weightBytes} of ${checkpoint.weightBytes}`);
  const [exact, rounded] = [await plain.step(batchOf(PROMPT)), await runner.step(batchOf(PROMPT))];
  for (const name of ['logits', 'draftLogits'] as const) {
    const square = (values: Float32Array) => values.reduce((sum, x) => sum + x * x, 0);
    const error = Math.sqrt(square(rounded[name].map((x, i) => x - exact[name][i]!)) / square(exact[name]));
    assert.ok(error > 1e-3 && error < 0.04, `${name}: ${error}`);
  }
  assert.deepEqual(rounded.sampledIds, exact.sampledIds);
  assert.throws(() => addon.createRunner({ ...OPTIONS, headDtype: 'int8' as never }), /headDtype is 'int8'/);
});

test('close without load, and a load that fails', async () => {
  await addon.createRunner(OPTIONS).close();
  const [tensor] = OPTIONS.tensors;
  assert.ok(tensor);
  const broken = addon.createRunner({ ...OPTIONS, tensors: [{ ...tensor, file: '/nonexistent/model.safetensors' }] });
  await assert.rejects(broken.load(), /./);
  await assert.rejects(broken.step(batchOf(PROMPT)), /not loaded/);
  await broken.close();
});

test('a bad batch is refused with a sentence and disturbs nothing', async (t) => {
  const runner = await loadRunner(t);
  const expected = await runner.step(batchOf(PROMPT));
  const refused: [unknown, RegExp][] = [
    [undefined, /batch must be an object/],
    [{}, /batch\.tokenIds must be an Int32Array/],
    [{ ...batchOf(PROMPT), tokenIds: PROMPT }, /batch\.tokenIds must be an Int32Array/],
    [{ ...batchOf(PROMPT), temperature: new Float64Array(1) }, /batch\.temperature must be a Float32Array/],
    [{ ...batchOf(PROMPT), tokenIds: Int32Array.from(PROMPT, () => 1024) }, /token_ids\[0\] is 1024/],
    [{ ...batchOf(PROMPT), tokenIds: Int32Array.from(PROMPT, () => -1) }, /token_ids\[0\] is -1/],
    [{ ...batchOf(PROMPT), blockTable: Int32Array.of(0, 16) }, /block_table\[1\] is 16/],
    [{ ...batchOf(PROMPT), slotMapping: Int32Array.from(PROMPT, () => 2 ** 31 - 1) }, /slot_mapping\[0\]/],
    [{ ...batchOf(PROMPT), numSampled: Int32Array.of(14) }, /num_sampled\[0\] is 14/],
    [{ ...batchOf(PROMPT), draftLogitRows: Int32Array.of(0) }, /draft_logit_rows/],
    [batchOf(Array.from({ length: 33 }, () => 5)), /33 tokens/],
  ];
  for (const [batch, message] of refused) await assert.rejects(runner.step(batch as StepBatch), message);
  const error = new Error('from a getter');
  const throwing = Object.defineProperty(batchOf(PROMPT), 'positions', {
    get() {
      throw error;
    },
  });
  await assert.rejects(runner.step(throwing), error);
  const detached = batchOf(PROMPT);
  structuredClone(null, { transfer: [detached.tokenIds.buffer as ArrayBuffer] });
  await assert.rejects(runner.step(detached), /0 tokens/);
  assert.deepEqual((await runner.step(batchOf(PROMPT))).logits, expected.logits);
});

test('500 randomly damaged batches neither crash nor spoil the next step', async (t) => {
  const runner = await loadRunner(t);
  const expected = await runner.step(batchOf(PROMPT));
  let state = 1;
  const random = (limit: number) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * limit);
  };
  const VALUES = [-1, 0, 1, 2, 7, 13, 16, 127, 1023, 1024, 65535, 2 ** 31 - 1, -(2 ** 31), NaN, Infinity, 1e-40];
  let numRun = 0;
  for (let i = 0; i < 500; i++) {
    const batch = batchOf(PROMPT);
    const names = Object.keys(batch) as (keyof StepBatch)[];
    for (let damage = random(3); damage >= 0; damage--) {
      const name = names[random(names.length)];
      assert.ok(name);
      const array = batch[name];
      const value = VALUES[random(VALUES.length)] ?? 0;
      const how = random(3);
      if (how === 0 && array.length > 0) array[random(array.length)] = value;
      else if (how === 1) Object.assign(batch, { [name]: array.slice(0, random(array.length + 1)) });
      else Object.assign(batch, { [name]: new (array.constructor as Int32ArrayConstructor)([...array, value]) });
    }
    try {
      await runner.step(batch);
      numRun++;
    } catch (error) {
      assert.ok(error instanceof Error && error.message.length > 10);
    }
  }
  assert.ok(numRun > 5 && numRun < 400, `${numRun} of 500 ran`);
  assert.deepEqual((await runner.step(batchOf(PROMPT))).logits, expected.logits);
});

/** Runs `code` in a new Node process; resolves with its exit code or signal and what it printed. */
async function runChild(code: string): Promise<{ end: number | string | null; output: string }> {
  const entries = Object.entries(batchOf(PROMPT)) as [string, StepBatch[keyof StepBatch]][];
  const plain = entries.map(([name, array]) => [name, array.constructor.name, Array.from(array)]);
  const prelude = `
    const addon = require(${JSON.stringify(ADDON_PATH)});
    const options = ${JSON.stringify(OPTIONS)};
    const plain = ${JSON.stringify(plain)};
    const batch = () => Object.fromEntries(plain.map(([name, type, values]) => [name, globalThis[type].from(values)]));
    const runner = addon.createRunner(options);
  `;
  const child = spawn(process.execPath, ['-'], { stdio: 'pipe' });
  child.stdin.end(prelude + code);
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
  child.stderr.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const timer = setTimeout(() => child.kill('SIGKILL'), 20_000);
  const end = await new Promise<number | string | null>((resolve) =>
    child.on('close', (exitCode, signal) => resolve(exitCode ?? signal)),
  );
  clearTimeout(timer);
  return { end, output };
}

const EXITS: [string, string][] = [
  ['with a runner that did nothing', `console.log('end')`],
  ['with an idle runner', `runner.load().then(() => console.log('end'))`],
  [
    'in the middle of a step',
    `runner.load().then(() => { runner.step(batch()); console.log('end'); setImmediate(() => process.exit(0)); })`,
  ],
  ['in the middle of loading', `runner.load(); console.log('end'); setTimeout(() => process.exit(0), 1)`],
  ['in the middle of closing', `runner.load().then(() => { runner.close(); console.log('end'); process.exit(0); })`],
  [
    'with collected runners',
    `(async () => { for (let i = 0; i < 5; i++) { const r = addon.createRunner(options); await r.load(); await r.step(batch()); }
     gc(); await new Promise((resolve) => setTimeout(resolve, 10)); gc(); console.log('end'); })()`,
  ],
];

for (const [when, code] of EXITS) {
  test(`a process that never closes its runner exits cleanly ${when}`, async () => {
    const collect = `require('node:v8').setFlagsFromString('--expose-gc'); globalThis.gc = require('node:vm').runInNewContext('gc');`;
    assert.deepEqual(await runChild(collect + code), { end: 0, output: 'end\n' });
  });
}

test('an addon loaded in a worker thread ends with it', async () => {
  const code = `
    const { Worker } = require('node:worker_threads');
    const source = 'const addon = require(' + JSON.stringify(${JSON.stringify(ADDON_PATH)}) + ');' +
      'const runner = addon.createRunner(' + JSON.stringify(options) + ');' +
      'runner.load().then(() => require("node:worker_threads").parentPort.postMessage("loaded"));' +
      'setInterval(() => {}, 1000);';
    const worker = new Worker(source, { eval: true });
    worker.on('message', async () => { await worker.terminate(); console.log('end'); });
  `;
  assert.deepEqual(await runChild(code), { end: 0, output: 'end\n' });
});
