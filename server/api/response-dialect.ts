import type { ApiError } from '../errors.js';
import type { ChatOutput, Piece } from './chat-output.js';
import type { Choice, Choices } from './choices.js';
import type { Dialect, StreamEvent } from './feed.js';
import type { components } from './openapi.js';
import type { ResponseEvent } from './response-output.js';
import type { ResponseRecord } from './response-record.js';

type EventType = components['schemas']['ResponsesEvent']['type'];

const LAST_EVENTS: Readonly<Record<string, EventType>> = {
  completed: 'response.completed',
  failed: 'response.failed',
};

/** One response as its typed events, counted from 0. Whatever way it ends, `onEnd` is told once, before the last event. */
export class ResponseDialect implements Dialect {
  readonly #record: ResponseRecord;
  readonly #choices: Choices;
  readonly #onEnd: () => void;
  #numEvents = 0;

  constructor(record: ResponseRecord, choices: Choices, onEnd: () => void) {
    this.#record = record;
    this.#choices = choices;
    this.#onEnd = onEnd;
  }

  begin(): StreamEvent[] {
    const isQueued = this.#record.status === 'queued';
    return [this.#whole('response.created'), this.#whole(isQueued ? 'response.queued' : 'response.in_progress')];
  }

  piece(_choice: Choice, piece: Piece): StreamEvent[] {
    const begun = this.#leaveQueue();
    return [...begun, ...this.#events(this.#record.output.push(piece))];
  }

  finish({ completion }: Choice, rest: readonly Piece[]): StreamEvent[] {
    const begun = this.#leaveQueue();
    const events = rest.flatMap((piece) => this.#events(this.#record.output.push(piece)));
    const { output } = completion!;
    this.#record.finish(output);
    return [...begun, ...events, ...this.#last(output.finishReason === 'length')];
  }

  end(): StreamEvent[] {
    return [];
  }

  fail(error: ApiError): StreamEvent[] {
    if (this.#record.isOver) return [];
    const begun = this.#leaveQueue();
    this.#record.fail(error, this.#output);
    return [...begun, ...this.#last(true)];
  }

  /** Somebody has ended it: what there is of it stays. */
  cancel(): StreamEvent[] {
    if (this.#record.isOver) return [];
    const output = this.#output;
    const events = this.#leaveQueue();
    for (const piece of output?.take() ?? []) events.push(...this.#events(this.#record.output.push(piece)));
    this.#record.cancel(output);
    return [...events, ...this.#last(true)];
  }

  get #output(): ChatOutput | undefined {
    return this.#choices.all[0]?.completion?.output;
  }

  #leaveQueue(): StreamEvent[] {
    if (this.#record.status !== 'queued') return [];
    this.#record.begin();
    return [this.#whole('response.in_progress')];
  }

  #last(isCut: boolean): StreamEvent[] {
    const ended = this.#events(this.#record.output.end(isCut));
    this.#onEnd();
    return [...ended, this.#whole(LAST_EVENTS[this.#record.status] ?? 'response.incomplete')];
  }

  #events(events: readonly ResponseEvent[]): StreamEvent[] {
    return events.map((event) => {
      const { type, ...rest } = event;
      return { name: type, data: JSON.stringify({ type, sequence_number: this.#numEvents++, ...rest }) };
    });
  }

  /** An event that carries the response as it is now. */
  #whole(type: EventType): StreamEvent {
    const sequenceNumber = this.#numEvents++;
    return {
      name: type,
      data: `{"type":"${type}","sequence_number":${sequenceNumber},"response":${this.#record.json}}`,
    };
  }
}
