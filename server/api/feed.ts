import { isEmpty, type ChatOutput, type Piece } from './chat-output.js';
import type { Choice, Choices } from './choices.js';
import type { ApiError } from '../errors.js';

export interface StreamEvent {
  /** the event's type, where it is sent beside the data */
  name?: string;
  data: string;
}

/** How one API tells what happens to the choices of a request. */
export interface Dialect {
  /** before anything else */
  begin(): StreamEvent[];
  piece(choice: Choice, piece: Piece): StreamEvent[];
  /** a choice has ended; `rest` are pieces without text */
  finish(choice: Choice, rest: readonly Piece[]): StreamEvent[];
  /** all choices have ended */
  end(): StreamEvent[];
  fail(error: ApiError): StreamEvent[];
}

/** Where events go. Who writes asks `isReady` first; `onReady` is called when that becomes true again. */
export interface EventSink {
  readonly isReady: boolean;
  onReady: () => void;
  write(event: StreamEvent): void;
}

/** Choices as the events of a dialect. While the sink takes nothing, pieces are merged. */
export class ChoiceFeed {
  readonly #choices: Choices;
  readonly #dialect: Dialect;
  readonly #ended = new Set<number>();
  #sink: EventSink | null = null;

  constructor(choices: Choices, dialect: Dialect) {
    this.#choices = choices;
    this.#dialect = dialect;
  }

  /** From now on events go to a sink, with all that has come before. */
  attach(sink: EventSink): void {
    this.#sink = sink;
    sink.onReady = () => this.#sendAll();
    this.#write(this.#dialect.begin());
    this.#sendAll();
  }

  /** A choice has had an event. */
  onEvent(choice: Choice, output: ChatOutput): void {
    if (this.#sink === null || this.#ended.has(choice.index)) return;
    const isOver = output.finishReason !== null;
    if (!isOver && !this.#sink.isReady) return;
    const pieces = output.take();
    const rest = isOver && pieces.length > 0 && isEmpty(pieces.at(-1)!) ? pieces.splice(-1) : [];
    for (const piece of pieces) this.#write(this.#dialect.piece(choice, piece));
    if (!isOver) return;
    this.#ended.add(choice.index);
    this.#write(this.#dialect.finish(choice, rest));
  }

  /** The choices have run; false where the client has left before their ends. */
  end(): boolean {
    if (this.#ended.size < this.#choices.all.length) return false;
    this.#write(this.#dialect.end());
    return true;
  }

  fail(error: ApiError): void {
    for (const choice of this.#choices.all) {
      if (choice.completion === null || this.#ended.has(choice.index)) continue;
      for (const piece of choice.completion.output.take()) this.#write(this.#dialect.piece(choice, piece));
    }
    this.#write(this.#dialect.fail(error));
  }

  #sendAll(): void {
    for (const choice of this.#choices.all) {
      if (choice.completion) this.onEvent(choice, choice.completion.output);
    }
  }

  #write(events: readonly StreamEvent[]): void {
    for (const event of events) this.#sink?.write(event);
  }
}
