/** `rodin bench step`: how long a step of the runner takes, beside what the machine could do in the same run. */
import type { BenchConfig } from '../config.js';
import type { Ceilings, NativeAddon, NativeRunner, RunnerOptions } from '../engine/addon.js';
import { loadAddon } from '../engine/load-addon.js';
import type { StepResult } from '../engine/step-batch.js';
import { chooseDevice } from '../engine/device.js';
import { loadRunner, type LoadProgress } from '../engine/start-engine.js';
import { StartupError } from '../errors.js';
import { usableCores, usableMemory } from '../machine.js';
import { readCheckpoint } from '../model/checkpoint.js';
import { readSyntheticModel, type SyntheticModel } from '../model/synthetic.js';
import { decodeBatch, prefillBatch } from './batch.js';
import { TrafficModel, type Step } from './traffic.js';

const BLOCK_SIZE = 64;
const WARM_UP_STEPS = 3;
const MIN_STEPS = 5;
const MAX_STEPS = 400;
const CASE_MS = 3000;
/** most tokens of one step while a real checkpoint's cache is filled */
const FILL_TOKENS = 512;

export interface BenchCase extends Step {
  kind: 'decode' | 'prefill';
  /** each step was launched before the one ahead of it was over */
  isAhead: boolean;
  numSteps: number;
  /** the least that other programs have interrupted */
  minMs: number;
  medianMs: number;
  p90Ms: number;
  /** from a step's first work on the device to its last, median */
  deviceMs: number;
  /** how long the device waited for a step, median */
  idleMs: number;
  tokensPerSecond: number;
  bytesPerStep: number;
  bytesPerSecond: number;
  /** of the ceiling; null where the device does not measure it */
  bandwidthShare: number | null;
  flopsPerSecond: number;
  flopsShare: number | null;
}

export interface BenchReport {
  model: string;
  weights: 'checkpoint' | 'synthetic';
  numLayers: number;
  device: string;
  numThreads: number;
  weightBytes: number;
  loadSeconds: number;
  ceilings: Ceilings;
  cases: BenchCase[];
}

export async function runBenchStep(
  config: BenchConfig,
  onProgress: LoadProgress = () => {},
  addon: NativeAddon = loadAddon(),
): Promise<BenchReport> {
  const { spec, tensors, weightBytes } = readModel(config);
  const longest = Math.max(config.context + 1, config.prompt);
  if (longest > spec.maxPositionEmbeddings) {
    throw new StartupError(
      `--context and --prompt reach position ${longest}; the model has ${spec.maxPositionEmbeddings} positions.`,
    );
  }
  const mostSequences = Math.max(...config.batches);
  const blocksPerSequence = Math.ceil(longest / BLOCK_SIZE);
  const options: RunnerOptions = {
    spec,
    tensors,
    device: chooseDevice(addon, config.device, config.compute).device,
    compute: config.compute,
    cpuPath: config.cpuPath,
    numThreads: config.threads ?? usableCores(),
    blockSize: BLOCK_SIZE,
    numBlocks: mostSequences * blocksPerSequence,
    gpuMemoryUtilization: 0,
    kvCacheDtype: config.kvCacheDtype,
    headDtype: config.headDtype,
    deterministic: config.deterministic,
    maxStepTokens: Math.max(mostSequences, config.prompt, config.weights === 'checkpoint' ? FILL_TOKENS : 1),
    maxNumSeqs: mostSequences,
    loadMtp: false,
  };
  const cacheBytesPerToken = addon.cacheBytesPerToken(options);
  const needed = weightBytes + cacheBytesPerToken * BLOCK_SIZE * options.numBlocks;
  if (config.weights === 'synthetic' && needed > usableMemory()) {
    throw new StartupError(
      `The weights and the cache take ${gib(needed)}, and ${gib(usableMemory())} of memory is free; take fewer --layers.`,
    );
  }
  const ceilings = addon.ceilings(options);
  const start = performance.now();
  const { runner, info } = await loadRunner(addon, options, onProgress);
  try {
    const loadSeconds = (performance.now() - start) / 1000;
    if (config.weights === 'checkpoint') await fillCache(runner, config, spec.vocabSize, blocksPerSequence);
    const traffic = new TrafficModel(spec, tensors, cacheBytesPerToken, config.headDtype);
    const cases: BenchCase[] = [];
    // As an engine launches them: ahead on a GPU, and one by one where something must be known of the step before.
    const launches = options.device === 'cpu' ? [false] : [true, false];
    for (const numSequences of config.batches) {
      for (const isAhead of launches) {
        const times = await timeSteps(isAhead, (step) =>
          runner.step(decodeBatch(numSequences, config.context, spec.vocabSize, BLOCK_SIZE, blocksPerSequence, step)),
        );
        const step = { numSequences, numTokens: 1, context: config.context };
        cases.push(caseOf({ kind: 'decode', isAhead, ...step }, times, traffic, ceilings));
      }
    }
    if (config.prompt > 0) {
      const times = await timeSteps(false, (step) =>
        runner.step(prefillBatch(0, config.prompt, 0, spec.vocabSize, BLOCK_SIZE, step)),
      );
      const step = { numSequences: 1, numTokens: config.prompt, context: 0 };
      cases.push(caseOf({ kind: 'prefill', isAhead: false, ...step }, times, traffic, ceilings));
    }
    return {
      model: config.model,
      weights: config.weights,
      numLayers: spec.numHiddenLayers,
      device: info.device,
      numThreads: options.numThreads,
      weightBytes: info.weightBytes,
      loadSeconds,
      ceilings,
      cases,
    };
  } finally {
    await runner.close();
  }
}

function readModel(config: BenchConfig): SyntheticModel {
  if (config.weights === 'synthetic') return readSyntheticModel(config.model, config.layers);
  if (config.layers !== null) {
    throw new StartupError('--layers takes a slice of synthetic weights only; give --weights synthetic too.');
  }
  if (config.model.endsWith('.json')) {
    throw new StartupError(`${config.model} has no weights; give --weights synthetic, or a checkpoint folder.`);
  }
  return readCheckpoint(config.model);
}

/** A checkpoint's cache is filled by prefill; with synthetic weights the addon has filled it. */
async function fillCache(runner: NativeRunner, config: BenchConfig, vocabSize: number, blocks: number): Promise<void> {
  for (let sequence = 0; sequence < Math.max(...config.batches); sequence++) {
    for (let first = 0; first < config.context; first += FILL_TOKENS) {
      const count = Math.min(FILL_TOKENS, config.context - first);
      await runner.step(prefillBatch(first, count, sequence * blocks, vocabSize, BLOCK_SIZE, sequence));
    }
  }
}

type StepTimes = Pick<StepResult, 'stepMicros' | 'deviceMicros' | 'idleMicros'>;

/** What each step took. isAhead: the next one is launched before it is over. */
async function timeSteps(isAhead: boolean, runStep: (step: number) => Promise<StepTimes>): Promise<StepTimes[]> {
  const times: StepTimes[] = []; // [num_steps]
  let end = Infinity;
  let running = runStep(0);
  for (let step = 1; step < MAX_STEPS + WARM_UP_STEPS; step++) {
    const next = isAhead ? runStep(step) : null;
    const { stepMicros, deviceMicros, idleMicros } = await running;
    running = next ?? runStep(step);
    if (step <= WARM_UP_STEPS) continue;
    if (times.length === 0) end = performance.now() + CASE_MS;
    times.push({ stepMicros, deviceMicros, idleMicros });
    if (times.length >= MIN_STEPS && performance.now() > end) break;
  }
  await running;
  return times;
}

function caseOf(
  one: Step & Pick<BenchCase, 'kind' | 'isAhead'>,
  times: StepTimes[],
  traffic: TrafficModel,
  ceilings: Ceilings,
): BenchCase {
  const rising = (name: keyof StepTimes) => times.map((time) => time[name]).sort((a, b) => a - b);
  const micros = rising('stepMicros'); // [num_steps]
  const at = (share: number, values = micros): number => values[Math.ceil(share * values.length) - 1]!;
  const perSecond = 1e6 / at(0.5);
  const { bytes, flops } = traffic.of(one);
  const shareOf = (value: number, ceiling: number): number | null => (ceiling > 0 ? value / ceiling : null);
  return {
    ...one,
    numSteps: micros.length,
    minMs: micros[0]! / 1000,
    medianMs: at(0.5) / 1000,
    p90Ms: at(0.9) / 1000,
    deviceMs: at(0.5, rising('deviceMicros')) / 1000,
    idleMs: at(0.5, rising('idleMicros')) / 1000,
    tokensPerSecond: one.numSequences * one.numTokens * perSecond,
    bytesPerStep: Math.round(bytes),
    bytesPerSecond: bytes * perSecond,
    bandwidthShare: shareOf(bytes * perSecond, ceilings.readBytesPerSecond),
    flopsPerSecond: flops * perSecond,
    flopsShare: shareOf(flops * perSecond, ceilings.flopsPerSecond),
  };
}

function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
