import type { FastifyReply, FastifyRequest } from 'fastify';
import { LRUCache } from 'lru-cache';
import { Choices } from './choices.js';
import type { RequestOrigin } from './completion.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { EventLog } from './event-log.js';
import { ChoiceFeed, type EventSink, type StreamEvent } from './feed.js';
import { keepAlive } from './progress.js';
import { ResponseDialect } from './response-dialect.js';
import { ResponseRecord } from './response-record.js';
import type { ResponseJob } from './response-request.js';
import { keepResponse } from './response-store.js';
import { SseWriter } from './sse.js';

/** of one response's events that are kept */
const MAX_LOG_BYTES = 4 * 2 ** 20;
/** of those that have ended, together */
const MAX_ENDED_BYTES = 64 * 2 ** 20;
const ENDED_MS = 600_000;

/** Responses in the background: those that are being made, and the events of those that ended a while ago. */
export class BackgroundResponses {
  readonly #running = new Map<string, BackgroundRun>();
  readonly #ended = new LRUCache<string, BackgroundRun>({
    maxSize: MAX_ENDED_BYTES,
    sizeCalculation: (run) => run.numBytes + 1024,
    ttl: ENDED_MS,
    ttlAutopurge: true,
  });

  /** Submits a response and lets it run. Throws ApiError where the engine does not take it. */
  start(job: ResponseJob, tenant: string, context: ApiContext, request: RequestOrigin): BackgroundRun {
    const run = new BackgroundRun(job, tenant, context, request, () => {
      this.#running.delete(run.record.id);
      this.#ended.set(run.record.id, run);
    });
    this.#running.set(run.record.id, run);
    run.start();
    return run;
  }

  find(id: string, tenant: string): BackgroundRun | undefined {
    const run = this.#running.get(id) ?? this.#ended.get(id);
    return run?.tenant === tenant ? run : undefined;
  }

  delete(id: string): void {
    this.#running.get(id)?.cancel();
    this.#ended.delete(id);
  }
}

/** A reader of the events, and the number of the next one that it gets. */
interface Reader {
  writer: SseWriter;
  next: number;
}

/** One response that is made whether somebody reads it or not. */
export class BackgroundRun implements EventSink {
  readonly record: ResponseRecord;
  readonly tenant: string;
  readonly isReady = true;
  onReady: () => void = () => {};
  readonly #context: ApiContext;
  readonly #origin: RequestOrigin;
  readonly #choices: Choices;
  readonly #dialect: ResponseDialect;
  readonly #feed: ChoiceFeed;
  readonly #log = new EventLog(MAX_LOG_BYTES);
  readonly #readers = new Set<Reader>();
  readonly #onEnd: () => void;
  #hasEnded = false;

  constructor(job: ResponseJob, tenant: string, context: ApiContext, origin: RequestOrigin, onEnd: () => void) {
    this.record = new ResponseRecord(job, context);
    this.tenant = tenant;
    this.#context = context;
    this.#origin = origin;
    this.#onEnd = onEnd;
    this.#choices = new Choices([[job.chat]], context, origin, performance.now());
    this.#dialect = new ResponseDialect(this.record, this.#choices, () => this.#store());
    this.#feed = new ChoiceFeed(this.#choices, this.#dialect);
  }

  get numBytes(): number {
    return this.#log.numBytes;
  }

  start(): void {
    const { drain, engine } = this.#context;
    const leave = drain.enter(() => {
      for (const requestId of this.#choices.requestIds()) engine.abort(requestId);
    });
    this.#store();
    this.#feed.attach(this);
    this.#choices
      .run((choice, output) => this.#feed.onEvent(choice, output))
      .catch((error: unknown) => {
        const shown = toApiError(error);
        if (shown.code === 'internal_error') this.#origin.log.error(error, 'a response in the background broke');
        this.#feed.fail(shown);
      })
      .finally(() => {
        leave();
        this.#end();
      });
  }

  /** Ends it, where it has not ended yet. */
  cancel(): void {
    if (this.record.isOver) return;
    this.#choices.abort();
    for (const event of this.#dialect.cancel()) this.write(event);
    this.#end();
  }

  write(event: StreamEvent): void {
    this.#log.add(event);
    for (const reader of this.#readers) this.#serve(reader);
  }

  /** Whether what comes behind event number `last` can still be had. */
  has(last: number): boolean {
    return this.#log.has(last);
  }

  /** Sends the events behind number `last`, and those to come; has(last) is true. */
  read(request: FastifyRequest, reply: FastifyReply, last: number): FastifyReply {
    const { sse, engine } = this.#context;
    const writer = new SseWriter(sse, () => `: ${keepAlive(engine, this.#choices.requestIds())}\n\n`);
    const reader: Reader = { writer, next: last + 1 };
    this.#readers.add(reader);
    writer.stream.once('close', () => this.#readers.delete(reader));
    writer.onReady = () => this.#serve(reader);
    reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
    void reply.type('text/event-stream; charset=utf-8').send(writer.stream);
    if (request.raw.socket.destroyed) writer.stream.destroy();
    this.#serve(reader);
    return reply;
  }

  #serve(reader: Reader): void {
    const { writer } = reader;
    if (!this.#log.has(reader.next - 1)) {
      writer.stream.destroy(new Error('the client is behind the events that are kept'));
      return;
    }
    while (writer.isReady && reader.next < this.#log.length) {
      for (const [number, event] of this.#log.after(reader.next - 1)) {
        if (!writer.isReady) break;
        writer.write(event);
        reader.next = number + 1;
      }
    }
    if (this.#hasEnded && reader.next === this.#log.length) writer.end();
  }

  #store(): void {
    keepResponse(this.#context.responses, this.record.stored(this.tenant), this.#origin);
  }

  #end(): void {
    if (this.#hasEnded) return;
    this.#hasEnded = true;
    this.#onEnd();
    for (const reader of this.#readers) this.#serve(reader);
  }
}
