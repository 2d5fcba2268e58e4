import type { FastifyRequest } from 'fastify';
import type { ControlMark, EngineEvent, ThinkingControl } from '../engine/request.js';
import { ApiError } from '../errors.js';
import { ChatOutput } from './chat-output.js';
import type { ChatJob } from './chat-request.js';
import type { ApiContext } from './context.js';

/** The request that completions belong to. */
export type RequestOrigin = Pick<FastifyRequest, 'log' | 'headers' | 'tenant'>;

/**
 * One completion from submission to end: pulls events, feeds the output, keeps time and accounts for it once,
 * however it ends. Leaving events() early aborts the sequence.
 */
export class Completion {
  readonly output: ChatOutput;
  /** that the output has taken in */
  readonly tokenIds: number[]; // [num_tokens]
  /** what the client has asked of the reasoning, and where that took effect as far as is told */
  readonly #controls: ThinkingControl[]; // [num_asked]
  #marks: readonly ControlMark[]; // [num_marks]
  /** the engine's name of this submission: an aborted one may still have an event on its way */
  readonly requestId: string;
  readonly #numSubmitted: number;
  readonly #job: ChatJob;
  readonly #context: ApiContext;
  readonly #origin: RequestOrigin;
  readonly #events: AsyncIterator<EngineEvent>;
  readonly #startedAt: number;
  readonly #submittedAt: number;
  #scheduledAt: number | null = null;
  #firstTokenAt: number | null = null;
  #lastTokenAt: number | null = null;
  #numTimed = 0;
  #firstAnswerAt: number | null = null;
  #reasoningFrom: number | null = null;
  #reasoningTo: number | null = null;
  #errorCode: string | null = null;
  #isEnded = false;

  /**
   * Submits the request; with `earlier`, an aborted completion of the same job, behind the tokens that it had. Throws
   * ApiError where the engine does not take it.
   */
  constructor(job: ChatJob, context: ApiContext, origin: RequestOrigin, startedAt: number, earlier?: Completion) {
    this.#job = job;
    this.#context = context;
    this.#origin = origin;
    this.#startedAt = startedAt;
    this.output = earlier?.output ?? new ChatOutput(job, context.prompts);
    this.tokenIds = [...(earlier?.tokenIds ?? [])];
    this.#numTimed = this.tokenIds.length;
    const { engineRequest } = job;
    this.#numSubmitted = earlier === undefined ? 1 : earlier.#numSubmitted + 1;
    this.requestId = engineRequest.requestId + (earlier ? `.${this.#numSubmitted}` : '');
    const resumed = this.tokenIds.length ? { resumedIds: this.tokenIds } : {};
    this.#marks = earlier?.marks ?? engineRequest.controls ?? [];
    const marked = this.#marks.length ? { controls: this.#marks } : {};
    const request = { ...engineRequest, requestId: this.requestId, ...resumed, ...marked };
    this.#submittedAt = performance.now();
    this.#events = context.engine.submit(request)[Symbol.asyncIterator]();
    // What was asked when the client left, and had not taken effect.
    this.#controls = earlier ? [...earlier.#controls] : [];
    for (const control of this.#controls.slice(this.#marks.length)) context.engine.control(this.requestId, control);
  }

  /** Token ids that the output is made of: what one event brings behind a stop string is no part of it. */
  get ids(): number[] {
    return this.tokenIds.slice(0, this.output.numTokens);
  }

  /** Where a client's controls took effect. */
  get marks(): readonly ControlMark[] {
    return this.#marks;
  }

  /** Steers the reasoning; false where none goes on. */
  control(control: ThinkingControl): boolean {
    if (this.#isEnded || !this.output.isReasoning) return false;
    this.#controls.push(control);
    this.#context.engine.control(this.requestId, control);
    return true;
  }

  /** Takes in the next event; false when the completion is over. Throws ApiError. */
  async advance(): Promise<boolean> {
    if (this.#isEnded) return false;
    try {
      const next = await this.#events.next();
      if (this.#isEnded) return false;
      if (next.done) throw new ApiError('engine_failed', 'The engine stopped while it was serving this request.');
      const { queueMs } = next.value;
      if (queueMs !== undefined) this.#scheduledAt = Math.min(performance.now(), this.#submittedAt + queueMs);
      this.output.accept(next.value);
      this.#marks = next.value.controls ?? this.#marks;
      for (const { id } of next.value.tokens) this.tokenIds.push(id);
      this.#keepTime();
      if (this.output.finishReason !== null) this.#end(this.output.finishReason);
      return this.output.finishReason === null;
    } catch (error) {
      this.#errorCode = error instanceof ApiError ? error.code : 'internal_error';
      this.#end('error');
      if (this.#context.drain.isDraining) {
        throw new ApiError('shutting_down', 'The server is shutting down; send the request again elsewhere.');
      }
      throw error;
    }
  }

  /** The client is gone. Does nothing when the completion is over. */
  abort(): void {
    this.#end('abort');
  }

  #keepTime(): void {
    const { numTokens, numReasoning, numAnswer } = this.output;
    const now = performance.now();
    const numNew = numTokens - this.#numTimed;
    if (numNew > 0) {
      this.#firstTokenAt ??= now;
      if (this.#lastTokenAt !== null) this.#context.metrics.observeTokens(numNew, (now - this.#lastTokenAt) / 1000);
      this.#lastTokenAt = now;
      this.#numTimed = numTokens;
    }
    if (numAnswer > 0) this.#firstAnswerAt ??= now;
    if (numReasoning > 0) {
      this.#reasoningFrom ??= now;
      if (numAnswer === 0) this.#reasoningTo = now;
    }
  }

  #end(finishReason: string): void {
    if (this.#isEnded) return;
    this.#isEnded = true;
    this.#events.return?.().catch((error: unknown) => this.#origin.log.error(error, 'aborting a sequence failed'));
    const { numTokens, numReasoning, cachedTokens, reasoningEnded } = this.output;
    const { promptIds, sampling } = this.#job.engineRequest;
    const now = performance.now();
    const since = (time: number | null): number | null => (time === null ? null : (time - this.#startedAt) / 1000);
    const from = this.#reasoningFrom;
    const total = (now - this.#startedAt) / 1000;
    this.#context.metrics.observeCompletion({
      promptTokens: promptIds.length,
      maxTokens: sampling.maxTokens,
      numTokens,
      numReasoning,
      reasoningEnded,
      finishReason,
      total,
      toFirstToken: since(this.#firstTokenAt),
      toFirstAnswer: since(this.#firstAnswerAt),
      reasoning: from === null ? null : ((this.#reasoningTo ?? from) - from) / 1000,
      queue: between(this.#submittedAt, this.#scheduledAt),
      prefill: between(this.#scheduledAt, this.#firstTokenAt),
      decode: between(this.#firstTokenAt, this.#lastTokenAt),
    });
    const traceId = this.#trace(finishReason, now);
    this.#origin.log.info(
      {
        completion: this.requestId,
        ...(traceId === null ? {} : { trace_id: traceId }),
        finish_reason: finishReason,
        prompt_tokens: promptIds.length,
        cached_tokens: cachedTokens,
        reasoning_tokens: numReasoning,
        ...(reasoningEnded ? { reasoning_ended: reasoningEnded } : {}),
        completion_tokens: numTokens,
        seconds: Number(total.toFixed(3)),
      },
      'completion',
    );
  }
  /** Sends the completion's spans and returns their trace; null where nobody wants any. */
  #trace(finishReason: string, endedAt: number): string | null {
    const { tracer, modelNames } = this.#context;
    if (tracer === null) return null;
    const { promptIds, sampling, requestId } = this.#job.engineRequest;
    const { numTokens, numReasoning, cachedTokens } = this.output;
    const trace = tracer.contextOf(this.#origin);
    tracer.trace(trace, {
      id: requestId,
      model: modelNames[0]!,
      operation: this.#job.isPlain ? 'text_completion' : 'chat',
      sampling,
      promptTokens: promptIds.length,
      cachedTokens,
      completionTokens: numTokens,
      reasoningTokens: numReasoning,
      finishReason,
      errorCode: this.#errorCode,
      startedAt: this.#startedAt,
      submittedAt: this.#submittedAt,
      scheduledAt: this.#scheduledAt,
      firstTokenAt: this.#firstTokenAt,
      lastTokenAt: this.#lastTokenAt,
      endedAt,
    });
    return trace.traceId;
  }
}

/** Seconds; null where one of the two never came. */
function between(from: number | null, to: number | null): number | null {
  return from === null || to === null ? null : (to - from) / 1000;
}
