/** `rodin bench ops`: the ops of a step one by one at a model's shapes, beside what the machine could do. */
import type { BenchConfig } from '../config.js';
import type { Ceilings, NativeAddon, OpCase } from '../engine/addon.js';
import { chooseDevice } from '../engine/device.js';
import { loadAddon } from '../engine/load-addon.js';
import { StartupError } from '../errors.js';
import { usableCores, usableMemory } from '../machine.js';
import type { ModelSpec, TensorEntry } from '../model/spec.js';
import { readSyntheticModel } from '../model/synthetic.js';
import { formatTable, gb, known, percent, tera } from './table.js';

const CASE_SECONDS = 0.1;
const BF16 = 2;

/** What an op must read or write at least, and compute; a multiply-add counts as two. */
interface Cost {
  bytes: number;
  flops: number;
}

export interface OpReportCase extends Cost {
  name: string;
  numTokens: number;
  /** null: `skipped` says why it was not timed */
  medianMicros: number | null;
  minMicros: number | null;
  bytesPerSecond: number | null;
  /** of the ceiling; null where the device does not measure it */
  bandwidthShare: number | null;
  flopsPerSecond: number | null;
  flopsShare: number | null;
  /** |out - oracle| / |oracle| */
  relativeError: number | null;
  skipped: string | null;
}

export interface OpsReport {
  model: string;
  device: string;
  numThreads: number;
  ceilings: Ceilings;
  cases: OpReportCase[];
}

interface PlannedCase extends Cost {
  name: string;
  op: Pick<OpCase, 'op' | 'numTokens' | 'dtype' | 'rows' | 'cols' | 'context'>;
  /** of the weights that the case keeps */
  memory: number;
}

export function runBenchOps(config: BenchConfig, addon: NativeAddon = loadAddon()): OpsReport {
  if (config.layers !== null) throw new StartupError('--layers belongs to `rodin bench step`: an op has no layers.');
  const { spec, tensors } = readSyntheticModel(config.model, null);
  if (spec.kvLoraRank === 0) {
    throw new StartupError(
      `rodin bench ops takes models with multi-head latent attention; ${config.model} is of type ${spec.modelType}.`,
    );
  }
  const backend = {
    device: chooseDevice(addon, config.device, config.compute).device,
    compute: config.compute,
    cpuPath: config.cpuPath,
    numThreads: config.threads ?? usableCores(),
    kvCacheDtype: config.kvCacheDtype,
  };
  const ceilings = addon.ceilings(backend);
  const cases = planCases(spec, tensors, config).map((planned): OpReportCase => {
    const { name, op, bytes, flops, memory } = planned;
    const head = { name, numTokens: op.numTokens, bytes, flops };
    // Weights are made in the host's memory; a CPU may keep a packed copy beside them.
    if (2 * memory > usableMemory()) return { ...head, ...NOT_TIMED, skipped: `needs ${gb(2 * memory)} GB of memory` };
    const { micros, relativeError } = addon.timeOp({ ...backend, ...op, spec, minSeconds: CASE_SECONDS });
    const medianMicros = micros[Math.floor(micros.length / 2)]!;
    const bytesPerSecond = (bytes / medianMicros) * 1e6;
    const flopsPerSecond = (flops / medianMicros) * 1e6;
    const shareOf = (value: number, ceiling: number): number | null => (ceiling > 0 ? value / ceiling : null);
    return {
      ...head,
      medianMicros,
      minMicros: micros[0]!,
      bytesPerSecond,
      bandwidthShare: shareOf(bytesPerSecond, ceilings.readBytesPerSecond),
      flopsPerSecond,
      flopsShare: shareOf(flopsPerSecond, ceilings.flopsPerSecond),
      relativeError,
      skipped: null,
    };
  });
  return { model: config.model, device: backend.device, numThreads: backend.numThreads, ceilings, cases };
}

const NOT_TIMED = {
  medianMicros: null,
  minMicros: null,
  bytesPerSecond: null,
  bandwidthShare: null,
  flopsPerSecond: null,
  flopsShare: null,
  relativeError: null,
};

/** Every op for each number of tokens; attention for decode steps alone. */
function planCases(spec: ModelSpec, tensors: readonly TensorEntry[], config: BenchConfig): PlannedCase[] {
  const counts = [...new Set([...config.batches, ...(config.prompt > 0 ? [config.prompt] : [])])];
  const layer = spec.numHiddenLayers - 1;
  const cases: PlannedCase[] = [];
  for (const numTokens of counts) {
    const isDecode = config.batches.includes(numTokens);
    cases.push(normCase(spec, numTokens));
    for (const part of ['q_a_proj', 'q_b_proj', 'q_proj', 'kv_a_proj_with_mqa', 'o_proj']) {
      const tensor = tensors.find(({ name }) => name === `model.layers.${layer}.self_attn.${part}.weight`);
      if (tensor) cases.push(linearCase(part, tensor, numTokens));
    }
    const head = tensors.find(({ name }) => name === 'lm_head.weight');
    if (head && isDecode) cases.push(linearCase('lm_head', head, numTokens));
    if (spec.numRoutedExperts > 0) cases.push(moeCase(spec, numTokens));
    if (isDecode && config.context > 0) cases.push(attentionCase(spec, config, numTokens));
  }
  return cases;
}

function normCase({ hiddenSize: cols }: ModelSpec, numTokens: number): PlannedCase {
  return {
    name: `add_rms_norm ${cols}`,
    op: { op: 'norm', numTokens, dtype: 'BF16', rows: 0, cols, context: 0 },
    bytes: numTokens * cols * (4 + 4 + BF16 + BF16),
    flops: 0,
    memory: 4 * cols,
  };
}

function linearCase(name: string, { shape, dtype }: TensorEntry, numTokens: number): PlannedCase {
  const [rows, cols] = shape as [number, number];
  const isFp8 = dtype === 'F8_E4M3';
  const weightBytes = rows * cols * (isFp8 ? 1 : BF16);
  return {
    name: `${name} ${rows}x${cols} ${isFp8 ? 'fp8' : 'bf16'}`,
    op: { op: 'linear', numTokens, dtype: isFp8 ? 'F8_E4M3' : 'BF16', rows, cols, context: 0 },
    bytes: weightBytes + BF16 * numTokens * (rows + cols),
    flops: 2 * rows * cols * numTokens,
    memory: Math.max(2 * weightBytes, Math.min(64 * weightBytes, 2 ** 28)),
  };
}

/** Experts are taken to be chosen uniformly. */
function moeCase(spec: ModelSpec, numTokens: number): PlannedCase {
  const { hiddenSize, moeIntermediateSize, numRoutedExperts, numExpertsPerToken, numSharedExperts } = spec;
  const size = spec.weightBlockSize === null ? BF16 : 1;
  const expert = 3 * hiddenSize * moeIntermediateSize;
  const hit = numRoutedExperts * (1 - (1 - numExpertsPerToken / numRoutedExperts) ** numTokens);
  const router = numRoutedExperts * hiddenSize;
  return {
    name: `moe ${numRoutedExperts} of ${moeIntermediateSize}x${hiddenSize} ${size === 1 ? 'fp8' : 'bf16'}`,
    op: { op: 'moe', numTokens, dtype: size === 1 ? 'F8_E4M3' : 'BF16', rows: 0, cols: hiddenSize, context: 0 },
    bytes: expert * size * (hit + numSharedExperts) + BF16 * router + 2 * BF16 * numTokens * hiddenSize,
    flops: 2 * numTokens * (expert * (numExpertsPerToken + numSharedExperts) + router),
    memory: expert * size * (numRoutedExperts + numSharedExperts),
  };
}

/** W_UK, the latents of every position once, W_UV. */
function attentionCase(spec: ModelSpec, config: BenchConfig, numTokens: number): PlannedCase {
  const { numAttentionHeads: heads, kvLoraRank, qkRopeHeadDim, qkNopeHeadDim, vHeadDim } = spec;
  const size = spec.weightBlockSize === null ? BF16 : 1;
  const context = Math.max(config.context, 1);
  const isFp8Cache = config.kvCacheDtype === 'fp8';
  const row = isFp8Cache ? kvLoraRank + kvLoraRank / 32 + BF16 * qkRopeHeadDim : BF16 * (kvLoraRank + qkRopeHeadDim);
  const upWeights = heads * (qkNopeHeadDim + vHeadDim) * kvLoraRank;
  return {
    name: `attention ${heads} heads @ ${context}`,
    op: { op: 'attention', numTokens, dtype: size === 1 ? 'F8_E4M3' : 'BF16', rows: 0, cols: 0, context },
    bytes: numTokens * context * row + upWeights * size,
    flops: 2 * numTokens * (heads * context * (2 * kvLoraRank + qkRopeHeadDim) + upWeights),
    memory: 2 * upWeights + Math.max(2 ** 28, 2 * numTokens * context * row),
  };
}

/** The report as text for a terminal. */
export function formatOpsReport(report: OpsReport): string {
  const { ceilings } = report;
  const head = [
    `${report.model}: ops with synthetic weights on ${report.device}, ${report.numThreads} threads`,
    `ceilings: reads ${known(ceilings.readBytesPerSecond, gb)} GB/s, products ${known(ceilings.flopsPerSecond, tera)} TFLOP/s`,
  ];
  const titles = ['op', 'tokens', 'us', 'GB/s', 'of reads', 'TFLOP/s', 'of products', 'error'];
  const rows = report.cases.map((one) => [
    one.name,
    String(one.numTokens),
    ...(one.medianMicros === null
      ? [`- (${one.skipped})`, '', '', '', '', '']
      : [
          one.medianMicros.toFixed(1),
          gb(one.bytesPerSecond!),
          percent(one.bandwidthShare),
          tera(one.flopsPerSecond!),
          percent(one.flopsShare),
          one.relativeError!.toExponential(1),
        ]),
  ]);
  return [...head, '', ...formatTable([titles, ...rows])].join('\n');
}
