import { ApiError } from '../errors.js';
import { isLastOfLength, isUnderWay, planAhead } from './ahead-planner.js';
import { BlockTables, type BlockTableOptions } from './block-tables.js';
import { checkRequest, type RequestLimits } from './check-request.js';
import { DraftPlanner } from './draft-planner.js';
import { FixedDrafts, type DraftPolicy } from './draft-policy.js';
import { GrammarCursor, type GrammarFollower } from './grammar-cursor.js';
import { PlanBuilder } from './plan-builder.js';
import type { CachedBlock } from './prefix-cache.js';
import { Prewarmer } from './prewarmer.js';
import type {
  EngineEvent,
  EngineRequest,
  EngineStats,
  FinishReason,
  PrewarmRequest,
  RequestGrammar,
  RequestProgress,
  ThinkingControl,
} from './request.js';
import { SequenceQueues } from './sequence-queues.js';
import { Sequence } from './sequence.js';
import type { StepResult } from './step-batch.js';
import type { PlannedSequence, SequenceOutcome, StepPlan } from './step-plan.js';

export interface SchedulerOptions extends BlockTableOptions {
  /** token budget of one step; at least maxNumSeqs, so that decodes never starve a prefill */
  maxStepTokens: number;
  maxNumSeqs: number;
  limits: RequestLimits;
  /** who drafts how much; nobody where it is left out */
  drafts?: DraftPolicy;
  /** milliseconds of a clock: events then say how long their sequence waited */
  now?: () => number;
  /** follows the grammars of sequences; without it requests with a grammar are refused */
  grammars?: GrammarFollower;
}

/** Decides what each step computes. */
export class Scheduler {
  readonly #options: SchedulerOptions;
  readonly #queues = new SequenceQueues();
  readonly #blocks: BlockTables;
  readonly #drafts: DraftPolicy;
  readonly #speculation: DraftPlanner;
  readonly #prewarmer: Prewarmer;
  #numArrived = 0;
  /** Called when a mask has come: the event of a sequence that has ended with it, or null. */
  onGrammar: (event: EngineEvent | null) => void = () => {};
  readonly #counters = {
    numSteps: 0,
    numPreemptions: 0,
    promptTokens: 0,
    generationTokens: 0,
    prewarmedTokens: 0,
    prefixCacheQueries: 0,
    prefixCacheHits: 0,
  };

  constructor(options: SchedulerOptions) {
    if (options.maxStepTokens < options.maxNumSeqs) {
      throw new RangeError(`maxStepTokens (${options.maxStepTokens}) is below maxNumSeqs (${options.maxNumSeqs})`);
    }
    if (options.limits.maxContext > options.numBlocks * options.blockSize) {
      throw new RangeError(`maxContext (${options.limits.maxContext}) is more than the blocks hold`);
    }
    this.#options = options;
    this.#blocks = new BlockTables(options);
    const { cache } = this.#blocks;
    this.#drafts = options.drafts ?? new FixedDrafts(0);
    this.#speculation = new DraftPlanner(this.#drafts, cache, options.blockSize);
    this.#prewarmer = new Prewarmer(cache, options.blockSize, options.maxStepTokens);
  }

  get isIdle(): boolean {
    return this.#queues.size === 0;
  }

  /** Queues a request; throws ApiError where it can never be served or the queue is full. */
  add(request: EngineRequest): void {
    checkRequest(request, this.#queues.numRequests, this.#options.limits);
    if (request.grammar && this.#options.grammars === undefined) {
      throw new ApiError('unsupported_parameter', 'This engine cannot hold output to a format.', 'response_format');
    }
    if (this.#queues.get(request.requestId)) throw new Error(`request id ${request.requestId} is in use`);
    const sequence = this.#open(request);
    if (request.grammar) this.#follow(sequence, request.grammar);
    else sequence.resume(request.resumedIds ?? []);
    if (this.#options.now) sequence.addedAt = this.#options.now();
    this.#queues.add(sequence);
  }

  /** Ends a sequence from outside; null where no such sequence is open. */
  end(requestId: string, finishReason: 'abort' | 'error', error?: EngineEvent['error']): EngineEvent | null {
    const sequence = this.#queues.get(requestId);
    if (sequence === undefined) return null;
    return this.#finish(sequence, finishReason, { error });
  }

  control(requestId: string, control: ThinkingControl): void {
    this.#queues.get(requestId)?.control(control);
  }

  /** Takes a prompt that is computed when nothing is open. One that no context holds is none of a next request. */
  prewarm(prewarm: PrewarmRequest): void {
    if (prewarm.promptIds.length < this.#options.limits.maxContext) this.#prewarmer.add(prewarm);
  }

  openIds(): string[] {
    return this.#queues.ids();
  }

  /** Where the sequences stand that have had no event yet. */
  progress(): [requestId: string, progress: RequestProgress][] {
    return this.#queues.progress();
  }

  /**
   * The next step: decodes first, with their drafts as far as every other sequence still gets its rows, then
   * running prefills, then waiting sequences; null where nothing is open.
   */
  schedule(): StepPlan | null {
    const { maxStepTokens, maxNumSeqs } = this.#options;
    if (this.isIdle) this.#beginPrewarm();
    const plan = new PlanBuilder(maxStepTokens);
    const numPreemptions = this.#counters.numPreemptions;
    const { running, waiting } = this.#queues;
    const decodes = running.filter((sequence) => sequence.numPending === 1);
    const prefills = running.filter((sequence) => sequence.numPending > 1);
    for (const sequence of decodes) if (sequence.status === 'running') this.#plan(sequence, plan);
    // Two rows, because a prefill that runs the MTP module computes one again.
    const numOthers = Math.min(prefills.length + waiting.length, maxNumSeqs - decodes.length);
    this.#speculation.addDrafts(plan, plan.budget - 2 * numOthers, running.length);
    for (const sequence of prefills) if (sequence.status === 'running') this.#plan(sequence, plan);
    if (this.#counters.numPreemptions === numPreemptions) this.#admit(plan);
    this.#speculation.planMtp(plan.parts(), running.length);
    if (plan.parts().length === 0) {
      if (running.some(({ awaitsMask }) => awaitsMask)) return null; // onGrammar tells when to go on
      if (!this.isIdle) throw new Error('no open sequence can make progress');
      return null;
    }
    return { sequences: plan.parts() };
  }

  /**
   * The step behind one that is not committed yet, to be launched at once; null where it has to be waited for. No
   * sequence is left out of it for long: who waits for a place that is there, or runs without having been in that step,
   * ends it. schedule() is for when no step is under way.
   */
  scheduleAhead(before: StepPlan): StepPlan | null {
    const parts = before.sequences.filter(isUnderWay);
    const numEnding = parts.filter(isLastOfLength).length;
    const { running, waiting } = this.#queues;
    const hasPlace = running.length - numEnding < this.#options.maxNumSeqs;
    if (parts.length < running.length || (waiting.length > 0 && hasPlace)) return null;
    return planAhead(before, this.#blocks.cache, this.#options.blockSize);
  }

  /** Takes over how long a step took, from the end of the one before to its own end. */
  observe(plan: StepPlan, result: StepResult, totalMicros: number): void {
    this.#speculation.observe(plan, result, totalMicros);
  }

  /** Takes over what a step computed: one event per sequence that has something to say. */
  commit(plan: StepPlan, outcomes: SequenceOutcome[]): EngineEvent[] {
    this.#counters.numSteps++;
    const events: EngineEvent[] = [];
    for (const [index, part] of plan.sequences.entries()) {
      // Ended or taken elsewhere while the step ran: its blocks may be another's, and what came out is dropped.
      if (!isUnderWay(part)) continue;
      const event = this.#commitSequence(part, outcomes[index]!);
      if (event !== null && !part.sequence.isPrewarm) events.push(event);
    }
    return events;
  }

  stats(): EngineStats {
    return {
      numRunning: this.#queues.running.length,
      numWaiting: this.#queues.waiting.length,
      ...this.#blocks.counts(),
      ...this.#counters,
      ...this.#speculation.counters(),
      numRestarts: 0,
    };
  }

  /** Hashes that the prefix cache finds: for checks. */
  findable(): string[] {
    return this.#blocks.cache.findable();
  }

  /** What the prefix cache holds: for checks. */
  published(): readonly Readonly<CachedBlock>[] {
    return this.#blocks.cache.published();
  }

  /** The counts alone: cheap enough for every idle moment. */
  checkCounts(): void {
    this.#blocks.checkCounts(this.isIdle);
  }

  /**
   * free + referenced + cached-only == total, each block is referenced as often as it stands in block tables, and
   * running and waiting sequences are in order.
   */
  checkInvariant(): void {
    this.checkCounts();
    this.#queues.checkOrder();
    this.#blocks.checkReferences([...this.#queues.running, ...this.#queues.waiting]);
  }

  #open(request: EngineRequest): Sequence {
    const rootHash = this.#blocks.cache.rootHash(request.cacheSalt);
    return new Sequence(request, this.#numArrived++, this.#options.limits.maxContext, rootHash);
  }

  /** Opens a sequence's grammar; what becomes of it is told through onGrammar. */
  #follow(sequence: Sequence, grammar: RequestGrammar): void {
    const stopIds = grammar.endIds.filter((id) => sequence.request.sampling.stopTokenIds.includes(id));
    const numLeft = sequence.request.startPhase === 'answer' ? sequence.numLeft : Infinity;
    let resumedIds = sequence.request.resumedIds ?? [];
    sequence.grammar = new GrammarCursor(this.#options.grammars!, grammar, stopIds, numLeft, {
      onReady: () => {
        // Where the reasoning is ended depends on what came with the first mask.
        const ids = resumedIds;
        resumedIds = [];
        if (ids.length > 0) sequence.resume(ids);
        const isOver = (sequence.isGrammarComplete || sequence.isAtLimit) && sequence.status !== 'finished';
        if (!isOver) return this.onGrammar(null);
        const rest = sequence.isGrammarComplete ? { stopTokenId: -1 } : {};
        this.onGrammar(this.#finish(sequence, sequence.isGrammarComplete ? 'stop' : 'length', rest));
      },
      onFailed: (error) => this.onGrammar(this.end(sequence.id, 'error', error)),
    });
  }

  /** With nothing else to do, the next part of a prompt that may be asked for becomes a sequence. */
  #beginPrewarm(): void {
    const request = this.#prewarmer.next();
    if (request === null) return;
    const sequence = this.#open(request);
    sequence.isPrewarm = true;
    sequence.cachedTokens = 0; // no query of a request
    this.#queues.add(sequence);
  }

  /** Puts as many pending tokens of a running sequence into the plan as budget and blocks allow. */
  #plan(sequence: Sequence, plan: PlanBuilder): void {
    if (sequence.awaitsMask) return;
    const { numPending, numComputed } = sequence;
    // A row that is computed again for the MTP module must leave room for one that is not.
    if (sequence.nextStart < numComputed && plan.budget < 2) sequence.runsMtp = false;
    const numAgain = numComputed - sequence.nextStart;
    const wanted = Math.min(numPending, plan.budget - numAgain);
    const count = wanted > 0 ? this.#reserve(sequence, wanted, plan) : 0;
    if (count === 0) return;
    plan.add({
      sequence,
      start: sequence.nextStart,
      count: numAgain + count,
      numSampled: count === numPending ? 1 : 0,
      draftIds: [],
      runMtp: sequence.runsMtp,
      numDrafts: 0,
      epoch: sequence.epoch,
    });
  }

  /**
   * Gives a sequence the blocks for its next tokens, preempting younger ones where none is left. Returns how many
   * tokens have room; fewer than wanted only where this sequence is itself the youngest.
   */
  #reserve(sequence: Sequence, wanted: number, plan: PlanBuilder): number {
    while (this.#blocks.numMissing(sequence, wanted) > this.#blocks.cache.numAvailable) {
      const youngest = this.#queues.running.at(-1)!;
      if (youngest === sequence) break;
      plan.remove(youngest);
      this.#preemptLast();
    }
    return this.#blocks.grow(sequence, wanted);
  }

  /** The last running sequence goes back into the queue, to be recomputed with what it has generated as part of its prefill. */
  #preemptLast(): void {
    const sequence = this.#queues.preemptLast();
    this.#blocks.release(sequence);
    sequence.numPreemptions++;
    this.#counters.numPreemptions++;
  }

  /** Lets waiting sequences run, oldest first, as long as each finds blocks for all of its tokens. */
  #admit(plan: PlanBuilder): void {
    const { running, waiting } = this.#queues;
    while (running.length < this.#options.maxNumSeqs && plan.budget > 0) {
      const sequence = waiting[0];
      if (sequence === undefined || !this.#takePrefix(sequence)) return;
      this.#plan(this.#queues.admitFirst(), plan);
    }
  }

  #takePrefix(sequence: Sequence): boolean {
    const { running, waiting } = this.#queues;
    const numSequences = Math.min(this.#options.maxNumSeqs, running.length + waiting.length);
    const wantsMtp = (numLost: number) => this.#drafts.wantsMtp(numSequences, numLost);
    // One block more for each running sequence, or it would be preempted as soon as they grow.
    if (!this.#blocks.takePrefix(sequence, running.length, wantsMtp)) return false;
    this.#drafts.admit(sequence.runsMtp);
    if (sequence.cachedTokens < 0) {
      if (this.#options.now) sequence.queueMs = this.#options.now() - sequence.addedAt;
      sequence.cachedTokens = Math.min(sequence.numShared, sequence.promptLength);
      this.#counters.prefixCacheQueries += sequence.promptLength;
      this.#counters.prefixCacheHits += sequence.cachedTokens;
    }
    return true;
  }

  #commitSequence(part: PlannedSequence, outcome: SequenceOutcome): EngineEvent | null {
    const { sequence, start, count, draftIds } = part;
    switch (outcome.kind) {
      case 'failed':
        return this.#finish(sequence, 'error', { error: { code: 'engine_failed', message: outcome.message } });
      case 'non_finite':
        return this.#finish(sequence, 'error', {
          error: { code: 'non_finite_logits', message: 'The model computed a value that is no finite number.' },
        });
      case 'computed':
        sequence.advance(start + count, part.runMtp ? start + count : sequence.numMtp);
        return null;
      case 'sampled': {
        this.#speculation.count(sequence, draftIds.length, outcome.tokens.length - 1);
        if (sequence.isPrewarm) this.#counters.prewarmedTokens += sequence.promptLength - sequence.numShared;
        else if (sequence.numCompletion === 0) this.#counters.promptTokens += sequence.promptLength;
        if (sequence.request.prefillOnly) {
          // The row vouches for what was computed; what was sampled from it is dropped.
          sequence.advance(start + count, part.runMtp ? start + count : sequence.numMtp);
          this.#blocks.publish(sequence);
          return this.#finish(sequence, 'stop', {});
        }
        const { tokens, numRows, isLastKept } = sequence.appendSampled(outcome.tokens);
        this.#counters.generationTokens += tokens.length;
        if (tokens.length !== 1 || !isLastKept) sequence.epoch++; // a next step under way has not known of these
        // Whatever was sampled behind the last row looked at is dropped. So is the MTP entry of a token that was not kept.
        const numComputed = start + count - draftIds.length + numRows - 1;
        sequence.advance(numComputed, part.runMtp ? numComputed + Number(isLastKept) : sequence.numMtp);
        // Drafts follow the last token sampled; forced tokens take their place.
        if (numRows === tokens.length && isLastKept && !sequence.followsGrammar) sequence.draftIds = outcome.draftIds;
        this.#blocks.publish(sequence);
        if (sequence.isGrammarComplete) sequence.finishReason ??= 'stop'; // of the empty grammar, behind reasoning
        if (sequence.finishReason === null) return this.#event(sequence, { tokens });
        const stopTokenId = sequence.finishReason === 'stop' ? tokens.at(-1)!.id : undefined;
        return this.#finish(sequence, sequence.finishReason, { tokens, stopTokenId });
      }
    }
  }

  #finish(sequence: Sequence, finishReason: FinishReason, rest: Partial<EngineEvent>): EngineEvent {
    this.#queues.remove(sequence);
    sequence.grammar?.close();
    this.#blocks.release(sequence);
    sequence.finishReason = finishReason;
    return this.#event(sequence, { ...rest, finishReason });
  }

  #event(sequence: Sequence, rest: Partial<EngineEvent>): EngineEvent {
    const {
      id,
      cachedTokens,
      reasoningEnded,
      controls,
      numDraftTokens: draftTokens,
      numAcceptedTokens: acceptedTokens,
      queueMs,
    } = sequence;
    sequence.queueMs = null;
    return {
      requestId: id,
      tokens: [],
      cachedTokens: Math.max(0, cachedTokens),
      ...(this.#drafts.isOn ? { speculative: { draftTokens, acceptedTokens } } : {}),
      ...(reasoningEnded === null ? {} : { reasoningEnded }),
      ...(controls.length === 0 ? {} : { controls: [...controls] }),
      ...(queueMs === null ? {} : { queueMs }),
      ...rest,
    };
  }
}
