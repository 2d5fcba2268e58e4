import { randomUUID } from 'node:crypto';
import type { EmittedToken, EngineEvent } from '../engine/request.js';
import { ApiError, ERROR_CODES, type ErrorCode } from '../errors.js';
import { OutputParser, type OutputDelta } from '../text/output-parser.js';
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
  readonly #parser: OutputParser;
  #pieces: Piece[] = [];
  #numTokens = 0;
  #numReasoning = 0;
  #numAnswer = 0;
  #cachedTokens = 0;
  #finishReason: FinishReason | null = null;

  constructor(job: ChatJob, prompts: PromptEncoder) {
    this.#job = job;
    this.#prompts = prompts;
    this.#parser = new OutputParser(prompts.tokenizer, prompts.toolMarkers, job.stops);
  }

  get finishReason(): FinishReason | null {
    return this.#finishReason;
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

  /** Takes in one event. Throws ApiError where the engine gave up on the sequence. */
  accept(event: EngineEvent): void {
    if (event.finishReason === 'error') throw toApiError(event.error, this.#job.formatParam);
    if (event.finishReason === 'abort') throw new ApiError('engine_failed', 'The request was aborted by the server.');
    this.#cachedTokens = event.cachedTokens;
    for (const token of event.tokens) {
      this.#push(token);
      if (this.#parser.matchedStop !== null) return this.#finish('stop');
    }
    if (event.finishReason) this.#finish(event.finishReason);
  }

  /** Pieces to send now. A last one without text waits for what it belongs to, until the end. */
  take(): Piece[] {
    const last = this.#pieces.at(-1);
    const waits = last !== undefined && isEmpty(last) && this.#finishReason === null;
    const taken = waits ? this.#pieces.slice(0, -1) : this.#pieces;
    this.#pieces = waits ? [last] : [];
    return taken;
  }

  #push(token: EmittedToken): void {
    const { phase } = token;
    this.#numTokens += 1;
    if (phase === 'reasoning') this.#numReasoning += 1;
    if (phase === 'answer' || phase === 'tool') this.#numAnswer += 1;
    for (const delta of this.#parser.push(token)) this.#append(delta);
    const { logprobs } = token;
    if (logprobs && (phase === 'reasoning' || phase === 'answer')) {
      const piece = this.#pieceOf(phase === 'answer' ? 'content' : 'reasoning');
      piece.logprobs.push(toTokenLogprob(token.id, logprobs, this.#prompts.tokenizer));
    }
    if (this.#job.returnTokenIds) this.#lastPiece().tokenIds.push(token.id);
  }

  #finish(reason: 'stop' | 'length'): void {
    for (const delta of this.#parser.end()) this.#append(delta);
    this.#finishReason = reason === 'stop' && this.#parser.numToolCalls > 0 ? 'tool_calls' : reason;
  }

  #append(delta: OutputDelta): void {
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
    const named = name === undefined ? {} : { id: `call_${randomUUID().replaceAll('-', '').slice(0, 24)}`, name };
    this.#newPiece('tool_call').toolCall = { index, ...named, arguments: delta.arguments };
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
