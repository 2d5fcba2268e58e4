import type { CacheEvent } from './cache-events.js';
import type { RequestLimits } from './check-request.js';
import type {
  EngineEvent,
  EngineRequest,
  EngineStats,
  PrewarmRequest,
  RequestProgress,
  ThinkingControl,
} from './request.js';
import type { EngineConfig } from './start-engine.js';

/** What the API process tells the engine process. Structured clone carries bigint, Infinity and typed arrays. */
export type ParentMessage =
  | { type: 'start'; config: EngineConfig }
  /** everything since the last message, in order: at most one a turn of the event loop */
  | { type: 'requests'; requests: ParentRequest[] }
  | { type: 'close' };

export type ParentRequest =
  | { type: 'submit'; request: EngineRequest }
  | { type: 'abort'; requestId: string }
  | { type: 'prewarm'; prewarm: PrewarmRequest }
  | { type: 'control'; requestId: string; control: ThinkingControl };

/** What is known of an engine that is ready. */
export interface EngineInfo {
  device: string;
  deviceNote?: string;
  weightBytes: number;
  cacheBytes: number;
  limits: RequestLimits;
}

/** What the engine process tells the API process. */
export type ChildMessage =
  | { type: 'progress'; loadedBytes: number; totalBytes: number }
  | { type: 'ready'; info: EngineInfo }
  /** one a step, carrying the events of all sequences; without events it is the heartbeat, which carries progress */
  | {
      type: 'step';
      events: EngineEvent[];
      stats: EngineStats;
      cacheEvents?: CacheEvent[];
      progress?: [requestId: string, progress: RequestProgress][];
    }
  /** the last message: a sentence to show as it is where isStartup, the reason for a restart otherwise */
  | { type: 'failed'; message: string; isStartup: boolean };
