import type { GrammarCursor } from './grammar-cursor.js';
import { PhaseTracker } from './phase-tracker.js';
import type {
  ControlMark,
  EmittedToken,
  EngineRequest,
  FinishReason,
  ThinkingControl,
  TokenLogprobs,
} from './request.js';
import type { SampledToken } from './step-plan.js';
import { Steering, type ReasoningEnd } from './steering.js';

export type SequenceStatus = 'waiting' | 'running' | 'finished';

/** One request's tokens, counters, status and block table. Knows nothing of blocks' content or of other sequences. */
export class Sequence {
  readonly request: EngineRequest;
  /** order of arrival: who is older */
  readonly arrival: number;
  /** prompt, then completion */
  readonly tokens: number[]; // [num_tokens]
  readonly promptLength: number;
  /** most tokens, prompt included */
  readonly maxTokens: number;
  /** root of this sequence's hash chain */
  readonly rootHash: string;
  /** hashes of its full blocks, as far as they were needed */
  readonly blockHashes: string[] = []; // [num_full_blocks]

  status: SequenceStatus = 'waiting';
  finishReason: FinishReason | null = null;
  /** tokens 0 .. numComputed-1 have their latents in the blocks of the block table */
  numComputed = 0;
  /** tokens 0 .. numShared-1 lie in blocks taken from the prefix cache, which are never written */
  numShared = 0;
  /** blocks of this sequence's table that have been offered to the prefix cache, from the start */
  numPublished = 0;
  blockTable: number[] = []; // [num_blocks]
  /** whether this sequence runs the MTP module; false from the first hole in its entries on */
  runsMtp = false;
  /** entries 1 .. numMtp-1 of the MTP module lie in the blocks; slot 0 holds nothing */
  numMtp = 1;
  /** drafts that the next step may verify */
  draftIds: number[] = []; // [num_drafts]
  numDraftTokens = 0;
  numAcceptedTokens = 0;
  /** prompt tokens taken from the prefix cache when the sequence first ran; -1 until then */
  cachedTokens = -1;
  numPreemptions = 0;
  /** rises with whatever makes a step void that is under way: its part of it counts for nothing */
  epoch = 0;
  /** computed for the prefix cache alone: nobody is told of it */
  isPrewarm = false;
  /** when it was added, milliseconds */
  addedAt = 0;
  /** how long it waited for its first step, until that is told; null before and after */
  queueMs: number | null = null;
  /** set once, before the sequence first runs; null where the answer is free */
  grammar: GrammarCursor | null = null;

  readonly #phases: PhaseTracker;
  readonly #steering: Steering | null;
  readonly #stopIds: Set<number>;
  /** id -> times in the completion; kept only where a penalty needs it */
  readonly #history: Map<number, number> | null;

  constructor(request: EngineRequest, arrival: number, maxContext: number, rootHash: string) {
    const { promptIds, sampling } = request;
    this.request = request;
    this.arrival = arrival;
    this.tokens = [...promptIds];
    this.promptLength = promptIds.length;
    this.maxTokens = Math.min(promptIds.length + sampling.maxTokens, maxContext);
    this.rootHash = rootHash;
    this.#phases = new PhaseTracker(request.markers, request.startPhase);
    this.#steering = request.thinking === undefined ? null : new Steering(request.thinking, request.controls);
    this.#stopIds = new Set(sampling.stopTokenIds);
    const hasPenalty =
      sampling.presencePenalty !== 0 || sampling.frequencyPenalty !== 0 || sampling.repetitionPenalty !== 1;
    this.#history = hasPenalty ? new Map(promptIds.map((id) => [id, 0])) : null;
  }

  /** who runs first: lower priority, then earlier arrival */
  precedes(other: Sequence): boolean {
    const [own, its] = [this.request.priority ?? 0, other.request.priority ?? 0];
    return own === its ? this.arrival < other.arrival : own < its;
  }

  get id(): string {
    return this.request.requestId;
  }

  get numCompletion(): number {
    return this.tokens.length - this.promptLength;
  }

  /** Tokens that the next step has to compute before this sequence can be sampled. */
  get numPending(): number {
    return this.tokens.length - this.numComputed;
  }

  /**
   * Where the next step starts: at the first token that is not computed, or at the one before where the MTP module
   * needs its hidden state again for the entry that comes next.
   */
  get nextStart(): number {
    return this.runsMtp ? Math.min(this.numComputed, this.numMtp - 1) : this.numComputed;
  }

  /**
   * Most drafts that one step may verify: up to the last token, and with the same banned ids at every position. None
   * in an answer with a grammar, where each position has a mask of its own.
   */
  get maxDrafts(): number {
    if (this.followsGrammar) return 0;
    const room = this.maxTokens - 1 - this.tokens.length;
    const untilAllowed = this.request.sampling.minTokens - 1 - this.numCompletion;
    return Math.max(0, untilAllowed >= 0 && this.#stopIds.size > 0 ? Math.min(room, untilAllowed) : room);
  }

  /** [distinct id, times in the completion]; empty where no penalty is set. */
  get history(): ReadonlyMap<number, number> {
    return this.#history ?? NO_HISTORY;
  }

  /**
   * Ids that the next token, behind numUnknown others, may not be: the stop tokens, until minTokens are reached; and in
   * reasoning before an answer with a grammar, whatever leads past that answer.
   */
  bannedIdsAfter(numUnknown: number): ReadonlySet<number> {
    const isTooShort = this.numCompletion + numUnknown < this.request.sampling.minTokens;
    const { grammar, markers } = this.request;
    if (grammar === undefined || this.followsGrammar) return isTooShort ? this.#stopIds : NO_IDS;
    const banned = new Set([...grammar.endIds, ...(isTooShort ? this.#stopIds : [])]);
    if (markers.toolCallsBegin >= 0) banned.add(markers.toolCallsBegin);
    return banned;
  }

  /** Whether what a token is sampled from does not depend on which tokens came before it, but through the model. */
  get canRunAhead(): boolean {
    return this.request.grammar === undefined && this.#history === null && this.request.prefillOnly !== true;
  }

  /** Whether the next token is held to the grammar. */
  get followsGrammar(): boolean {
    return this.grammar !== null && this.#phases.phase !== 'reasoning';
  }

  /** Tokens that may still come. */
  get numLeft(): number {
    return this.maxTokens - this.tokens.length;
  }

  /**
   * Whether the next token cannot be sampled yet. A sequence with a grammar waits for its first mask in reasoning too:
   * with it comes how many tokens its answer needs, which ends the reasoning in time.
   */
  get awaitsMask(): boolean {
    return this.grammar !== null && !this.grammar.isReady;
  }

  /** Whether the limit is reached: what the grammar says then is whether the answer is complete. */
  get isAtLimit(): boolean {
    return this.numLeft <= 0;
  }

  /** Whether the grammar leaves nothing but the end. */
  get isGrammarComplete(): boolean {
    return this.followsGrammar && this.grammar!.isReady && this.grammar!.isComplete;
  }

  /** Which tokens may come next; null: all of them. */
  get mask(): Int32Array | null {
    return this.followsGrammar ? this.grammar!.mask : null;
  }

  /** A step has computed latents up to numComputed and entries of the MTP module up to numMtp. */
  advance(numComputed: number, numMtp: number): void {
    this.numComputed = numComputed;
    this.numMtp = numMtp;
    this.draftIds = [];
    // One missing entry is made when the row before it is computed again; a longer hole stays.
    if (numComputed >= numMtp + 1) this.runsMtp = false;
  }

  /** Forgets what was computed, to be computed again from the first token on. */
  reset(): void {
    this.epoch++;
    this.blockTable = [];
    this.numComputed = 0;
    this.numShared = 0;
    this.numPublished = 0;
    this.runsMtp = false;
    this.numMtp = 1;
    this.draftIds = [];
  }

  /** Appends a sampled token; the sequence may have finished with it. */
  append(tokenId: number, logprobs: TokenLogprobs | undefined): EmittedToken {
    const isStop = this.#stopIds.has(tokenId);
    this.tokens.push(tokenId);
    this.#history?.set(tokenId, (this.#history.get(tokenId) ?? 0) + 1);
    const isHeld = this.followsGrammar;
    if (isStop) this.finishReason = 'stop';
    else if (this.isAtLimit && !isHeld) this.finishReason = 'length';
    const phase = this.#phases.label(tokenId, isStop);
    if (this.finishReason === null && isHeld) this.grammar!.accept([tokenId], this.numLeft);
    else if (this.finishReason === null && this.followsGrammar) this.grammar!.begin(this.numLeft);
    this.#steering?.observe(tokenId, phase);
    return logprobs === undefined ? { id: tokenId, phase } : { id: tokenId, phase, logprobs };
  }

  /** Appends sampled tokens as far as nothing else is forced. `numRows` of them were looked at, the last was kept or not. */
  appendSampled(sampled: readonly SampledToken[]): { tokens: EmittedToken[]; numRows: number; isLastKept: boolean } {
    // What a client has ended while the step ran takes nothing of what the step has sampled.
    const tokens = this.appendForced();
    if (tokens.length > 0) return { tokens, numRows: 1, isLastKept: false };
    let numRows = 0;
    let isLastKept = true;
    for (const { id, logprobs } of sampled) {
      numRows++;
      const extension = this.#appendExtension(id);
      isLastKept = extension.length === 0;
      if (isLastKept) tokens.push(this.append(id, logprobs));
      const forced = isLastKept ? this.appendForced() : extension;
      tokens.push(...forced);
      // Behind reasoning each token needs the mask that the one before has led to.
      if (forced.length > 0 || this.finishReason !== null || this.followsGrammar) break;
    }
    return { tokens, numRows, isLastKept };
  }

  /** Takes in what a client asks of the reasoning; does nothing where that is over or cannot be steered. */
  control(control: ThinkingControl): void {
    const { thinking, markers } = this.request;
    if (thinking?.endIds.at(-1) !== markers.thinkEnd || !this.#phases.isReasoning) return;
    this.#steering?.control(control);
  }

  /**
   * What is appended in place of a sampled end of reasoning that a client has extended; empty where the token stands.
   */
  #appendExtension(tokenId: number): EmittedToken[] {
    const isEnd = tokenId === this.request.markers.thinkEnd || this.#stopIds.has(tokenId);
    if (this.#steering === null || !isEnd || this.#phases.phase !== 'reasoning') return [];
    const extension: EmittedToken[] = [];
    for (const id of this.#steering.extensionIds(this.numLeft, this.#numNeeded)) {
      extension.push({ ...this.append(id, undefined), forced: true });
      const forced = this.appendForced();
      extension.push(...forced);
      if (forced.length > 0 || this.finishReason !== null) break;
    }
    return extension;
  }

  /** Appends what is forced after the tokens so far. Whatever was sampled for the positions after them is void. */
  appendForced(): EmittedToken[] {
    if (this.#steering === null || this.finishReason !== null || this.#phases.phase !== 'reasoning') return [];
    const forced: EmittedToken[] = [];
    for (const id of this.#steering.forcedIds(this.numLeft, this.#numNeeded)) {
      forced.push({ ...this.append(id, undefined), forced: true });
      if (this.finishReason !== null) break;
    }
    return forced;
  }

  /** Appends the first tokens of a completion that goes on behind them. Throws RangeError where it cannot have them. */
  resume(ids: readonly number[]): void {
    let index = 0;
    while (index < ids.length) {
      // Forced before the first token is a client's end of the reasoning alone.
      const isBegun = index > 0 || this.appendForced().length === 0;
      if (isBegun) this.append(ids[index++]!, undefined);
      const forced = isBegun ? this.appendForced().map(({ id }) => id) : this.tokens.slice(this.promptLength);
      const isForced = forced.every((id) => ids[index++] === id);
      if (this.finishReason !== null || !isForced) {
        throw new RangeError(`token ${index} of those to go on behind ends this completion or is another one's`);
      }
    }
  }

  /** Tokens that an answer with a grammar needs to be complete; 0 where the limit has no room for them anyway. */
  get #numNeeded(): number {
    const numToEnd = this.grammar?.numToEnd ?? 0;
    const numEnd = this.request.thinking?.endIds.length ?? 0;
    return numToEnd + numEnd < this.maxTokens - this.promptLength ? numToEnd : 0;
  }

  get controls(): readonly ControlMark[] {
    return this.#steering?.marks ?? NO_MARKS;
  }

  get reasoningEnded(): ReasoningEnd | null {
    return this.#steering?.ended ?? null;
  }
}

const NO_HISTORY: ReadonlyMap<number, number> = new Map();
const NO_IDS: ReadonlySet<number> = new Set();
const NO_MARKS: readonly ControlMark[] = [];
