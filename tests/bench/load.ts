import { setMaxListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Sample } from './request.js';

/** How requests arrive: so many at once, each followed by the next; or at random moments, whatever is still running. */
export type Arrival =
  { kind: 'closed'; concurrency: number } | { kind: 'open'; perSecond: number; maxInFlight: number };

export interface LoadResult {
  samples: Sample[]; // [num_requests that were sent]
  /** due in an open loop while too many were running */
  numSkipped: number;
  seconds: number;
}

export type Send = (index: number, dueAt: number, signal: AbortSignal) => Promise<Sample>;

/** Sends requests 0 to n-1 and waits for all; after `maxMs` what runs is cut and nothing more is sent. */
export async function runLoad(numRequests: number, arrival: Arrival, maxMs: number, send: Send): Promise<LoadResult> {
  const startedAt = performance.now();
  const controller = new AbortController();
  setMaxListeners(0, controller.signal);
  const timer = setTimeout(() => controller.abort(), maxMs);
  const samples: Sample[] = [];
  let numSkipped = 0;
  const sendOne = async (index: number, dueAt: number): Promise<void> => {
    samples.push(await send(index, dueAt, controller.signal));
  };
  try {
    if (arrival.kind === 'closed') {
      let next = 0;
      const client = async (): Promise<void> => {
        while (next < numRequests && !controller.signal.aborted) await sendOne(next++, performance.now());
      };
      await Promise.all(Array.from({ length: Math.min(arrival.concurrency, numRequests) }, client));
    } else {
      const running = new Set<Promise<void>>();
      const random = seededRandom(1);
      let dueAt = startedAt;
      for (let index = 0; index < numRequests && !controller.signal.aborted; index++) {
        dueAt += (-Math.log(1 - random()) / arrival.perSecond) * 1000;
        const waitMs = dueAt - performance.now();
        if (waitMs > 0) await sleep(waitMs, undefined, { signal: controller.signal }).catch(() => {});
        if (controller.signal.aborted) break;
        if (running.size >= arrival.maxInFlight) {
          numSkipped++;
          continue;
        }
        const one = sendOne(index, dueAt).finally(() => running.delete(one));
        running.add(one);
      }
      await Promise.all(running);
    }
  } finally {
    clearTimeout(timer);
  }
  return { samples, numSkipped, seconds: (performance.now() - startedAt) / 1000 };
}

/** The same arrivals in every run (mulberry32). */
export function seededRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
