import type { ApiError } from '../errors.js';
import type { ChatOutput, Piece, Usage } from './chat-output.js';
import type { Choice, Choices } from './choices.js';
import type { Dialect, StreamEvent } from './feed.js';

/** Chunks of one choice as JSON text; `usage` is what stands in each of them, undefined where nothing does. */
export interface ChunkBodies {
  piece(piece: Piece, usage: Usage | null | undefined): string;
  /** the chunk that ends the choice; `rest` are pieces without text */
  finish(output: ChatOutput, rest: readonly Piece[], usage: Usage | null | undefined): string;
  /** the chunk after all choices */
  usage(usage: Usage): string;
}

export interface ChunkOptions {
  includeUsage: boolean;
  hasContinuousUsage: boolean;
}

/** Choices as chunks, each of one choice, and [DONE] behind them: chat completions and completions. */
export class ChunkDialect implements Dialect {
  readonly #choices: Choices;
  readonly #bodies: readonly ChunkBodies[]; // [num_choices]
  readonly #options: ChunkOptions;

  constructor(choices: Choices, bodies: readonly ChunkBodies[], options: ChunkOptions) {
    this.#choices = choices;
    this.#bodies = bodies;
    this.#options = options;
  }

  begin(): StreamEvent[] {
    return [];
  }

  piece({ index }: Choice, piece: Piece): StreamEvent[] {
    return [{ data: this.#bodies[index]!.piece(piece, this.#usage) }];
  }

  finish({ index, completion }: Choice, rest: readonly Piece[]): StreamEvent[] {
    return [{ data: this.#bodies[index]!.finish(completion!.output, rest, this.#usage) }];
  }

  end(): StreamEvent[] {
    const usage = this.#options.includeUsage ? [{ data: this.#bodies[0]!.usage(this.#choices.usage) }] : [];
    return [...usage, { data: '[DONE]' }];
  }

  fail(error: ApiError): StreamEvent[] {
    return [{ data: JSON.stringify(error.toBody()) }];
  }

  get #usage(): Usage | null | undefined {
    const { includeUsage, hasContinuousUsage } = this.#options;
    return hasContinuousUsage ? this.#choices.usage : includeUsage ? null : undefined;
  }
}
