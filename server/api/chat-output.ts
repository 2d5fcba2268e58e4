import { randomUUID } from 'node:crypto';
import type { EmittedToken, EngineEvent } from '../engine/request.js';
import { ApiError, ERROR_CODES, type ErrorCode } from '../errors.js';
import type { ReasoningEnd } from '../engine/steering.js';
import type { OutputDelta, TokenParser } from '../text/output-parser.js';
import type { PromptEncoder } from '../text/prompt-encoder.js';
import type { ChatJob } from './chat-request.js';
import { toTokenLogprob, type TokenLogprob } from './logprobs.js';
import type { components } from './openapi.js';

export type FinishReason = components['schemas']['FinishReason'];
export type Usage = components['schemas']['Usage'];

export interface ToolCallPiece {
  index: number;
  /** with the name, in a call's first piece */
  id?: string;
  name?: string;
  arguments: string;
}

/** Output of one kind that belongs into one chunk. Kind null: nothing but token ids so far. */
export interface Piece {
  kind: 'reasoning' | 'content' | 'tool_call' | null;
  text: string;
  toolCall?: ToolCallPiece;
  logprobs: TokenLogprob[]; // [num_tokens of this piece that have any]
  tokenIds: number[]; // [num_tokens]
}

/**
 * Events of one sequence -> pieces for the client, in order, merged as far as kinds allow; and the counts for usage.
 * Nothing here depends on how tokens are spread over events.
 */
export class ChatOutput {
  readonly #job: ChatJob;
  readonly #prompts: PromptEncoder;
  readonly #parser: TokenParser;
  /** inline reasoning has been begun with a think tag and not been ended */
  #isInThink = false;
  #pieces: Piece[] = [];
  /** names of the calls so far */
  readonly callIds: string[] = []; // [num_calls]
  #numTokens = 0;
  #numReasoning = 0;
  #numAnswer = 0;
  #cachedTokens = 0;
  #speculative: EngineEvent['speculative'];
  #finishReason: FinishReason | null = null;
  #isReasoning: boolean;
  #reasoningEnded: ReasoningEnd | null = null;

  constructor(job: ChatJob, prompts: PromptEncoder) {
    this.#job = job;
    this.#prompts = prompts;
    this.#parser = prompts.parser(job.stops, job.stopScope, job.isPlain);
    this.#isReasoning = job.engineRequest.startPhase === 'reasoning';
  }

  get finishReason(): FinishReason | null {
    return this.#finishReason;
  }

  /** the stop string that ended the answer */
  get matchedStop(): string | null {
    return this.#parser.matchedStop;
  }

  /** whether reasoning goes on, as far as is known here */
  get isReasoning(): boolean {
    return this.#isReasoning && this.#finishReason === null;
  }

  /** why the engine ended the reasoning; null where it ended by itself */
  get reasoningEnded(): ReasoningEnd | null {
    return this.#reasoningEnded;
  }

  get numTokens(): number {
    return this.#numTokens;
  }

  get numReasoning(): number {
    return this.#numReasoning;
  }

  /** answer and tool tokens */
  get numAnswer(): number {
    return this.#numAnswer;
  }

  get cachedTokens(): number {
    return this.#cachedTokens;
  }

  get usage(): Usage {
    const promptTokens = this.#job.engineRequest.promptIds.length;
    return {
      prompt_tokens: promptTokens,
      completion_tokens: this.#numTokens,
      total_tokens: promptTokens + this.#numTokens,
      prompt_tokens_details: { cached_tokens: this.#cachedTokens },
      completion_tokens_details: { reasoning_tokens: this.#numReasoning },
      prompt_cache_hit_tokens: this.#cachedTokens,
      prompt_cache_miss_tokens: promptTokens - this.#cachedTokens,
    };
  }

  get metrics(): components['schemas']['CompletionMetrics'] {
    if (this.#speculative === undefined) return { speculative: null };
    const { draftTokens, acceptedTokens } = this.#speculative;
    return { speculative: { draft_tokens: draftTokens, accepted_tokens: acceptedTokens } };
  }

  /** Takes in one event. Throws ApiError where the engine gave up on the sequence. */
  accept(event: EngineEvent): void {
    if (event.finishReason === 'error') throw toApiError(event.error, this.#job.formatParam);
    if (event.finishReason === 'abort') throw new ApiError('engine_failed', 'The request was aborted by the server.');
    if (this.#numTokens === 0) this.#cachedTokens = event.cachedTokens;
    this.#speculative = event.speculative ?? this.#speculative;
    this.#reasoningEnded = event.reasoningEnded ?? null;
    for (const token of event.tokens) {
      this.#push(token);
      const isOver = this.#job.hasOneCall && this.#parser.numEndedCalls > 0;
      if (isOver || this.#parser.matchedStop !== null) return this.#finish('stop');
    }
    if (event.finishReason) this.#finish(event.finishReason);
  }

  /** Pieces to send now. A last one without text waits for what it belongs to, until the end. */
  take(): Piece[] {
    const last = this.#pieces.at(-1);
    const isWhole = this.#job.streamsReasoning || last?.kind !== 'reasoning';
    const waits = last !== undefined && (isEmpty(last) || !isWhole) && this.#finishReason === null;
    const taken = waits ? this.#pieces.slice(0, -1) : this.#pieces;
    this.#pieces = waits ? [last] : [];
    return taken;
  }

  #push(token: EmittedToken): void {
    this.#numTokens += 1;
    for (const delta of this.#parser.push(token)) this.#append(delta);
    const { phase } = this.#parser;
    if (phase === 'reasoning') this.#numReasoning += 1;
    if (phase === 'answer' || phase === 'tool') this.#numAnswer += 1;
    const { thinkStart, thinkEnd } = this.#job.engineRequest.markers;
    if (phase === 'reasoning' || (phase === 'control' && token.id === thinkStart)) this.#isReasoning = true;
    else if (phase === 'answer' || (phase === 'control' && token.id === thinkEnd)) this.#isReasoning = false;
    const { reasoningView, returnTokenIds } = this.#job;
    if (phase === 'reasoning' && reasoningView === 'hidden') return;
    const { logprobs } = token;
    if (logprobs && (phase === 'reasoning' || phase === 'answer')) {
      const piece = this.#pieceOf(phase === 'answer' || reasoningView === 'inline' ? 'content' : 'reasoning');
      piece.logprobs.push(toTokenLogprob(token.id, logprobs, this.#prompts.tokenizer));
    }
    if (returnTokenIds) this.#lastPiece().tokenIds.push(token.id);
  }

  #finish(reason: 'stop' | 'length'): void {
    for (const delta of this.#parser.end()) this.#append(delta);
    this.#finishReason = reason === 'stop' && this.#parser.numToolCalls > 0 ? 'tool_calls' : reason;
  }

  #append(delta: OutputDelta): void {
    if (delta.kind === 'reasoning' && this.#job.reasoningView !== 'separate') {
      if (this.#job.reasoningView === 'inline') this.#addInline(delta.text);
      return;
    }
    if (this.#isInThink) {
      this.#isInThink = false;
      this.#pieceOf('content').text += '</think>';
    }
    if (delta.kind !== 'tool_call') {
      this.#pieceOf(delta.kind).text += delta.text;
      return;
    }
    const last = this.#pieces.at(-1);
    if (last?.toolCall?.index === delta.index && delta.name === undefined) {
      last.toolCall.arguments += delta.arguments;
      return;
    }
    const { index, name } = delta;
    const id = delta.id ?? `call_${randomUUID().replaceAll('-', '').slice(0, 24)}`;
    const named = name === undefined ? {} : { id, name };
    if (name !== undefined) this.callIds.push(id);
    this.#newPiece('tool_call').toolCall = { index, ...named, arguments: delta.arguments };
  }

  #addInline(text: string): void {
    this.#pieceOf('content').text += this.#isInThink ? text : `<think>${text}`;
    this.#isInThink = true;
  }

  #pieceOf(kind: 'reasoning' | 'content'): Piece {
    const last = this.#pieces.at(-1);
    return last?.kind === kind ? last : this.#newPiece(kind);
  }

  #lastPiece(): Piece {
    return this.#pieces.at(-1) ?? this.#newPiece(null);
  }

  #newPiece(kind: Piece['kind']): Piece {
    const last = this.#pieces.at(-1);
    if (last?.kind === null) {
      last.kind = kind;
      return last;
    }
    const piece: Piece = { kind, text: '', logprobs: [], tokenIds: [] };
    this.#pieces.push(piece);
    return piece;
  }
}

export function isEmpty(piece: Piece): boolean {
  return piece.text === '' && piece.toolCall === undefined;
}

/** What is invalid once the engine has begun is the format: all else was checked before. */
function toApiError(error: EngineEvent['error'], formatParam: string | null): ApiError {
  const code = error && Object.hasOwn(ERROR_CODES, error.code) ? (error.code as ErrorCode) : 'engine_failed';
  return new ApiError(
    code,
    error?.message ?? 'The engine stopped while it was serving this request.',
    code === 'invalid_value' ? formatParam : null,
  );
}
