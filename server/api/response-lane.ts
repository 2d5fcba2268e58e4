import { Choices } from './choices.js';
import { checkReady } from './client.js';
import type { RequestOrigin } from './completion.js';
import type { ApiContext } from './context.js';
import { ChoiceFeed, type EventSink, type StreamEvent } from './feed.js';
import { ResponseDialect } from './response-dialect.js';
import { ResponseRecord } from './response-record.js';
import { readResponseRequest, type ResponsesBody } from './response-request.js';
import type { ResponseSource, StoredResponse } from './response-store.js';
import { toApiError } from './error-handler.js';
import type { ApiError } from '../errors.js';

/** What a lane asks of the socket that it belongs to. */
export interface LaneSocket {
  readonly context: ApiContext;
  readonly origin: RequestOrigin;
  readonly tenant: string;
  readonly isClosed: boolean;
  /** whether the client takes in what is sent */
  readonly isReady: boolean;
  /** responses of this connection, stored or not */
  readonly source: ResponseSource;
  send(json: string, streamId: string | null): void;
  fail(error: ApiError, streamId: string | null): void;
  keep(response: StoredResponse, isStored: boolean): void;
}

/** One request for a response, as its frame had it. */
export interface Create {
  body: ResponsesBody;
  /** false: its prompt is computed, nothing is generated */
  generates: boolean;
  /** about what it takes while it waits */
  numBytes: number;
}

/** The response that a lane is making. */
export interface LaneRun {
  readonly id: string;
  readonly choices: Choices;
  /** ends it, and says so */
  cancel(): void;
  abort(): void;
}

/** Responses of one stream_id, one after the other. */
export class ResponseLane implements EventSink {
  readonly #socket: LaneSocket;
  readonly #streamId: string | null;
  readonly #onIdle: () => void;
  readonly #queue: Create[] = []; // [num_waiting]
  #isBusy = false;
  #run: LaneRun | null = null;
  onReady: () => void = () => {};

  constructor(socket: LaneSocket, streamId: string | null, onIdle: () => void) {
    this.#socket = socket;
    this.#streamId = streamId;
    this.#onIdle = onIdle;
  }

  /** what it makes now; null while a request is read */
  get run(): LaneRun | null {
    return this.#run;
  }

  get numWaiting(): number {
    return this.#queue.length;
  }

  get waitingBytes(): number {
    return this.#queue.reduce((sum, { numBytes }) => sum + numBytes, 0);
  }

  push(create: Create): void {
    this.#queue.push(create);
    if (!this.#isBusy) void this.#work();
  }

  /** The client is gone. */
  close(): void {
    this.#queue.length = 0;
    this.#run?.abort();
  }

  get isReady(): boolean {
    return this.#socket.isReady;
  }

  write({ data }: StreamEvent): void {
    this.#socket.send(data, this.#streamId);
  }

  async #work(): Promise<void> {
    this.#isBusy = true;
    for (let create = this.#queue.shift(); create !== undefined; create = this.#queue.shift()) {
      try {
        await this.#make(create);
      } catch (error) {
        const shown = toApiError(error);
        if (shown.code === 'internal_error') this.#socket.origin.log.error(error, 'a response on a WebSocket broke');
        this.#socket.fail(shown, this.#streamId);
      }
      this.#run = null;
      this.onReady = () => {};
    }
    this.#isBusy = false;
    this.#onIdle();
  }

  /** Throws ApiError for what goes wrong before the response begins. */
  async #make({ body, generates }: Create): Promise<void> {
    const { context, tenant, origin, source } = this.#socket;
    const startedAt = performance.now();
    checkReady(context);
    const job = await readResponseRequest(body, tenant, context, source, generates);
    checkReady(context);
    if (this.#socket.isClosed) return;
    const record = new ResponseRecord(job, context);
    const choices = new Choices([[job.chat]], context, origin, startedAt);
    const leave = context.drain.enter(() => {
      for (const requestId of choices.requestIds()) context.engine.abort(requestId);
    });
    const dialect = new ResponseDialect(record, choices, () => {
      this.#socket.keep(record.stored(tenant), job.isStored);
    });
    const feed = new ChoiceFeed(choices, dialect);
    let leftEarly = (): void => {};
    const isLeft = new Promise<void>((resolve) => (leftEarly = resolve));
    this.#run = {
      id: record.id,
      choices,
      cancel: () => {
        choices.abort();
        for (const event of dialect.cancel()) this.write(event);
        leftEarly();
      },
      abort: () => {
        choices.abort();
        leftEarly();
      },
    };
    feed.attach(this);
    try {
      await Promise.race([choices.run((choice, output) => feed.onEvent(choice, output)), isLeft]);
    } catch (error) {
      const shown = toApiError(error);
      if (shown.code === 'internal_error') origin.log.error(error, 'a response on a WebSocket broke');
      if (!this.#socket.isClosed) feed.fail(shown);
    } finally {
      leave();
    }
  }
}
