import { join } from 'node:path';
import { StartupError } from '../errors.js';
import { GrammarThread } from '../grammar/thread.js';
import { usableMemory } from '../machine.js';
import { readCheckpoint } from '../model/checkpoint.js';
import type { ModelSpec } from '../model/spec.js';
import { AdaptiveDrafts } from './adaptive-drafts.js';
import type { ComputeMode, NativeAddon, NativeRunner, RunnerOptions } from './addon.js';
import { FixedDrafts, type DraftPolicy } from './draft-policy.js';
import { Engine } from './engine.js';
import { warmUp } from './warm-up.js';

/** Everything an engine is started with: plain values, so that it can be sent to the engine process. */
export interface EngineConfig {
  /** checkpoint folder */
  model: string;
  /** 'auto' or one of the addon's usable devices */
  device: string;
  compute: ComputeMode;
  /** 'auto' | 'avx512' | 'avx2' | 'portable' */
  cpuPath: string;
  numThreads: number;
  blockSize: number;
  /** bytes for the latent cache; null: what is of use, at most half of the free memory */
  cacheMemory: number | null;
  /** most tokens of one sequence; null: what the checkpoint and the cache allow */
  maxModelLen: number | null;
  maxStepTokens: number;
  maxNumSeqs: number;
  /** requests that may wait beyond maxNumSeqs */
  maxQueue: number;
  /** tell what changes in the prefix cache; false where it is left out */
  hasCacheEvents?: boolean;
  /** drafts of the MTP module a step; 'auto' adapts them, and is 0 where the checkpoint has no such module */
  speculativeTokens: number | 'auto';
}

export type LoadProgress = (loadedBytes: number, totalBytes: number) => void;

const PROGRESS_INTERVAL_MS = 100;

/** Reads the checkpoint, loads the weights and returns an engine that has computed one token already. */
export async function startEngine(
  addon: NativeAddon,
  config: EngineConfig,
  onProgress: LoadProgress = () => {},
): Promise<Engine> {
  const { compute, cpuPath, numThreads, blockSize, maxStepTokens, maxNumSeqs, maxModelLen } = config;
  if (maxStepTokens < maxNumSeqs) {
    throw new StartupError(
      `--max-step-tokens is ${maxStepTokens}; it must be at least --max-num-seqs, which is ${maxNumSeqs}.`,
    );
  }
  const checkpoint = readCheckpoint(config.model);
  const { spec, tensors } = checkpoint;
  if (maxModelLen !== null && maxModelLen > spec.maxPositionEmbeddings) {
    throw new StartupError(
      `--max-model-len is ${maxModelLen}; the checkpoint has ${spec.maxPositionEmbeddings} positions (max_position_embeddings).`,
    );
  }
  const device = resolveDevice(addon, config.device);
  const drafts = draftPolicy(config.speculativeTokens, spec);
  const loadMtp = drafts.isOn;
  const blockBytes = addon.cacheBytesPerToken({ spec, compute, device, loadMtp }) * blockSize;
  const usefulBlocks = maxNumSeqs * Math.ceil((maxModelLen ?? spec.maxPositionEmbeddings) / blockSize);
  const cacheMemory = config.cacheMemory ?? defaultCacheMemory(usefulBlocks * blockBytes, device);
  const numBlocks = countBlocks(cacheMemory, blockBytes, blockSize);
  if (maxModelLen !== null && maxModelLen > numBlocks * blockSize) {
    throw new StartupError(
      `--max-model-len is ${maxModelLen} but the latent cache of ${cacheMemory} bytes holds ${numBlocks * blockSize} tokens; raise --cache-memory.`,
    );
  }
  const options: RunnerOptions = {
    spec,
    tensors,
    device,
    compute,
    cpuPath,
    numThreads,
    blockSize,
    numBlocks,
    maxStepTokens,
    maxNumSeqs,
    loadMtp,
  };
  const { runner, info } = await loadRunner(addon, options, onProgress);
  await warmUp(runner, checkpoint, options, drafts instanceof AdaptiveDrafts ? drafts : null);
  return new Engine(runner, {
    blockSize,
    numBlocks,
    maxStepTokens,
    maxNumSeqs,
    fingerprint: checkpoint.fingerprint,
    drafts,
    hasCacheEvents: config.hasCacheEvents === true,
    grammars: new GrammarThread({
      tokenizer: join(checkpoint.folder, 'tokenizer.json'),
      vocabSize: spec.vocabSize,
    }),
    info,
    limits: {
      vocabSize: spec.vocabSize,
      maxContext: Math.min(maxModelLen ?? spec.maxPositionEmbeddings, numBlocks * blockSize),
      maxOpen: maxNumSeqs + config.maxQueue,
    },
  });
}

/** Who drafts: nobody without an MTP module. */
export function draftPolicy(speculativeTokens: number | 'auto', { numMtpLayers }: ModelSpec): DraftPolicy {
  if (speculativeTokens === 'auto') return numMtpLayers > 0 ? new AdaptiveDrafts() : new FixedDrafts(0);
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

/** As much as all sequences at full length could use, but at most half of what is free now. */
function defaultCacheMemory(usefulBytes: number, device: string): number {
  if (device !== 'cpu') throw new StartupError(`--cache-memory must be given for the device ${device}.`);
  return Math.min(usefulBytes, Math.floor(usableMemory() / 2));
}

/** The device to run on; 'auto' is the best usable one. */
export function resolveDevice(addon: NativeAddon, wanted: string): string {
  const { usable, unusable } = addon.devices();
  const device = wanted === 'auto' ? usable[0] : usable.find((name) => name === wanted);
  if (device !== undefined) return device;
  const reason = unusable.find((entry) => entry.device === wanted)?.reason ?? 'there is no such device';
  throw new StartupError(`--device ${wanted} cannot be used: ${reason}; usable here: ${usable.join(', ')}.`);
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
