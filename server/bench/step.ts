/** `rodin bench step`: how long a step of the runner takes, beside what the machine could do in the same run. */
import type { BenchConfig } from '../config.js';
import type { Ceilings, NativeAddon, NativeRunner, RunnerOptions } from '../engine/addon.js';
import { loadAddon } from '../engine/load-addon.js';
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
  numSteps: number;
  /** the least that other programs have interrupted */
  minMs: number;
  medianMs: number;
  p90Ms: number;
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
    const traffic = new TrafficModel(spec, tensors, cacheBytesPerToken);
    const cases: BenchCase[] = [];
    for (const numSequences of config.batches) {
      const micros = await timeSteps((step) =>
        runner.step(decodeBatch(numSequences, config.context, spec.vocabSize, BLOCK_SIZE, blocksPerSequence, step)),
      );
      cases.push(caseOf('decode', { numSequences, numTokens: 1, context: config.context }, micros, traffic, ceilings));
    }
    if (config.prompt > 0) {
      const micros = await timeSteps((step) =>
        runner.step(prefillBatch(0, config.prompt, 0, spec.vocabSize, BLOCK_SIZE, step)),
      );
      const step = { numSequences: 1, numTokens: config.prompt, context: 0 };
      cases.push(caseOf('prefill', step, micros, traffic, ceilings));
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

/** Microseconds on the engine thread, ascending. */
async function timeSteps(runStep: (step: number) => Promise<{ stepMicros: number }>): Promise<number[]> {
  const micros: number[] = []; // [num_steps]
  let end = Infinity;
  for (let step = 0; step < MAX_STEPS + WARM_UP_STEPS; step++) {
    const { stepMicros } = await runStep(step);
    if (step < WARM_UP_STEPS) continue;
    if (micros.length === 0) end = performance.now() + CASE_MS;
    micros.push(stepMicros);
    if (micros.length >= MIN_STEPS && performance.now() > end) break;
  }
  return micros.sort((a, b) => a - b);
}

function caseOf(
  kind: BenchCase['kind'],
  step: Step,
  micros: number[],
  traffic: TrafficModel,
  ceilings: Ceilings,
): BenchCase {
  const at = (share: number): number => micros[Math.ceil(share * micros.length) - 1]!;
  const perSecond = 1e6 / at(0.5);
  const { bytes, flops } = traffic.of(step);
  const shareOf = (value: number, ceiling: number): number | null => (ceiling > 0 ? value / ceiling : null);
  return {
    kind,
    ...step,
    numSteps: micros.length,
    minMs: micros[0]! / 1000,
    medianMs: at(0.5) / 1000,
    p90Ms: at(0.9) / 1000,
    tokensPerSecond: step.numSequences * step.numTokens * perSecond,
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
