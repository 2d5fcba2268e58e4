import { join } from 'node:path';
import { StartupError } from '../errors.js';
import { GrammarThread } from '../grammar/thread.js';
import { usableMemory } from '../machine.js';
import type { ModelSpec } from '../model/spec.js';
import { readWeights } from '../model/synthetic.js';
import { AdaptiveDrafts } from './adaptive-drafts.js';
import type { ComputeMode, HeadDtype, KvCacheDtype, NativeAddon, NativeRunner, RunnerOptions } from './addon.js';
import { chooseDevice } from './device.js';
import { FixedDrafts, type DraftPolicy } from './draft-policy.js';
import { Engine } from './engine.js';
import { warmUp } from './warm-up.js';

/** Everything an engine is started with: plain values, so that it can be sent to the engine process. */
export interface EngineConfig {
  /** checkpoint folder */
  model: string;
  /** synthetic: random ones of the shape that the folder's config.json describes; the checkpoint's where it is left out */
  weights?: 'checkpoint' | 'synthetic';
  /** 'auto' or one of the addon's usable devices */
  device: string;
  compute: ComputeMode;
  /** 'auto' | 'amxbf16' | 'avx512bf16' | 'avx512' | 'avx2' | 'portable' */
  cpuPath: string;
  numThreads: number;
  blockSize: number;
  /** bytes for the latent cache; null: on the CPU what is of use, at most half of the free memory */
  cacheMemory: number | null;
  /** GPU: share of its memory for weights, workspace and cache; null: the usual one, where cacheMemory is null too */
  gpuMemoryUtilization: number | null;
  kvCacheDtype: KvCacheDtype;
  /** of the language-model heads; the checkpoint's where it is left out */
  headDtype?: HeadDtype;
  /** the same bits in any batch on a GPU too */
  deterministic: boolean;
  /** most tokens of one sequence; null: what the checkpoint and the cache allow */
  maxModelLen: number | null;
  /** null: 512, on a GPU 2048 */
  maxStepTokens: number | null;
  maxNumSeqs: number;
  /** requests that may wait beyond maxNumSeqs */
  maxQueue: number;
  /** tell what changes in the prefix cache; false where it is left out */
  hasCacheEvents?: boolean;
  /** launch steps ahead; on a GPU where it is left out */
  launchAhead?: boolean;
  /** drafts of the MTP module a step; 'auto' adapts them, and is 0 where the checkpoint has no such module */
  speculativeTokens: number | 'auto';
}

export type LoadProgress = (loadedBytes: number, totalBytes: number) => void;

const PROGRESS_INTERVAL_MS = 100;
const GPU_MEMORY_UTILIZATION = 0.92;
/** Larger chunks delay running streams more than they gain. */
const CPU_STEP_TOKENS = 512;
const GPU_STEP_TOKENS = 2048;

/** Reads the checkpoint, loads the weights and returns an engine that has computed one token already. */
export async function startEngine(
  addon: NativeAddon,
  config: EngineConfig,
  onProgress: LoadProgress = () => {},
): Promise<Engine> {
  const { compute, cpuPath, numThreads, blockSize, maxNumSeqs, maxModelLen } = config;
  const checkpoint = readWeights(config.model, config.weights ?? 'checkpoint');
  const { spec, tensors } = checkpoint;
  if (maxModelLen !== null && maxModelLen > spec.maxPositionEmbeddings) {
    throw new StartupError(
      `--max-model-len is ${maxModelLen}; the checkpoint has ${spec.maxPositionEmbeddings} positions (max_position_embeddings).`,
    );
  }
  const { device, note } = chooseDevice(addon, config.device, compute);
  const maxStepTokens = config.maxStepTokens ?? (device === 'cpu' ? CPU_STEP_TOKENS : GPU_STEP_TOKENS);
  if (maxStepTokens < maxNumSeqs) {
    throw new StartupError(
      `--max-step-tokens is ${maxStepTokens}; it must be at least --max-num-seqs, which is ${maxNumSeqs}.`,
    );
  }
  const launchAhead = config.launchAhead ?? device !== 'cpu';
  const drafts = draftPolicy(config.speculativeTokens, spec, launchAhead);
  const loadMtp = drafts.isOn;
  const cache = planCache(addon, config, { spec, device, loadMtp });
  const options: RunnerOptions = {
    spec,
    tensors,
    device,
    compute,
    cpuPath,
    numThreads,
    blockSize,
    ...cache,
    headDtype: config.headDtype ?? 'auto',
    deterministic: config.deterministic,
    maxStepTokens,
    maxNumSeqs,
    loadMtp,
  };
  if (cache.gpuMemoryUtilization === 0) checkFits(maxModelLen, cache.numBlocks * blockSize, '--cache-memory');
  const { runner, info } = await loadRunner(addon, options, onProgress);
  const { numBlocks } = info;
  try {
    checkFits(maxModelLen, numBlocks * blockSize, '--gpu-memory-utilization');
  } catch (error) {
    await runner.close();
    throw error;
  }
  await warmUp(runner, checkpoint, { ...options, numBlocks }, drafts instanceof AdaptiveDrafts ? drafts : null);
  return new Engine(runner, {
    blockSize,
    numBlocks,
    maxStepTokens,
    maxNumSeqs,
    fingerprint: checkpoint.fingerprint,
    drafts,
    launchAhead,
    hasCacheEvents: config.hasCacheEvents === true,
    grammars: new GrammarThread({
      tokenizer: join(checkpoint.folder, 'tokenizer.json'),
      vocabSize: spec.vocabSize,
    }),
    info: { ...info, ...(note === undefined ? {} : { deviceNote: note }) },
    limits: {
      vocabSize: spec.vocabSize,
      maxContext: Math.min(maxModelLen ?? spec.maxPositionEmbeddings, numBlocks * blockSize),
      maxOpen: maxNumSeqs + config.maxQueue,
    },
  });
}

/** Who drafts: nobody without an MTP module. */
export function draftPolicy(
  speculativeTokens: number | 'auto',
  { numMtpLayers }: ModelSpec,
  launchesAhead = false,
): DraftPolicy {
  if (speculativeTokens === 'auto') return numMtpLayers > 0 ? new AdaptiveDrafts(launchesAhead) : new FixedDrafts(0);
  if (speculativeTokens === 0 || numMtpLayers > 0) return new FixedDrafts(speculativeTokens);
  throw new StartupError(
    `--speculative-tokens is ${speculativeTokens} but the checkpoint has no MTP layer (num_nextn_predict_layers); give 0 or auto.`,
  );
}

/** Slots are int32 in a step batch. */
const MAX_SLOTS = 2 ** 31 - 1;

/** Blocks that fit into a number of bytes. */
export function countBlocks(cacheMemory: number, blockBytes: number, blockSize: number): number {
  const numBlocks = Math.min(Math.floor(cacheMemory / blockBytes), Math.floor(MAX_SLOTS / blockSize));
  if (numBlocks >= 1) return numBlocks;
  throw new StartupError(
    `The latent cache has ${cacheMemory} bytes; one block of ${blockSize} tokens alone takes ${blockBytes}. Raise --cache-memory.`,
  );
}

function checkFits(maxModelLen: number | null, numTokens: number, flag: string): void {
  if (maxModelLen === null || maxModelLen <= numTokens) return;
  throw new StartupError(
    `--max-model-len is ${maxModelLen} but the latent cache holds ${numTokens} tokens; raise ${flag}.`,
  );
}

/** What the latent cache may take: a number of blocks, or on a GPU a share of its memory. */
function planCache(
  addon: NativeAddon,
  config: EngineConfig,
  { spec, device, loadMtp }: Pick<RunnerOptions, 'spec' | 'device' | 'loadMtp'>,
): Pick<RunnerOptions, 'numBlocks' | 'gpuMemoryUtilization' | 'kvCacheDtype'> {
  const { compute, blockSize, cacheMemory, maxModelLen, gpuMemoryUtilization, kvCacheDtype } = config;
  if (device === 'cpu' && kvCacheDtype !== 'auto') {
    throw new StartupError(`--kv-cache-dtype ${kvCacheDtype} needs a GPU; leave it out on the CPU.`);
  }
  if (device === 'cpu' && gpuMemoryUtilization !== null) {
    throw new StartupError('--gpu-memory-utilization needs a GPU; on the CPU give --cache-memory.');
  }
  if (cacheMemory !== null && gpuMemoryUtilization !== null) {
    throw new StartupError('--cache-memory and --gpu-memory-utilization both size the latent cache; give one of them.');
  }
  const fixed = (numBlocks: number) => ({ numBlocks, gpuMemoryUtilization: 0, kvCacheDtype });
  const blockBytes = addon.cacheBytesPerToken({ spec, compute, device, kvCacheDtype, loadMtp }) * blockSize;
  if (cacheMemory !== null) return fixed(countBlocks(cacheMemory, blockBytes, blockSize));
  if (device !== 'cpu') {
    const numBlocks = Math.floor(MAX_SLOTS / blockSize);
    return { numBlocks, gpuMemoryUtilization: gpuMemoryUtilization ?? GPU_MEMORY_UTILIZATION, kvCacheDtype };
  }
  // As much as all sequences at full length could use, but at most half of what is free now.
  const usefulBlocks = config.maxNumSeqs * Math.ceil((maxModelLen ?? spec.maxPositionEmbeddings) / blockSize);
  return fixed(countBlocks(Math.min(usefulBlocks * blockBytes, Math.floor(usableMemory() / 2)), blockBytes, blockSize));
}

/** Creates and loads a runner, reporting progress; whatever it refuses becomes a StartupError. */
export async function loadRunner(
  addon: NativeAddon,
  options: RunnerOptions,
  onProgress: LoadProgress = () => {},
): Promise<{ runner: NativeRunner; info: Awaited<ReturnType<NativeRunner['load']>> }> {
  try {
    const runner = addon.createRunner(options);
    const report = () => {
      const { loadedBytes, totalBytes } = runner.progress();
      onProgress(loadedBytes, totalBytes);
    };
    const timer = setInterval(report, PROGRESS_INTERVAL_MS);
    try {
      return { runner, info: await runner.load() };
    } finally {
      clearInterval(timer);
      report();
    }
  } catch (error) {
    throw new StartupError((error as Error).message);
  }
}
