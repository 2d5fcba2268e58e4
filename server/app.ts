import { STATUS_CODES } from 'node:http';
import fastify, { LogController, type FastifyInstance } from 'fastify';
import { Contract } from './api/contract.js';
import { Drain } from './api/drain.js';
import { sendError } from './api/error-handler.js';
import { OutputFormats } from './api/output-format.js';
import { requestIdFor } from './api/request-id.js';
import { BackgroundResponses } from './api/response-background.js';
import { AnswerMemory } from './api/answer-memory.js';
import { FinishedCompletions } from './api/finished.js';
import { Prewarm } from './api/prewarm.js';
import { MemoryResponses, type ResponseStore } from './api/response-store.js';
import { ResumableStreams } from './api/resumable.js';
import { RunningStreams } from './api/running.js';
import { registerRoutes } from './api/routes.js';
import type { SseOptions } from './api/sse.js';
import type { ServeConfig } from './config.js';
import type { EngineHandle } from './engine/request.js';
import { ApiError, StartupError } from './errors.js';
import { Metrics } from './metrics.js';
import type { Checkpoint } from './model/spec.js';
import type { CompletionTracer } from './telemetry/completion-trace.js';
import type { PromptEncoder } from './text/prompt-encoder.js';

export interface AppOptions {
  config: ServeConfig;
  checkpoint: Pick<Checkpoint, 'name' | 'spec' | 'defaults' | 'fingerprint'>;
  prompts: PromptEncoder;
  engine: EngineHandle;
  /** begun by whoever shuts the server down */
  drain?: Drain;
  /** who wants traces of completions */
  tracer?: CompletionTracer;
  /** where responses are kept, closed by whoever gave it; in memory where it is left out */
  responses?: ResponseStore;
  /** how patient streams are; tests are not */
  sse?: SseOptions;
  /** none: nothing is logged */
  logger?: { level: string; stream: { write(line: string): void } };
}

/** A whole request must have arrived by then; streams of answers may last as long as they like. */
const REQUEST_TIMEOUT_MS = 60_000;
const HEADERS_TIMEOUT_MS = 30_000;
const KEEP_ALIVE_TIMEOUT_MS = 75_000;
/** no byte in either direction; streams send a comment every few seconds, whole answers may take long */
const IDLE_TIMEOUT_MS = 3_600_000;

const HEARTBEAT_MS = 10_000;
const STALL_MS = 60_000;

/** The HTTP server over an engine and a checkpoint's text side. Never listens; close() closes neither of them. */
export function buildApp({
  config,
  checkpoint,
  prompts,
  engine,
  drain,
  tracer,
  responses,
  sse,
  logger,
}: AppOptions): FastifyInstance {
  const { spec, defaults, name, fingerprint } = checkpoint;
  if (config.maxModelLen !== null && config.maxModelLen > spec.maxPositionEmbeddings) {
    throw new StartupError(
      `--max-model-len ${config.maxModelLen} is more than the ${spec.maxPositionEmbeddings} positions that the checkpoint has.`,
    );
  }
  const app = fastify({
    logger: logger ?? false,
    logController: new LogController({ disableRequestLogging: true }),
    genReqId: requestIdFor,
    bodyLimit: config.maxBodyBytes,
    requestTimeout: REQUEST_TIMEOUT_MS,
    keepAliveTimeout: KEEP_ALIVE_TIMEOUT_MS,
    connectionTimeout: IDLE_TIMEOUT_MS,
    http: { headersTimeout: HEADERS_TIMEOUT_MS },
    routerOptions: { maxParamLength: 512, ignoreTrailingSlash: false },
    forceCloseConnections: true,
    frameworkErrors: (error, request, reply) => void sendError(error, request, reply),
    clientErrorHandler: (error, socket) => {
      const tooLarge = error.code === 'HPE_HEADER_OVERFLOW';
      const status = tooLarge ? 431 : error.code === 'ERR_HTTP_REQUEST_TIMEOUT' ? 408 : 400;
      const { error: shown } = new ApiError(
        'invalid_value',
        `This is no HTTP request that can be served: ${error.message}.`,
      ).toBody();
      const body = JSON.stringify({ error: shown });
      if (!socket.writable) return void socket.destroy();
      socket.end(
        `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\ncontent-type: application/json\r\n` +
          `content-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
      );
    },
  });
  const answers = new AnswerMemory();
  const modelNames = config.servedModelNames.length ? config.servedModelNames : [name];
  registerRoutes(app, {
    config,
    engine,
    prompts,
    spec,
    defaults,
    modelNames,
    get maxModelLen() {
      const state = engine.state();
      return state.status === 'ready' ? state.maxContext : (config.maxModelLen ?? spec.maxPositionEmbeddings);
    },
    systemFingerprint: `fp_${fingerprint.slice(0, 16)}`,
    startedAt: Math.floor(Date.now() / 1000),
    contract: Contract.read(),
    metrics: new Metrics(engine, modelNames[0]!),
    tracer: tracer ?? null,
    drain: drain ?? new Drain(),
    formats: new OutputFormats(),
    resumable: new ResumableStreams(config.streamResume),
    running: new RunningStreams(),
    finished: new FinishedCompletions(),
    answers,
    prewarm: new Prewarm(config.prewarm, engine, prompts, answers),
    responses: responses ?? new MemoryResponses(config.responseStoreSize),
    background: new BackgroundResponses(),
    sse: sse ?? { heartbeatMs: HEARTBEAT_MS, stallMs: STALL_MS },
  });
  return app;
}
