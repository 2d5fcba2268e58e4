import { StartupError } from '../errors.js';
import type { Checkpoint } from '../model/spec.js';
import type { AdaptiveDrafts } from './adaptive-drafts.js';
import type { NativeRunner, RunnerOptions } from './addon.js';
import { packStep } from './pack-step.js';
import { GREEDY, NO_MARKERS } from './request.js';
import { Sequence } from './sequence.js';
import type { StepResult } from './step-batch.js';

/** rows of the steps that are timed for a policy of drafts, and how often each is run */
const TIMED_ROWS = [1, 2, 3, 4, 5, 8, 16, 32];
const NUM_REPEATS = 3;
/** no more steps are timed when that long has gone by */
const MAX_TIMING_MS = 300;

/**
 * Computes one token before anybody is told that the engine is ready: it faults in what is mapped lazily. It writes the
 * first slots, which belong to free blocks. Some steps are timed for a policy that goes by costs.
 */
export async function warmUp(
  runner: NativeRunner,
  checkpoint: Checkpoint,
  options: RunnerOptions,
  timed: AdaptiveDrafts | null,
): Promise<void> {
  const start = performance.now();
  const firstId = checkpoint.bosTokenId ?? 0;
  try {
    await runStep(runner, [firstId], 0, options.blockSize);
    if (timed === null) return;
    const { vocabSize, maxPositionEmbeddings } = checkpoint.spec;
    const mostRows = Math.min(options.maxStepTokens, options.numBlocks * options.blockSize, maxPositionEmbeddings) - 2;
    for (const numRows of TIMED_ROWS.filter((rows) => rows <= mostRows)) {
      // Different tokens, because equal ones share their experts.
      const ids = Array.from({ length: numRows }, (_, index) => (firstId + index * 7919) % vocabSize);
      for (const numDrafts of numRows === 1 ? [1, 2] : [0]) {
        const results: StepResult[] = []; // [num_repeats]
        for (let repeat = 0; repeat < NUM_REPEATS; repeat++) {
          if (performance.now() - start > MAX_TIMING_MS) return;
          results.push(await runStep(runner, ids, numDrafts, options.blockSize));
        }
        timed.calibrate({
          numRows,
          otherMicros: 0,
          mainMicros: Math.min(...results.map(({ stepMicros, draftMicros }) => stepMicros - draftMicros)),
          numDrafting: numDrafts === 0 ? 0 : 1,
          numDrafts,
          draftMicros: Math.min(...results.map(({ draftMicros }) => draftMicros)),
        });
      }
    }
  } catch (error) {
    await runner.close();
    throw new StartupError(`The model cannot compute its first token: ${(error as Error).message}`);
  }
}

/** One step of one greedy sequence in the first blocks, all of whose tokens are sampled. */
function runStep(runner: NativeRunner, ids: number[], numDrafts: number, blockSize: number): Promise<StepResult> {
  const sequence = new Sequence(
    {
      requestId: 'warm-up',
      promptIds: ids,
      sampling: GREEDY,
      markers: NO_MARKERS,
      startPhase: 'answer',
      cacheSalt: '',
    },
    0,
    ids.length + 1,
    '',
  );
  const length = ids.length + numDrafts;
  sequence.blockTable = Array.from({ length: Math.ceil(length / blockSize) }, (_, index) => index);
  const part = { sequence, start: 0, count: ids.length, draftIds: [], runMtp: numDrafts > 0, numDrafts, epoch: 0 };
  return runner.step(packStep({ sequences: [{ ...part, numSampled: ids.length }] }, blockSize));
}
