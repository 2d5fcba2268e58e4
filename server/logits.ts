/** `rodin logits`: the logits of given prompts, straight from the runner. The tool that proves parity. */
import { once } from 'node:events';
import { createReadStream, createWriteStream } from 'node:fs';
import { createInterface } from 'node:readline';
import type { LogitsConfig } from './config.js';
import type { NativeAddon, RunnerOptions, StepRunner } from './engine/addon.js';
import { loadAddon } from './engine/load-addon.js';
import { chooseDevice } from './engine/device.js';
import { plainBatch } from './engine/plain-batch.js';
import { loadRunner, type LoadProgress } from './engine/start-engine.js';
import type { StepBatch } from './engine/step-batch.js';
import { StartupError } from './errors.js';
import { usableCores } from './machine.js';
import { readCheckpoint } from './model/checkpoint.js';

/** Logits of one prompt; rows are those of its last positions. */
export interface PromptLogits {
  logits: Float32Array[]; // [min(last, T)] of [vocab_size]
  draftLogits: Float32Array[]; // [min(last, T - 1)] of [vocab_size]; empty without draft
}

export interface LogitsOptions extends LogitsConfig {
  /** 'auto' | 'amxbf16' | 'avx512bf16' | 'avx512' | 'avx2' | 'portable'; auto where absent */
  cpuPath?: string;
  /** most tokens in one step */
  maxStepTokens?: number;
  onProgress?: LoadProgress;
}

const BLOCK_SIZE = 64;
const MAX_STEP_TOKENS = 512;

/** Reads all prompts, checks them, loads the model and writes one line of logits for each. Returns their number. */
export async function runLogits(options: LogitsOptions, addon: NativeAddon = loadAddon()): Promise<number> {
  const checkpoint = readCheckpoint(options.model);
  const { spec, tensors } = checkpoint;
  if (options.draft && spec.numMtpLayers === 0) {
    throw new StartupError(`${checkpoint.folder} has no MTP module; leave out --draft.`);
  }
  const prompts = await readPrompts(options.prompts, spec.vocabSize, spec.maxPositionEmbeddings);
  const maxStepTokens = options.maxStepTokens ?? MAX_STEP_TOKENS;
  const longest = Math.max(...prompts.map((ids) => ids.length));
  const runnerOptions: RunnerOptions = {
    spec,
    tensors,
    device: chooseDevice(addon, options.device, options.compute).device,
    compute: options.compute,
    cpuPath: options.cpuPath ?? 'auto',
    numThreads: options.threads ?? usableCores(),
    blockSize: BLOCK_SIZE,
    numBlocks: Math.ceil(longest / BLOCK_SIZE),
    gpuMemoryUtilization: 0,
    kvCacheDtype: 'auto',
    headDtype: options.headDtype ?? 'auto',
    deterministic: options.deterministic,
    maxStepTokens,
    maxNumSeqs: 1,
    loadMtp: options.draft,
  };
  const { runner } = await loadRunner(addon, runnerOptions, options.onProgress);
  try {
    const out = createWriteStream(options.out);
    await once(out, 'open').catch((error: Error) => {
      throw new StartupError(`${options.out} cannot be written: ${error.message}.`);
    });
    for (const ids of prompts) {
      const { logits, draftLogits } = await computeLogits(runner, ids, spec.vocabSize, maxStepTokens, options);
      const line: Record<string, unknown> = { ids, logits: logits.map((row) => Array.from(row)) };
      if (options.draft) line['draft_logits'] = draftLogits.map((row) => Array.from(row));
      if (!out.write(`${JSON.stringify(line)}\n`)) await once(out, 'drain');
    }
    out.end();
    await once(out, 'finish');
    return prompts.length;
  } finally {
    await runner.close();
  }
}

/**
 * Computes one prompt in chunks. Where the MTP module's logits are wanted each chunk starts with the last token of
 * the one before, whose hidden state the module needs; it is in the cache already and not written again.
 */
export async function computeLogits(
  runner: StepRunner,
  ids: readonly number[],
  vocabSize: number,
  maxStepTokens: number,
  { last, draft }: { last: number; draft: boolean },
): Promise<PromptLogits> {
  const result: PromptLogits = { logits: [], draftLogits: [] };
  const overlap = draft ? 1 : 0;
  if (maxStepTokens <= overlap) throw new RangeError(`maxStepTokens (${maxStepTokens}) leaves no room for a token`);
  const firstRow = Math.max(0, ids.length - last);
  // Draft row j is made from token j and the hidden state before it: T - 1 of them, from token 1 on.
  const firstDraftRow = Math.max(1, ids.length - last);
  for (let next = 0; next < ids.length;) {
    const start = Math.max(0, next - overlap);
    const end = Math.min(ids.length, start + maxStepTokens);
    const logitRows = range(Math.max(next, firstRow), end).map((position) => position - start);
    const wanted = draft ? range(Math.max(start + 1, firstDraftRow), end) : [];
    const draftLogitRows = wanted.map((position) => position - start);
    // The module runs over every chunk, or later ones would find its cache empty.
    const batch = { ...makeBatch(ids, start, end, next, logitRows, draftLogitRows), runMtp: Uint8Array.of(overlap) };
    const { logits, draftLogits } = await runner.step(batch);
    result.logits.push(...rowsOf(logits, logitRows.length, vocabSize));
    result.draftLogits.push(...rowsOf(draftLogits, wanted.length, vocabSize));
    next = end;
  }
  return result;
}

/** Tokens start .. end-1 of one sequence in blocks 0, 1, ...; those below `written` are in the cache already. */
function makeBatch(
  ids: readonly number[],
  start: number,
  end: number,
  written: number,
  logitRows: number[],
  draftLogitRows: number[],
): StepBatch {
  const positions = range(start, end);
  const numBlocks = Math.ceil(end / BLOCK_SIZE);
  const tokens = {
    tokenIds: Int32Array.from(ids.slice(start, end)), // [T]
    positions: Int32Array.from(positions), // [T]
    slotMapping: Int32Array.from(positions, (position) => (position < written ? -1 : position)), // [T]
    qStart: Int32Array.of(0, positions.length), // [2]
    blockTableStart: Int32Array.of(0, numBlocks), // [2]
    blockTable: Int32Array.from(range(0, numBlocks)), // [num_blocks]
    numSampled: Int32Array.of(0), // [1]
  };
  return plainBatch(tokens, {
    logitRows: Int32Array.from(logitRows), // [L]
    draftLogitRows: Int32Array.from(draftLogitRows), // [D]
  });
}

async function readPrompts(file: string, vocabSize: number, maxLength: number): Promise<number[][]> {
  const prompts: number[][] = [];
  let lineNumber = 0;
  try {
    for await (const line of createInterface({ input: createReadStream(file), crlfDelay: Infinity })) {
      lineNumber++;
      if (line.trim() !== '') prompts.push(parsePrompt(line, `${file}, line ${lineNumber}`, vocabSize, maxLength));
    }
  } catch (error) {
    if (error instanceof StartupError) throw error;
    throw new StartupError(`${file} cannot be read: ${(error as Error).message}.`);
  }
  if (prompts.length === 0) throw new StartupError(`${file} holds no prompt; write one {"ids": [...]} a line.`);
  return prompts;
}

function parsePrompt(line: string, where: string, vocabSize: number, maxLength: number): number[] {
  let ids: unknown;
  try {
    ids = (JSON.parse(line) as { ids?: unknown } | null)?.ids;
  } catch (error) {
    throw new StartupError(`${where}: this is not JSON: ${(error as Error).message}.`);
  }
  if (!Array.isArray(ids) || ids.length === 0) {
    throw new StartupError(`${where}: "ids" must be a list of at least one token id.`);
  }
  if (ids.length > maxLength) {
    throw new StartupError(`${where}: "ids" has ${ids.length} tokens; the model has ${maxLength} positions.`);
  }
  const bad: unknown = ids.find((id) => typeof id !== 'number' || !Number.isInteger(id) || id < 0 || id >= vocabSize);
  if (bad !== undefined) {
    throw new StartupError(
      `${where}: ${JSON.stringify(bad)} is no token id; ids are whole numbers from 0 to ${vocabSize - 1}.`,
    );
  }
  return ids as number[];
}

function rowsOf(values: Float32Array, numRows: number, width: number): Float32Array[] {
  return Array.from({ length: numRows }, (_, row) => values.slice(row * width, (row + 1) * width));
}

function range(start: number, end: number): number[] {
  return Array.from({ length: Math.max(0, end - start) }, (_, index) => start + index);
}
