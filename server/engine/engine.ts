import { ApiError } from '../errors.js';
import { isUnderWay } from './ahead-planner.js';
import { isDeviceLost, type RunnerInfo, type StepRunner } from './addon.js';
import type { CacheEvent } from './cache-events.js';
import type { RequestLimits } from './check-request.js';
import { EventStream } from './event-stream.js';
import { packStep, unpackStep } from './pack-step.js';
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
import { Scheduler, type SchedulerOptions } from './scheduler.js';
import type { SequenceOutcome, StepPlan } from './step-plan.js';

export interface EngineOptions extends Omit<SchedulerOptions, 'onCacheEvent'> {
  /** launch a step before the one ahead is over, where its sequences allow it; false where it is left out */
  launchAhead?: boolean;
  /** keep what changes in the prefix cache for takeCacheEvents() */
  hasCacheEvents?: boolean;
  /** of the loaded runner */
  info: Pick<RunnerInfo, 'device' | 'weightBytes' | 'cacheBytes'> & { deviceNote?: string };
}

/** A step that the runner has and that is not committed. */
interface LaunchedStep {
  plan: StepPlan;
  outcomes: Promise<SequenceOutcome[]>;
  /** the step ahead of it has failed: it was made from nothing */
  isVoid: boolean;
}

/** Steps in a row in which every sequence failed, after which the runner counts as broken. */
const MAX_FAILED_STEPS = 3;

/**
 * Continuous batching over one loaded runner, in this process. Whatever one request does, the loop goes on; it stops
 * when it is closed or when the runner is broken.
 */
export class Engine implements EngineHandle {
  readonly #runner: StepRunner;
  readonly #options: EngineOptions;
  readonly #scheduler: Scheduler;
  readonly #streams = new Map<string, EventStream>();
  readonly #loop: Promise<void>;
  #state: EngineState;
  #wake: () => void = () => {};
  #numFailedSteps = 0;
  #cacheEvents: CacheEvent[] = [];
  /** of the step that was committed last; null where they are delivered */
  #undelivered: EngineEvent[] | null = null;
  /** when the step before ended, milliseconds; 0 where the loop was idle since */
  #lastResultAt = 0;
  /** Called with the events of each step, in this process's stead of streams; set before the first request. */
  onEvents: (events: EngineEvent[]) => void = (events) => this.#pushToStreams(events);
  /** Called once when the loop has stopped for good because the runner is broken. */
  onFailed: (reason: string) => void = () => {};

  constructor(runner: StepRunner, options: EngineOptions) {
    this.#runner = runner;
    this.#options = options;
    this.#scheduler = new Scheduler({
      now: () => performance.now(),
      ...options,
      ...(options.hasCacheEvents ? { onCacheEvent: (event) => void this.#cacheEvents.push(event) } : {}),
    });
    this.#scheduler.onGrammar = (event) => {
      if (event !== null) this.onEvents([event]);
      this.#wake();
    };
    const { device, weightBytes, cacheBytes, deviceNote } = options.info;
    this.#state = {
      status: 'ready',
      device,
      weightBytes,
      cacheBytes,
      maxContext: options.limits.maxContext,
      ...(deviceNote === undefined ? {} : { deviceNote }),
    };
    this.#loop = this.#run();
  }

  submit(request: EngineRequest): AsyncIterable<EngineEvent> {
    const { requestId } = request;
    this.enqueue(request);
    const stream = new EventStream(() => {
      this.#streams.delete(requestId);
      this.abort(requestId);
    });
    this.#streams.set(requestId, stream);
    return stream;
  }

  /** submit() for a caller that takes all events from onEvents. */
  enqueue(request: EngineRequest): void {
    if (this.#state.status === 'failed') throw new ApiError('engine_failed', this.#state.reason);
    if (this.#state.status === 'closed') throw new ApiError('shutting_down', 'The server is shutting down.');
    this.#scheduler.add(request);
    this.#wake();
  }

  abort(requestId: string): void {
    const event = this.#scheduler.end(requestId, 'abort');
    if (event !== null) this.onEvents([event]);
  }

  control(requestId: string, control: ThinkingControl): void {
    this.#scheduler.control(requestId, control);
  }

  prewarm(prewarm: PrewarmRequest): void {
    this.#scheduler.prewarm(prewarm);
    this.#wake();
  }

  progress(requestId: string): RequestProgress | null {
    return this.allProgress().find(([id]) => id === requestId)?.[1] ?? null;
  }

  allProgress(): [requestId: string, progress: RequestProgress][] {
    return this.#scheduler.progress();
  }

  get limits(): RequestLimits {
    return this.#options.limits;
  }

  state(): EngineState {
    return this.#state;
  }

  stats(): EngineStats {
    return this.#scheduler.stats();
  }

  ready(): Promise<void> {
    return Promise.resolve();
  }

  async close(): Promise<void> {
    if (this.#state.status !== 'closed') {
      this.#state = { status: 'closed' };
      this.#wake();
    }
    await this.#loop;
    this.#endAll({ code: 'shutting_down', message: 'The server is shutting down.' });
    await this.#options.grammars?.end();
    await this.#runner.close();
  }

  /** What has changed in the prefix cache since the last call; always empty without hasCacheEvents. */
  takeCacheEvents(): CacheEvent[] {
    const events = this.#cacheEvents;
    if (events.length > 0) this.#cacheEvents = [];
    return events;
  }

  /** Every test ends with this. */
  checkInvariant(): void {
    this.#scheduler.checkInvariant();
  }

  async #run(): Promise<void> {
    let step: LaunchedStep | null = null;
    try {
      while (this.#state.status === 'ready') {
        step ??= this.#launch(this.#scheduler.schedule());
        const next: LaunchedStep | null = step && this.#launch(this.#scheduleAhead(step));
        this.#deliver(); // while the steps run
        if (step === null) await this.#idle();
        else this.#undelivered = this.#scheduler.commit(step.plan, await this.#outcomesOf(step, next));
        step = next?.isVoid === true ? null : next;
      }
      this.#deliver();
    } catch (error) {
      this.#deliver();
      const reason = `The engine stopped: ${(error as Error).message}`;
      if (this.#state.status !== 'closed') this.#state = { status: 'failed', reason };
      this.#endAll({ code: 'engine_failed', message: reason });
      this.onFailed(reason);
    }
  }

  #scheduleAhead(step: LaunchedStep): StepPlan | null {
    return this.#options.launchAhead === true ? this.#scheduler.scheduleAhead(step.plan) : null;
  }

  #launch(plan: StepPlan | null): LaunchedStep | null {
    if (plan === null) return null;
    const outcomes = this.#runStep(plan);
    outcomes.catch(() => {}); // whoever awaits it sees it
    return { plan, outcomes, isVoid: false };
  }

  /** Passes on the events of the step before. Nothing else runs between its commit and this. */
  #deliver(): void {
    const events = this.#undelivered;
    this.#undelivered = null;
    if (events !== null) this.onEvents(events);
  }

  /** Until the next request, or close(). */
  #idle(): Promise<void> {
    this.#scheduler.checkCounts();
    this.#lastResultAt = 0;
    return new Promise((resolve) => {
      this.#wake = resolve;
    });
  }

  /** Waits for a step; where the runner refuses it, runs each of its sequences alone, so that only the culprit fails. */
  async #outcomesOf(step: LaunchedStep, next: LaunchedStep | null): Promise<SequenceOutcome[]> {
    const parts = step.plan.sequences;
    let outcomes: SequenceOutcome[];
    try {
      outcomes = await step.outcomes;
    } catch (error) {
      if (isDeviceLost(error)) throw error;
      if (next !== null) {
        next.isVoid = true;
        await next.outcomes.catch(() => {});
      }
      outcomes = [];
      for (const part of parts) {
        const failed: SequenceOutcome = { kind: 'failed', message: (error as Error).message };
        const alone = parts.length > 1 && isUnderWay(part) ? await this.#runAlone({ sequences: [part] }) : failed;
        outcomes.push(alone);
      }
    }
    const hasFailed = outcomes.every(({ kind }) => kind === 'failed');
    this.#numFailedSteps = hasFailed ? this.#numFailedSteps + 1 : 0;
    if (this.#numFailedSteps >= MAX_FAILED_STEPS) {
      const [first] = outcomes;
      throw new Error(`${MAX_FAILED_STEPS} steps in a row failed: ${first?.kind === 'failed' ? first.message : ''}`);
    }
    return outcomes;
  }

  async #runStep(plan: StepPlan): Promise<SequenceOutcome[]> {
    const result = await this.#runner.step(packStep(plan, this.#options.blockSize));
    const now = performance.now();
    if (this.#lastResultAt > 0) this.#scheduler.observe(plan, result, 1000 * (now - this.#lastResultAt));
    this.#lastResultAt = now;
    return unpackStep(plan, result, this.#options.limits.vocabSize);
  }

  async #runAlone(plan: StepPlan): Promise<SequenceOutcome> {
    try {
      return (await this.#runStep(plan))[0]!;
    } catch (error) {
      if (isDeviceLost(error)) throw error;
      return { kind: 'failed', message: (error as Error).message };
    }
  }

  #pushToStreams(events: EngineEvent[]): void {
    for (const event of events) {
      const stream = this.#streams.get(event.requestId);
      if (event.finishReason !== undefined) this.#streams.delete(event.requestId);
      stream?.push(event);
    }
  }

  #endAll(error: EngineEvent['error']): void {
    const events = this.#scheduler.openIds().flatMap((id) => this.#scheduler.end(id, 'error', error) ?? []);
    if (events.length > 0) this.onEvents(events);
  }
}
