import type { GrammarNode } from '../grammar/grammar.js';

/** What goes into an engine and what comes out: plain values that can cross a process boundary. */

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
  grammar?: RequestGrammar;
}

export type FinishReason = 'stop' | 'length' | 'abort' | 'error';

export interface TokenLogprobs {
  logprob: number;
  top: { id: number; logprob: number }[];
}

export interface EmittedToken {
  id: number;
  phase: TokenPhase;
  logprobs?: TokenLogprobs;
}

/** One event per sequence and step. The last one, and only the last, has a finishReason. */
export interface EngineEvent {
  requestId: string;
  tokens: EmittedToken[];
  /** prompt tokens whose latents came from the prefix cache; known from the first event on */
  cachedTokens: number;
  finishReason?: FinishReason;
  /** with finishReason 'stop': the token that ended it (-1 where the caller ended it) */
  stopTokenId?: number;
  /** with finishReason 'error' */
  error?: { code: string; message: string };
}

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
  prefixCacheQueries: number;
  prefixCacheHits: number;
}

export type EngineState =
  | { status: 'loading'; loadedBytes: number; totalBytes: number }
  | { status: 'ready'; device: string; weightBytes: number; cacheBytes: number }
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
  state(): EngineState;
  stats(): EngineStats;
  /** resolves when state becomes ready; rejects when it failed to start */
  ready(): Promise<void>;
  close(): Promise<void>;
}
