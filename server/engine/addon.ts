/** The native addon as TypeScript sees it. The implementation is addon/node. */
import type { ModelSpec, TensorEntry } from '../model/spec.js';
import type { StepBatch, StepResult } from './step-batch.js';

export type ComputeMode = 'float32' | 'auto';
/** of the latent cache; 'auto' is the device's own: bf16 on a GPU */
export type KvCacheDtype = 'auto' | 'bf16' | 'fp8';
/** of the language-model heads; 'auto' is the checkpoint's */
export type HeadDtype = 'auto' | 'fp8';

export interface RunnerOptions {
  spec: ModelSpec;
  tensors: TensorEntry[];
  /** 'cpu' or 'cuda:0' */
  device: string;
  /** 'float32' is the readable oracle, 'auto' the fast path of the device */
  compute: ComputeMode;
  /** 'auto' | 'amxbf16' | 'avx512bf16' | 'avx512' | 'avx2' | 'portable': forces a CPU path (tests); ignored elsewhere */
  cpuPath: string;
  /** compute threads, the engine thread included */
  numThreads: number;
  blockSize: number;
  /** blocks of the latent cache; the most of them where gpuMemoryUtilization is not 0 */
  numBlocks: number;
  /** 0, or the share of the GPU's memory that weights, workspace and cache take: the cache gets what is left of it */
  gpuMemoryUtilization: number;
  /** the CPU takes 'auto' alone */
  kvCacheDtype: KvCacheDtype;
  /** 'fp8': made e4m3 with scales of 128x128 blocks while loading */
  headDtype: HeadDtype;
  /** a GPU computes a row by the same kernels whatever the batch; a CPU always does */
  deterministic: boolean;
  /** most tokens in one step: sizes the workspace */
  maxStepTokens: number;
  /** most sequences in one step */
  maxNumSeqs: number;
  /** load the MTP module's weights and give it a cache */
  loadMtp: boolean;
}

export interface RunnerInfo {
  /** e.g. 'cpu (avx512)' */
  device: string;
  numBlocks: number;
  weightBytes: number;
  cacheBytes: number;
  workspaceBytes: number;
}

export interface NativeRunner {
  /** Maps and checks the weights, allocates cache and workspace. Rejects with one sentence. */
  load(): Promise<RunnerInfo>;
  /** bytes of weights made ready so far; readable at any time */
  progress(): { loadedBytes: number; totalBytes: number };
  /**
   * Runs one step on the engine thread. At most two may be under way, and end in order; a GPU goes on with the second at
   * once. Typed arrays are copied before it returns. Where it rejects with the code DEVICE_LOST, no later call can
   * succeed.
   */
  step(batch: StepBatch): Promise<StepResult>;
  /** Ends the engine thread and unmaps everything. Idempotent. */
  close(): Promise<void>;
}

export interface Ceilings {
  /** of memory that no cache holds */
  readBytesPerSecond: number;
  /** of the products that a linear layer is made of; a multiply-add counts as two */
  flopsPerSecond: number;
}

/** One op at one shape; what does not belong to it is 0. */
export interface OpCase extends Pick<RunnerOptions, 'device' | 'compute' | 'cpuPath' | 'numThreads' | 'kvCacheDtype'> {
  op: 'norm' | 'linear' | 'moe' | 'attention';
  /** attention: one of each of so many sequences */
  numTokens: number;
  /** of the weights */
  dtype: 'F8_E4M3' | 'BF16';
  /** linear: outputs */
  rows: number;
  /** norm: the row's length; linear: inputs */
  cols: number;
  /** attention: positions of every sequence */
  context: number;
  /** moe, attention: the layer's shape */
  spec: ModelSpec;
  minSeconds: number;
}

export interface OpTiming {
  /** of one call, each the mean of a run of them; rising */
  micros: number[];
  /** |out - oracle| / |oracle| */
  relativeError: number;
  /** sets of weights and caches used in turn, so that no cache holds them */
  copies: number;
}

export interface NativeAddon {
  createRunner(options: RunnerOptions): NativeRunner;
  /** bytes one token takes in the latent cache over all layers (MTP included if loaded), before anything is allocated */
  cacheBytesPerToken(options: Pick<RunnerOptions, 'spec' | 'compute' | 'device' | 'kvCacheDtype' | 'loadMtp'>): number;
  /** devices usable on this machine, best first, and why others are not */
  devices(): { usable: string[]; unusable: { device: string; reason: string }[] };
  /**
   * What a device can do at most, measured now: it takes seconds and blocks. 0: the device does not measure that.
   */
  ceilings(options: Pick<RunnerOptions, 'device' | 'compute' | 'cpuPath' | 'numThreads'>): Ceilings;
  /** Times one op with synthetic weights and compares it with the oracle; it takes seconds and blocks. */
  timeOp(options: OpCase): OpTiming;
  /** CPU paths this machine can run, best first */
  cpuPaths(): string[];
}

export function isDeviceLost(error: unknown): boolean {
  return (error as { code?: unknown }).code === 'DEVICE_LOST';
}

/** What the scheduler's loop needs of a runner; tests give a fake one. */
export type StepRunner = Pick<NativeRunner, 'step' | 'close'>;
