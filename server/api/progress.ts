import type { EngineHandle } from '../engine/request.js';

/** A comment that keeps a response alive; before the first token it says what the first request is waiting for. */
export function keepAlive(engine: EngineHandle, requestIds: readonly string[]): string {
  for (const requestId of requestIds) {
    const progress = engine.progress(requestId);
    if (progress?.status === 'waiting') return `keep-alive, queued behind ${progress.numAhead}`;
    if (progress?.status === 'prefill') return `keep-alive, prefill ${progress.numComputed}/${progress.numTokens}`;
  }
  return 'keep-alive';
}
