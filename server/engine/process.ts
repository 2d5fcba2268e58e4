import { fork, type ChildProcess } from 'node:child_process';
import { extname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ApiError, StartupError } from '../errors.js';
import type { CacheEvent } from './cache-events.js';
import { checkRequest, type RequestLimits } from './check-request.js';
import { CounterTotals } from './counter-totals.js';
import { EventStream } from './event-stream.js';
import type { ChildMessage, ParentMessage, ParentRequest } from './messages.js';
import type {
  EngineEvent,
  EngineHandle,
  EngineRequest,
  EngineState,
  EngineStats,
  PrewarmRequest,
  RequestProgress,
  ThinkingControl,
} from './request.js';
import type { EngineConfig } from './start-engine.js';

export interface EngineClientOptions {
  config: EngineConfig;
  /** a line for the log: deaths and restarts */
  log?: (line: string) => void;
  /** what changes in the prefix cache, step by step; the config asks for it with hasCacheEvents */
  onCacheEvents?: (events: readonly CacheEvent[]) => void;
  /** script of the engine process; tests give one with another runner */
  entry?: string;
  /** an engine process that is silent for so long is killed: its event loop hangs */
  silenceMs?: number;
  /** an engine process with work whose step counter stands still for so long is killed: the step hangs */
  stalledStepMs?: number;
}

const MAX_START_FAILURES = 3;
const MIN_BACKOFF_MS = 100;
const MAX_BACKOFF_MS = 10_000;
/** after this long without a death the backoff starts anew */
const STABLE_MS = 60_000;
const WATCH_MS = 1000;
const CLOSE_MS = 5000;
const CHANNEL_GRACE_MS = 100;

/**
 * The engine in a child process, supervised. When the child dies every open stream ends with an error event at once
 * and another child is started; a StartupError, or several deaths before one is ready, end that.
 */
export class EngineClient implements EngineHandle {
  readonly #options: EngineClientOptions;
  readonly #streams = new Map<string, EventStream>();
  readonly #totals = new CounterTotals();
  readonly #watch: NodeJS.Timeout;
  readonly #ready: Promise<void>;
  #resolveReady: () => void = () => {};
  #rejectReady: (error: Error) => void = () => {};
  #state: EngineState = { status: 'loading', loadedBytes: 0, totalBytes: 0 };
  #limits: RequestLimits | null = null;
  #child: ChildProcess | null = null;
  #outbox: ParentRequest[] = []; // [num_unsent]
  #numStartFailures = 0;
  #numRestarts = 0;
  #backoffMs = MIN_BACKOFF_MS;
  #restart: NodeJS.Timeout | undefined;
  /** as of the last heartbeat */
  #progress = new Map<string, RequestProgress>();
  #startedAt = 0;
  #lastMessageAt = 0;
  #lastStepAt = 0;
  #lastWatchAt = 0;
  #lastNumSteps = 0;

  constructor(options: EngineClientOptions) {
    this.#options = options;
    this.#ready = new Promise((resolve, reject) => {
      this.#resolveReady = resolve;
      this.#rejectReady = reject;
    });
    this.#ready.catch(() => {}); // whoever awaits ready() sees it
    this.#watch = setInterval(() => this.#checkProgress(), WATCH_MS);
    this.#watch.unref();
    this.#start();
  }

  submit(request: EngineRequest): AsyncIterable<EngineEvent> {
    if (this.#state.status !== 'ready' || this.#limits === null) throw this.#notReady();
    checkRequest(request, this.#streams.size, this.#limits);
    const { requestId } = request;
    if (this.#streams.has(requestId)) throw new Error(`request id ${requestId} is in use`);
    const stream = new EventStream(() => {
      this.#streams.delete(requestId);
      this.#post({ type: 'abort', requestId });
    });
    this.#streams.set(requestId, stream);
    this.#post({ type: 'submit', request });
    return stream;
  }

  abort(requestId: string): void {
    if (this.#streams.has(requestId)) this.#post({ type: 'abort', requestId });
  }

  control(requestId: string, control: ThinkingControl): void {
    if (this.#streams.has(requestId)) this.#post({ type: 'control', requestId, control });
  }

  prewarm(prewarm: PrewarmRequest): void {
    if (this.#state.status === 'ready') this.#post({ type: 'prewarm', prewarm });
  }

  progress(requestId: string): RequestProgress | null {
    return this.#progress.get(requestId) ?? null;
  }

  state(): EngineState {
    return this.#state;
  }

  stats(): EngineStats {
    return { ...this.#totals.stats(), numRestarts: this.#numRestarts };
  }

  ready(): Promise<void> {
    return this.#ready;
  }

  /** Process id of the engine process; undefined between two of them. */
  get pid(): number | undefined {
    return this.#child?.pid;
  }

  async close(): Promise<void> {
    if (this.#state.status === 'closed') return;
    this.#state = { status: 'closed' };
    clearInterval(this.#watch);
    clearTimeout(this.#restart);
    this.#rejectReady(new ApiError('shutting_down', 'The server is shutting down.'));
    this.#endStreams('shutting_down', 'The server is shutting down.');
    const child = this.#child;
    this.#child = null;
    if (child === null || child.exitCode !== null || child.signalCode !== null) return;
    const exited = new Promise((resolve) => child.once('exit', resolve));
    child.removeAllListeners('message');
    child.send({ type: 'close' } satisfies ParentMessage, () => {});
    const timer = setTimeout(() => child.kill('SIGKILL'), CLOSE_MS);
    await exited;
    clearTimeout(timer);
  }

  #start(): void {
    const entry = this.#options.entry ?? fileURLToPath(new URL(`./child${extname(import.meta.url)}`, import.meta.url));
    const child = fork(entry, [], {
      serialization: 'advanced',
      // Under tsx the child needs tsx too; the parent's other flags (--test, --inspect) are not its business.
      execArgv: extname(entry) === '.ts' ? ['--import', import.meta.resolve('tsx')] : [],
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    this.#child = child;
    this.#startedAt = this.#lastMessageAt = this.#lastStepAt = this.#lastWatchAt = performance.now();
    let failure: Extract<ChildMessage, { type: 'failed' }> | null = null;
    child.on('message', (message: ChildMessage) => {
      if (child !== this.#child) return;
      this.#lastMessageAt = performance.now();
      if (message.type === 'failed') failure = message;
      else this.#receive(message);
    });
    const onDeath = (reason: string) => {
      if (child !== this.#child) return;
      this.#child = null;
      child.kill('SIGKILL');
      this.#died(failure?.message ?? reason, failure?.isStartup ?? false);
    };
    child.on('error', (error) => onDeath(`the engine process failed: ${error.message}`));
    child.on('exit', (code, signal) => onDeath(`the engine process ended (${signal ?? `exit code ${code}`})`));
    // The exit says more and follows at once, unless the process hangs in its death.
    child.on('disconnect', () => setTimeout(() => onDeath('the engine process closed its channel'), CHANNEL_GRACE_MS));
    child.send({ type: 'start', config: this.#options.config } satisfies ParentMessage, () => {});
  }

  #receive(message: Exclude<ChildMessage, { type: 'failed' }>): void {
    switch (message.type) {
      case 'progress': {
        const { loadedBytes, totalBytes } = message;
        if (this.#state.status === 'loading' || this.#state.status === 'restarting') {
          this.#state = { ...this.#state, loadedBytes, totalBytes };
        }
        break;
      }
      case 'ready': {
        const { limits, ...info } = message.info;
        this.#limits = limits;
        this.#numStartFailures = 0;
        this.#lastStepAt = performance.now();
        if (this.#state.status === 'restarting') this.#options.log?.('The engine is ready again.');
        this.#state = { status: 'ready', ...info, maxContext: limits.maxContext };
        this.#resolveReady();
        break;
      }
      case 'step':
        this.#totals.update(message.stats);
        if (
          message.stats.numSteps !== this.#lastNumSteps ||
          message.stats.numRunning + message.stats.numWaiting === 0
        ) {
          this.#lastNumSteps = message.stats.numSteps;
          this.#lastStepAt = performance.now();
        }
        if (message.progress !== undefined) this.#progress = new Map(message.progress);
        for (const event of message.events) this.#push(event);
        if (message.cacheEvents !== undefined) this.#options.onCacheEvents?.(message.cacheEvents);
    }
  }

  /** Events of sequences that nobody reads any more are dropped. */
  #push(event: EngineEvent): void {
    const stream = this.#streams.get(event.requestId);
    if (event.finishReason !== undefined) this.#streams.delete(event.requestId);
    stream?.push(event);
  }

  #died(reason: string, isStartup: boolean): void {
    const wasReady = this.#state.status === 'ready';
    this.#outbox = [];
    this.#progress.clear();
    this.#totals.close();
    this.#options.onCacheEvents?.([{ kind: 'cleared' }]);
    this.#endStreams('engine_failed', `The engine stopped while it was serving this request: ${reason}.`);
    if (!wasReady) this.#numStartFailures++;
    if (isStartup || this.#numStartFailures >= MAX_START_FAILURES) {
      const text = isStartup ? reason : `The engine could not be started ${MAX_START_FAILURES} times: ${reason}.`;
      this.#state = { status: 'failed', reason: text };
      this.#rejectReady(new StartupError(text));
      return this.#options.log?.(text);
    }
    // Before it was ever ready it is still loading for whoever asks.
    if (this.#state.status !== 'loading') {
      this.#state = { status: 'restarting', reason, loadedBytes: 0, totalBytes: 0 };
    }
    if (performance.now() - this.#startedAt > STABLE_MS) this.#backoffMs = MIN_BACKOFF_MS;
    this.#options.log?.(`The engine is started again in ${this.#backoffMs} ms: ${reason}.`);
    this.#restart = setTimeout(() => {
      this.#numRestarts++;
      this.#start();
    }, this.#backoffMs);
    this.#backoffMs = Math.min(2 * this.#backoffMs, MAX_BACKOFF_MS);
  }

  #endStreams(code: string, message: string): void {
    for (const requestId of [...this.#streams.keys()]) {
      this.#push({ requestId, tokens: [], cachedTokens: 0, finishReason: 'error', error: { code, message } });
    }
  }

  /** Kills an engine process that hangs. A late timer means that this process slept, which proves nothing. */
  #checkProgress(): void {
    const now = performance.now();
    const hasSlept = now - this.#lastWatchAt > 5 * WATCH_MS;
    this.#lastWatchAt = now;
    if (hasSlept) this.#lastMessageAt = this.#lastStepAt = now;
    const isSilent = now - this.#lastMessageAt > (this.#options.silenceMs ?? 30_000);
    const isStalled = now - this.#lastStepAt > (this.#options.stalledStepMs ?? 300_000);
    if (this.#child === null || !(isSilent || (isStalled && this.#state.status === 'ready'))) return;
    this.#options.log?.(isSilent ? 'The engine process does not answer.' : 'The engine computes no step any more.');
    this.#child.kill('SIGKILL');
  }

  /** Collects what is sent in one turn of the event loop into one message. */
  #post(request: ParentRequest): void {
    if (this.#outbox.push(request) > 1) return;
    setImmediate(() => {
      const requests = this.#outbox;
      this.#outbox = [];
      const isConnected = this.#child?.connected === true;
      if (requests.length > 0 && isConnected) {
        this.#child?.send({ type: 'requests', requests } satisfies ParentMessage, () => {});
      }
    });
  }

  #notReady(): ApiError {
    switch (this.#state.status) {
      case 'restarting':
        return new ApiError('engine_restarting', 'The engine is starting again after a failure; try again shortly.');
      case 'failed':
        return new ApiError('engine_failed', this.#state.reason);
      case 'closed':
        return new ApiError('shutting_down', 'The server is shutting down.');
      case 'loading':
      case 'ready':
        return new ApiError('model_loading', 'The model is still being loaded; try again shortly.');
    }
  }
}
