import { ApiError } from '../errors.js';
import { isLastOfLength, isUnderWay, planAhead } from './ahead-planner.js';
import { BlockPool } from './block-pool.js';
import type { CacheEvent } from './cache-events.js';
import { checkRequest, type RequestLimits } from './check-request.js';
import { DraftPlanner } from './draft-planner.js';
import { FixedDrafts, type DraftPolicy } from './draft-policy.js';
import { GrammarCursor, type GrammarFollower } from './grammar-cursor.js';
import { PlanBuilder } from './plan-builder.js';
import { PrefixCache, type CachedBlock } from './prefix-cache.js';
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
import { Sequence } from './sequence.js';
import type { StepResult } from './step-batch.js';
import type { PlannedSequence, SequenceOutcome, StepPlan } from './step-plan.js';

export interface SchedulerOptions {
  blockSize: number;
  numBlocks: number;
  /** token budget of one step; at least maxNumSeqs, so that decodes never starve a prefill */
  maxStepTokens: number;
  maxNumSeqs: number;
  limits: RequestLimits;
  /** names the weights in the prefix cache's hashes */
  fingerprint: string;
  /** who drafts how much; nobody where it is left out */
  drafts?: DraftPolicy;
  /** milliseconds of a clock: events then say how long their sequence waited */
  now?: () => number;
  /** told of whatever changes in the prefix cache */
  onCacheEvent?: (event: CacheEvent) => void;
  /** follows the grammars of sequences; without it requests with a grammar are refused */
  grammars?: GrammarFollower;
}

/**
 * Decides what each step computes. Waiting and running sequences are both in order of priority and arrival: the last
 * running sequence is preempted first, and the first waiting one is admitted first.
 */
export class Scheduler {
  readonly #options: SchedulerOptions;
  readonly #pool: BlockPool;
  readonly #cache: PrefixCache;
  readonly #drafts: DraftPolicy;
  readonly #speculation: DraftPlanner;
  readonly #prewarmer: Prewarmer;
  readonly #open = new Map<string, Sequence>();
  /** of the open sequences, parts of prompts that nobody has asked for: they take no request's place */
  #numPrewarms = 0;
  readonly #waiting: Sequence[] = []; // [num_waiting]
  readonly #running: Sequence[] = []; // [num_running]
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
    this.#pool = new BlockPool(options.numBlocks);
    this.#cache = new PrefixCache(this.#pool, options.blockSize, options.fingerprint, options.onCacheEvent);
    this.#drafts = options.drafts ?? new FixedDrafts(0);
    this.#speculation = new DraftPlanner(this.#drafts, this.#cache, options.blockSize);
    this.#prewarmer = new Prewarmer(this.#cache, options.blockSize, options.maxStepTokens);
  }

  get isIdle(): boolean {
    return this.#open.size === 0;
  }

  /** Queues a request; throws ApiError where it can never be served or the queue is full. */
  add(request: EngineRequest): void {
    checkRequest(request, this.#open.size - this.#numPrewarms, this.#options.limits);
    if (request.grammar && this.#options.grammars === undefined) {
      throw new ApiError('unsupported_parameter', 'This engine cannot hold output to a format.', 'response_format');
    }
    if (this.#open.has(request.requestId)) throw new Error(`request id ${request.requestId} is in use`);
    const rootHash = this.#cache.rootHash(request.cacheSalt);
    const sequence = new Sequence(request, this.#numArrived++, this.#options.limits.maxContext, rootHash);
    if (request.grammar) this.#follow(sequence, request.grammar);
    else sequence.resume(request.resumedIds ?? []);
    if (this.#options.now) sequence.addedAt = this.#options.now();
    this.#open.set(request.requestId, sequence);
    insert(this.#waiting, sequence);
  }

  /** Ends a sequence from outside; null where no such sequence is open. */
  end(requestId: string, finishReason: 'abort' | 'error', error?: EngineEvent['error']): EngineEvent | null {
    const sequence = this.#open.get(requestId);
    if (sequence === undefined) return null;
    return this.#finish(sequence, finishReason, { error });
  }

  control(requestId: string, control: ThinkingControl): void {
    this.#open.get(requestId)?.control(control);
  }

  /** Takes a prompt that is computed when nothing is open. One that no context holds is none of a next request. */
  prewarm(prewarm: PrewarmRequest): void {
    if (prewarm.promptIds.length < this.#options.limits.maxContext) this.#prewarmer.add(prewarm);
  }

  openIds(): string[] {
    return [...this.#open.keys()];
  }

  /** Where the sequences stand that have had no event yet. */
  progress(): [requestId: string, progress: RequestProgress][] {
    const waiting = this.#waiting.map((sequence, numAhead): [string, RequestProgress] => [
      sequence.id,
      { status: 'waiting', numAhead },
    ]);
    const prefills = this.#running
      .filter(({ numCompletion, numPending }) => numCompletion === 0 && numPending > 0)
      .map(({ id, numComputed, promptLength }): [string, RequestProgress] => [
        id,
        { status: 'prefill', numComputed, numTokens: promptLength },
      ]);
    return [...waiting, ...prefills];
  }

  /**
   * The next step: decodes first, with their drafts as far as every other sequence still gets its rows, then
   * running prefills, then waiting sequences; null where nothing is open.
   */
  schedule(): StepPlan | null {
    const { maxStepTokens, maxNumSeqs } = this.#options;
    if (this.#open.size === 0) this.#beginPrewarm();
    const plan = new PlanBuilder(maxStepTokens);
    const numPreemptions = this.#counters.numPreemptions;
    const decodes = this.#running.filter((sequence) => sequence.numPending === 1);
    const prefills = this.#running.filter((sequence) => sequence.numPending > 1);
    for (const sequence of decodes) if (sequence.status === 'running') this.#plan(sequence, plan);
    // Two rows, because a prefill that runs the MTP module computes one again.
    const numOthers = Math.min(prefills.length + this.#waiting.length, maxNumSeqs - decodes.length);
    this.#speculation.addDrafts(plan, plan.budget - 2 * numOthers, this.#running.length);
    for (const sequence of prefills) if (sequence.status === 'running') this.#plan(sequence, plan);
    if (this.#counters.numPreemptions === numPreemptions) this.#admit(plan);
    this.#speculation.planMtp(plan.parts(), this.#running.length);
    if (plan.parts().length === 0) {
      if (this.#running.some(({ awaitsMask }) => awaitsMask)) return null; // onGrammar tells when to go on
      if (this.#open.size > 0) throw new Error('no open sequence can make progress');
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
    const hasPlace = this.#running.length - numEnding < this.#options.maxNumSeqs;
    if (parts.length < this.#running.length || (this.#waiting.length > 0 && hasPlace)) return null;
    return planAhead(before, this.#cache, this.#options.blockSize);
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
      numRunning: this.#running.length,
      numWaiting: this.#waiting.length,
      numBlocks: this.#pool.numBlocks,
      numFreeBlocks: this.#pool.numFree,
      numCachedBlocks: this.#cache.numIdle,
      blockSize: this.#options.blockSize,
      ...this.#counters,
      ...this.#speculation.counters(),
      numRestarts: 0,
    };
  }

  /** Hashes that the prefix cache finds: for checks. */
  findable(): string[] {
    return this.#cache.findable();
  }

  /** What the prefix cache holds: for checks. */
  published(): readonly Readonly<CachedBlock>[] {
    return this.#cache.published();
  }

  /** The counts alone: cheap enough for every idle moment. */
  checkCounts(): void {
    this.#cache.checkCounts();
    if (this.isIdle && this.#pool.numReferenced !== 0) {
      throw new Error(`block invariant broken: ${this.#pool.numReferenced} blocks referenced by nobody`);
    }
  }

  /**
   * free + referenced + cached-only == total, each block is referenced as often as it stands in block tables, and
   * running and waiting sequences are in order.
   */
  checkInvariant(): void {
    this.checkCounts();
    for (const queue of [this.#running, this.#waiting]) {
      if (queue.some((sequence, index) => index > 0 && !queue[index - 1]!.precedes(sequence))) {
        throw new Error(`order of sequences broken: ${queue.map(({ id }) => id).join(', ')}`);
      }
    }
    this.#cache.checkInvariant();
    const references = new Int32Array(this.#pool.numBlocks); // [num_blocks]
    for (const sequence of this.#open.values()) {
      for (const blockId of sequence.blockTable) references[blockId]!++;
      if (sequence.status === 'waiting' && sequence.blockTable.length > 0) {
        throw new Error(`block invariant broken: waiting sequence ${sequence.id} owns blocks`);
      }
    }
    for (const [blockId, count] of references.entries()) {
      if (this.#pool.references(blockId) !== count) {
        throw new Error(
          `block invariant broken: block ${blockId} has ${this.#pool.references(blockId)} references, ${count} users`,
        );
      }
      if (count > 1 && !this.#cache.isPublished(blockId)) {
        throw new Error(`block invariant broken: unpublished block ${blockId} is shared`);
      }
    }
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
    const { maxContext } = this.#options.limits;
    const sequence = new Sequence(request, this.#numArrived++, maxContext, this.#cache.rootHash(request.cacheSalt));
    sequence.isPrewarm = true;
    this.#numPrewarms++;
    sequence.cachedTokens = 0; // no query of a request
    this.#open.set(sequence.id, sequence);
    insert(this.#waiting, sequence);
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
    const { blockSize } = this.#options;
    const { blockTable, numComputed } = sequence;
    let numNeeded = Math.ceil((numComputed + wanted) / blockSize) - blockTable.length;
    while (numNeeded > this.#cache.numAvailable) {
      const youngest = this.#running.at(-1)!;
      if (youngest === sequence) {
        numNeeded = this.#cache.numAvailable;
        break;
      }
      plan.remove(youngest);
      this.#preempt(youngest);
    }
    for (let taken = 0; taken < numNeeded; taken++) blockTable.push(this.#cache.take()!);
    return Math.min(wanted, blockTable.length * blockSize - numComputed);
  }

  /** Back into the queue, to be recomputed with what it has generated as part of its prefill. */
  #preempt(sequence: Sequence): void {
    this.#running.pop();
    this.#release(sequence);
    sequence.status = 'waiting';
    sequence.numPreemptions++;
    this.#counters.numPreemptions++;
    insert(this.#waiting, sequence);
  }

  /** Lets waiting sequences run, oldest first, as long as each finds blocks for all of its tokens. */
  #admit(plan: PlanBuilder): void {
    while (this.#running.length < this.#options.maxNumSeqs && plan.budget > 0) {
      const sequence = this.#waiting[0];
      if (sequence === undefined || !this.#takePrefix(sequence)) return;
      this.#waiting.shift();
      insert(this.#running, sequence);
      sequence.status = 'running';
      this.#plan(sequence, plan);
    }
  }

  /**
   * Gives a waiting sequence its blocks from the prefix cache. The last token is always computed, because its row is
   * sampled; where its block came from the cache it is computed without being written.
   */
  #takePrefix(sequence: Sequence): boolean {
    const { blockSize } = this.#options;
    const { tokens, rootHash, blockHashes } = sequence;
    this.#cache.extendHashes(blockHashes, rootHash, tokens);
    const { blockIds, numWithMtp } = this.#cache.findPrefix(blockHashes, rootHash, tokens);
    const runsMtp = this.#drafts.wantsMtp(
      Math.min(this.#options.maxNumSeqs, this.#running.length + this.#waiting.length),
      blockSize * (blockIds.length - numWithMtp),
    );
    const blockTable = runsMtp ? blockIds.slice(0, numWithMtp) : blockIds;
    this.#cache.takeFound(blockTable);
    const numNeeded = Math.ceil(tokens.length / blockSize) - blockTable.length;
    // One block more for each running sequence, or it would be preempted as soon as they grow.
    if (numNeeded + this.#running.length > this.#cache.numAvailable) {
      this.#cache.release(blockTable);
      return false;
    }
    sequence.blockTable = blockTable;
    sequence.numShared = blockTable.length * blockSize;
    sequence.numComputed = Math.min(sequence.numShared, tokens.length - 1);
    sequence.numPublished = blockTable.length;
    sequence.runsMtp = runsMtp;
    if (runsMtp) sequence.numMtp = Math.max(1, sequence.numShared);
    this.#drafts.admit(runsMtp);
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
          this.#publish(sequence);
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
        this.#publish(sequence);
        if (sequence.isGrammarComplete) sequence.finishReason ??= 'stop'; // of the empty grammar, behind reasoning
        if (sequence.finishReason === null) return this.#event(sequence, { tokens });
        const stopTokenId = sequence.finishReason === 'stop' ? tokens.at(-1)!.id : undefined;
        return this.#finish(sequence, sequence.finishReason, { tokens, stopTokenId });
      }
    }
  }

  /**
   * Offers the full computed blocks to the prefix cache. Called only when a row came out finite, which vouches for
   * every latent it attended to; so the blocks of a prefill are published at its end, not chunk by chunk.
   */
  #publish(sequence: Sequence): void {
    const { blockSize } = this.#options;
    const { tokens, rootHash, blockHashes, blockTable, numComputed, numMtp } = sequence;
    const numFull = Math.floor(numComputed / blockSize);
    if (sequence.numPublished >= numFull) return;
    this.#cache.extendHashes(blockHashes, rootHash, tokens);
    while (sequence.numPublished < numFull) {
      const index = sequence.numPublished++;
      const hasMtp = numMtp >= (index + 1) * blockSize;
      this.#cache.publish(blockTable[index]!, index, blockHashes, rootHash, tokens, hasMtp);
    }
  }

  #release(sequence: Sequence): void {
    this.#cache.release(sequence.blockTable);
    sequence.reset();
  }

  #finish(sequence: Sequence, finishReason: FinishReason, rest: Partial<EngineEvent>): EngineEvent {
    const queue = sequence.status === 'running' ? this.#running : this.#waiting;
    queue.splice(queue.indexOf(sequence), 1);
    this.#open.delete(sequence.id);
    if (sequence.isPrewarm) this.#numPrewarms--;
    sequence.grammar?.close();
    this.#release(sequence);
    sequence.status = 'finished';
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

/** Keeps a queue in order; most sequences belong to its end. */
function insert(queue: Sequence[], sequence: Sequence): void {
  let index = queue.length;
  while (index > 0 && sequence.precedes(queue[index - 1]!)) index--;
  queue.splice(index, 0, sequence);
}
