import type { PrefixCache } from './prefix-cache.js';
import type { PlannedSequence, StepPlan } from './step-plan.js';

/**
 * The step behind one that is not over yet: each of its sequences goes on by the token that it samples, which only the
 * runner knows. Null where that step must be waited for: where what comes next depends on its tokens (grammars,
 * penalties, drafts), where a prefill goes on, or where blocks are short. Takes the blocks for the new positions.
 */
export function planAhead(before: StepPlan, cache: PrefixCache, blockSize: number): StepPlan | null {
  const parts: PlannedSequence[] = [];
  let numNeeded = 0;
  for (const [rowBefore, part] of before.sequences.entries()) {
    if (!isUnderWay(part)) continue;
    if (!canGoOn(part)) return null;
    if (isLastOfLength(part)) continue;
    const { sequence } = part;
    const start = part.start + part.count;
    numNeeded += Math.max(0, Math.floor(start / blockSize) + 1 - sequence.blockTable.length);
    parts.push({ ...part, start, count: 1, rowBefore });
  }
  if (parts.length === 0 || numNeeded > cache.numAvailable) return null;
  for (const { sequence, start } of parts) {
    while (sequence.blockTable.length * blockSize <= start) sequence.blockTable.push(cache.take()!);
  }
  return { sequences: parts };
}

/** Whether a planned part is still of use: its sequence runs on, and from where the plan left it. */
export function isUnderWay({ sequence, epoch }: PlannedSequence): boolean {
  return sequence.status === 'running' && sequence.epoch === epoch;
}

/** Whether the token that a part samples is known to be its sequence's last, whatever it is. */
export function isLastOfLength({ sequence, start, count }: PlannedSequence): boolean {
  return start + count + 1 >= sequence.maxTokens;
}

/** Whether the token after the one that this part samples depends on nothing but the tokens before it. */
function canGoOn({ sequence, numSampled, runMtp }: PlannedSequence): boolean {
  return numSampled === 1 && !runMtp && !sequence.runsMtp && sequence.canRunAhead;
}
