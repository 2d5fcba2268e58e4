import type { EngineStats } from './request.js';
import { MAX_DRAFTS } from './step-batch.js';

type Counter = (typeof COUNTERS)[number];

const COUNTERS = [
  'numSteps',
  'numPreemptions',
  'promptTokens',
  'generationTokens',
  'prewarmedTokens',
  'prefixCacheQueries',
  'prefixCacheHits',
  'specNumDrafts',
  'specNumDraftTokens',
  'specNumAcceptedTokens',
] as const satisfies readonly (keyof EngineStats)[];

/** The stats of a series of engine processes as one: counters go on counting, gauges are those of the living one. */
export class CounterTotals {
  /** counters of the processes that have ended */
  #past: Pick<EngineStats, Counter | 'specAcceptedPerPos'> = noStats();
  #present: EngineStats = noStats();

  update(stats: EngineStats): void {
    this.#present = stats;
  }

  /** The process that the present stats came from has ended. */
  close(): void {
    this.#past = this.stats();
    this.#present = noStats();
  }

  stats(): EngineStats {
    const stats = { ...this.#present };
    for (const counter of COUNTERS) stats[counter] += this.#past[counter];
    stats.specAcceptedPerPos = stats.specAcceptedPerPos.map(
      (count, depth) => count + this.#past.specAcceptedPerPos[depth]!,
    );
    return stats;
  }
}

function noStats(): EngineStats {
  return {
    numRunning: 0,
    numWaiting: 0,
    numBlocks: 0,
    numFreeBlocks: 0,
    numCachedBlocks: 0,
    blockSize: 0,
    numSteps: 0,
    numPreemptions: 0,
    promptTokens: 0,
    generationTokens: 0,
    prewarmedTokens: 0,
    prefixCacheQueries: 0,
    prefixCacheHits: 0,
    specNumDrafts: 0,
    specNumDraftTokens: 0,
    specNumAcceptedTokens: 0,
    specAcceptedPerPos: new Array<number>(MAX_DRAFTS).fill(0),
    numRestarts: 0,
  };
}
