import type { ServeConfig } from '../config.js';
import type { EngineHandle } from '../engine/request.js';
import type { FinishedCompletions } from './finished.js';
import type { Metrics } from '../metrics.js';
import type { CompletionTracer } from '../telemetry/completion-trace.js';
import type { Checkpoint } from '../model/spec.js';
import type { PromptEncoder } from '../text/prompt-encoder.js';
import type { AnswerMemory } from './answer-memory.js';
import type { Contract } from './contract.js';
import type { Drain } from './drain.js';
import type { OutputFormats } from './output-format.js';
import type { BackgroundResponses } from './response-background.js';
import type { ResponseStore } from './response-store.js';
import type { ResumableStreams } from './resumable.js';
import type { Prewarm } from './prewarm.js';
import type { RunningStreams } from './running.js';
import type { SseOptions } from './sse.js';

/** What handlers work with; made once by buildApp(). */
export interface ApiContext {
  config: ServeConfig;
  engine: EngineHandle;
  prompts: PromptEncoder;
  spec: Checkpoint['spec'];
  defaults: Checkpoint['defaults'];
  /** names that requests may use; the first is the one in responses */
  modelNames: readonly string[];
  /** longest prompt and completion together: the engine's, once it is ready */
  readonly maxModelLen: number;
  systemFingerprint: string;
  /** Unix seconds */
  startedAt: number;
  contract: Contract;
  metrics: Metrics;
  /** null: nobody wants traces */
  tracer: CompletionTracer | null;
  drain: Drain;
  formats: OutputFormats;
  sse: SseOptions;
  resumable: ResumableStreams;
  running: RunningStreams;
  finished: FinishedCompletions;
  answers: AnswerMemory;
  prewarm: Prewarm;
  responses: ResponseStore;
  background: BackgroundResponses;
}
