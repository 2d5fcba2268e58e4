/** What goes into an engine and what comes out: plain values that can cross a process boundary. */
import type { GrammarNode } from '../grammar/grammar.js';
import type { ReasoningEnd } from './steering.js';

export interface SamplingParams {
  temperature: number; // 0 is greedy
  topP: number; // (0, 1], 1 is off
  topK: number; // 0 is off
  minP: number; // [0, 1], 0 is off
  /** 64 bits; always set (drawn by the API when the client gave none) */
  seed: bigint;
  presencePenalty: number; // [-2, 2]
  frequencyPenalty: number; // [-2, 2]
  repetitionPenalty: number; // > 0, 1 is off
  logitBias: [tokenId: number, bias: number][];
  /** tokens whose sampling ends the sequence (eos included unless ignoreEos) */
  stopTokenIds: number[];
  /** completion tokens before a stop token may be sampled */
  minTokens: number;
  maxTokens: number;
  /** -1 none, 0 of the sampled token, k also the k most likely */
  numLogprobs: number;
}

/** The most likely token, one of them, and nothing that changes it. */
export const GREEDY: Readonly<SamplingParams> = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 0n,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
  stopTokenIds: [],
  minTokens: 0,
  maxTokens: 1,
  numLogprobs: -1,
};

/**
 * What a token is part of, decided from token ids alone. 'control' tokens (think and tool markers, stop tokens)
 * switch phases and carry no text for the client.
 */
export type TokenPhase = 'reasoning' | 'answer' | 'tool' | 'control';

/** Token ids that switch phases; -1 where the vocabulary has no such token. */
export interface PhaseMarkers {
  thinkStart: number;
  thinkEnd: number;
  toolCallsBegin: number;
  toolCallsEnd: number;
}

export const NO_MARKERS: PhaseMarkers = { thinkStart: -1, thinkEnd: -1, toolCallsBegin: -1, toolCallsEnd: -1 };

/** A grammar that the answer follows: everything behind the reasoning, calls of tools included. */
export interface RequestGrammar {
  /** the same for the same rules: they are compiled once */
  key: string;
  /** rule 0 is the root */
  rules: GrammarNode[]; // [num_rules]
  /** tokens that end a sequence where the grammar may end, and never inside reasoning */
  endIds: number[];
}

export interface EngineRequest {
  requestId: string;
  promptIds: number[];
  sampling: SamplingParams;
  markers: PhaseMarkers;
  /** read off the rendered prompt */
  startPhase: 'reasoning' | 'answer';
  /** isolates the prefix cache; '' shares it */
  cacheSalt: string;
  /** lower runs first; 0 where it is left out */
  priority?: number;
  /** what ends reasoning before the model does; nothing where it is left out */
  thinking?: ThinkingLimits;
  grammar?: RequestGrammar;
  /** first tokens of this completion, given out by an earlier submission that was aborted: it goes on behind them */
  resumedIds?: number[]; // [num_resumed]
  /** nothing is generated: the prompt's full blocks go to the prefix cache, and the one event has no tokens */
  prefillOnly?: boolean;
  /** what a client has asked of the reasoning in an earlier submission: it takes effect at the same places */
  controls?: readonly ControlMark[]; // [num_controls]
}

/** What a client asks of reasoning that goes on: to end now, or to go on for at least so many more tokens. */
export type ThinkingControl = { kind: 'end' } | { kind: 'extend'; numTokens: number };

/**
 * A thinking control as it took effect, behind `at` tokens of the completion. With its marks a request comes out the
 * same again. Extended reasoning does not end before it has `untilReasoning` tokens.
 */
export type ControlMark = { kind: 'end'; at: number } | { kind: 'extend'; at: number; untilReasoning: number };

/** What the next request of a conversation will begin with, to be computed when nothing else is. */
export interface PrewarmRequest {
  promptIds: number[]; // [num_prompt]
  cacheSalt: string;
  /** tokens of a sequence that nobody will go on from: what it has cached beyond the prompt's beginning is given up */
  supersededIds: number[]; // [num_superseded]
}

export interface ThinkingLimits {
  /** most reasoning tokens; when reached, `endIds` are forced, after the first sampled token at the earliest. Infinity: none */
  budget: number;
  /** the closing phrase, then the think end marker */
  endIds: number[]; // [num_end]
  /** what takes the place of reasoning's end where a client has extended it; without it, it cannot be extended */
  extendIds?: number[]; // [num_extend]
  /** tokens kept for the answer: reasoning ends when what is left after `endIds` reaches it. 0: none */
  minAnswerTokens: number;
  /** reasoning ends when an n-gram of 1..64 tokens repeats until the repeated tail has so many tokens. 0: off */
  loopTokens: number;
}

export type FinishReason = 'stop' | 'length' | 'abort' | 'error';

export interface TokenLogprobs {
  logprob: number;
  top: { id: number; logprob: number }[];
}

export interface EmittedToken {
  id: number;
  phase: TokenPhase;
  /** absent for forced tokens, which no row was sampled for */
  logprobs?: TokenLogprobs;
  forced?: true;
}

/** One event per sequence and step. The last one, and only the last, has a finishReason. */
export interface EngineEvent {
  requestId: string;
  tokens: EmittedToken[];
  /** prompt tokens whose latents came from the prefix cache; known from the first event on */
  cachedTokens: number;
  finishReason?: FinishReason;
  /** in the first event after its first step began: milliseconds that it waited for that */
  queueMs?: number;
  /** with finishReason 'stop': the token that ended it (-1 where the caller ended it) */
  stopTokenId?: number;
  /** what ended the reasoning, from the event of its end on; absent where it ended by itself or goes on */
  reasoningEnded?: ReasoningEnd;
  /** what a client has asked of the reasoning so far; absent where nothing */
  controls?: readonly ControlMark[]; // [num_controls]
  /** with finishReason 'error' */
  error?: { code: string; message: string };
  /** where the engine speculates: drafts verified for this sequence so far, and how many were accepted */
  speculative?: { draftTokens: number; acceptedTokens: number };
}

/** Of a request that has had no event yet: requests before it in the queue, or prompt tokens computed and in all. */
export type RequestProgress =
  { status: 'waiting'; numAhead: number } | { status: 'prefill'; numComputed: number; numTokens: number };

/** Counters and gauges for /metrics and /health; a snapshot. */
export interface EngineStats {
  numRunning: number;
  numWaiting: number;
  numBlocks: number;
  numFreeBlocks: number;
  /** blocks that hold reusable content but belong to no sequence */
  numCachedBlocks: number;
  blockSize: number;
  numSteps: number;
  numPreemptions: number;
  promptTokens: number;
  generationTokens: number;
  /** prompt tokens computed in idle time */
  prewarmedTokens: number;
  prefixCacheQueries: number;
  prefixCacheHits: number;
  /** verify rounds: times that drafts of a sequence were verified */
  specNumDrafts: number;
  specNumDraftTokens: number;
  specNumAcceptedTokens: number;
  specAcceptedPerPos: number[]; // [MAX_DRAFTS] of the drafts at each depth
  /** engine processes started after the first */
  numRestarts: number;
}

export type EngineState =
  | { status: 'loading'; loadedBytes: number; totalBytes: number }
  | {
      status: 'ready';
      device: string;
      /** why --device auto took no GPU */
      deviceNote?: string;
      weightBytes: number;
      cacheBytes: number;
      /** most tokens of prompt and completion: the smallest of positions, --max-model-len and cache */
      maxContext: number;
    }
  | { status: 'restarting'; reason: string; loadedBytes: number; totalBytes: number }
  | { status: 'failed'; reason: string }
  | { status: 'closed' };

/**
 * An engine as the API sees it: the in-process Engine and the supervised child process are both one.
 * submit() throws ApiError where the engine is not ready, the queue is full or the request can never fit.
 * Leaving the iteration early aborts the sequence; aborting a finished or unknown one does nothing.
 */
export interface EngineHandle {
  submit(request: EngineRequest): AsyncIterable<EngineEvent>;
  abort(requestId: string): void;
  /**
   * Steers a sequence that is reasoning; the events that follow tell with `controls` where it took effect. Does nothing
   * to one that reasons no more, is finished or unknown.
   */
  control(requestId: string, control: ThinkingControl): void;
  /** Has a prompt computed in idle time; does nothing where the engine is not ready or has too much of that to do. */
  prewarm(prewarm: PrewarmRequest): void;
  /** where a request without a first event stands, as last heard; null where nothing is known of it */
  progress(requestId: string): RequestProgress | null;
  state(): EngineState;
  stats(): EngineStats;
  /** resolves when state becomes ready; rejects when it failed to start */
  ready(): Promise<void>;
  close(): Promise<void>;
}
