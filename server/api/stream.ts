import type { FastifyReply, FastifyRequest } from 'fastify';
import type { Choices } from './choices.js';
import { abortWithClient } from './client.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { EventLog } from './event-log.js';
import { ChoiceFeed, type Dialect, type EventSink, type StreamEvent } from './feed.js';
import { orLate } from './late.js';
import { keepAlive } from './progress.js';
import { SseWriter } from './sse.js';

/** of one stream's events that are kept */
const MAX_LOG_BYTES = 4 * 2 ** 20;

/** How a stream is sent, beyond what its dialect says. */
export interface StreamOptions {
  /** what is sent when nothing else is; a comment where it is left out */
  heartbeat?: string;
  /** events are kept, and have ids that begin so */
  keptAs?: string;
}

/** One reader of the stream: its response, and where its events go. */
interface Reader {
  reply: FastifyReply;
  writer: SseWriter;
}

/**
 * Choices as server-sent events to one reader at a time. When the reader leaves, the choices are aborted. Where events
 * are kept, another reader may take over: it gets the events that the one before has missed, and the choices go on
 * behind the tokens they had, which comes out as if nobody had left.
 */
export class ChoiceStream implements EventSink {
  readonly #context: ApiContext;
  readonly #choices: Choices;
  readonly #feed: ChoiceFeed;
  readonly #options: StreamOptions;
  readonly #log: EventLog | null;
  onReady: () => void = () => {};
  #reader: Reader | null = null;
  #run: Promise<void> | null = null;
  #isOver = false;
  #hasBegun: () => void = () => {};

  constructor(context: ApiContext, choices: Choices, dialect: Dialect, options: StreamOptions = {}) {
    this.#context = context;
    this.#choices = choices;
    this.#feed = new ChoiceFeed(choices, dialect);
    this.#options = options;
    this.#log = options.keptAs === undefined ? null : new EventLog(MAX_LOG_BYTES);
  }

  get choices(): Choices {
    return this.#choices;
  }

  get numBytes(): number {
    return this.#log?.numBytes ?? 0;
  }

  /**
   * Serves the first reader. The response begins with the first event, so that an early error still has a status; or
   * when that takes too long.
   */
  async begin(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    this.#leaveWith(request, reply);
    const hasBegun = new Promise<'begun' | void>((resolve) => (this.#hasBegun = () => resolve('begun')));
    const run = this.#start();
    const started = await orLate(this.#context.sse.heartbeatMs, [hasBegun, run]);
    if (started === undefined && this.#choices.isAborted) return reply.hijack(); // the client has left
    const { writer } = this.#attach(reply);
    this.#feed.attach(this);
    if (started === 'late') writer.beat();
    this.#finishWith(run, reply);
    return reply;
  }

  /** Whether what comes behind event number `last` can still be had. */
  has(last: number): boolean {
    return this.#log !== null && this.#log.has(last);
  }

  /** Serves a reader that has had the events up to number `last`; has(last) is true. */
  resume(request: FastifyRequest, reply: FastifyReply, last: number): FastifyReply {
    this.#leaveWith(request, reply);
    const before = this.#reader;
    const { writer } = this.#attach(reply);
    before?.writer.stream.destroy();
    for (const [number, event] of this.#log!.after(last)) writer.write(event, this.#idOf(number));
    if (this.#isOver) {
      writer.end();
    } else if (before !== null) {
      this.onReady();
    } else {
      try {
        this.#choices.resume();
        this.#finishWith(this.#start(), reply);
      } catch (error) {
        this.#fail(error, reply);
      }
    }
    return reply;
  }

  get isReady(): boolean {
    return this.#reader?.writer.isReady ?? false;
  }

  write(event: StreamEvent): void {
    this.#reader?.writer.write(event, this.#idOf(this.#log?.length ?? 0));
    this.#log?.add(event);
  }

  #idOf(number: number): string | undefined {
    const { keptAs } = this.#options;
    return keptAs === undefined ? undefined : `${keptAs}:${number}`;
  }

  #leaveWith(request: FastifyRequest, reply: FastifyReply): void {
    abortWithClient(this.#context, request, reply, this.#choices, () => this.#leave(reply));
  }

  /** The reader of this response is gone: nobody reads, unless another one has taken over. */
  #leave(reply: FastifyReply): void {
    if (this.#reader !== null && this.#reader.reply !== reply) return;
    this.#reader = null;
    if (!this.#isOver) this.#choices.abort();
  }

  #attach(reply: FastifyReply): Reader {
    const { heartbeat } = this.#options;
    const comment = (): string => `: ${keepAlive(this.#context.engine, this.#choices.requestIds())}\n\n`;
    const writer = new SseWriter(this.#context.sse, heartbeat === undefined ? comment : () => heartbeat);
    this.#reader = { reply, writer };
    writer.stream.once('close', () => this.#leave(reply));
    writer.onReady = () => this.onReady();
    reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
    void reply.type('text/event-stream; charset=utf-8').send(writer.stream);
    return this.#reader;
  }

  /** Runs the choices from where they are. */
  #start(): Promise<void> {
    const run = this.#choices.run((choice, output) => {
      this.#hasBegun();
      this.#feed.onEvent(choice, output);
    });
    this.#run = run;
    return run;
  }

  #finishWith(run: Promise<void>, reply: FastifyReply): void {
    run.then(
      () => {
        // Otherwise a later run goes on, or the reader has left.
        if (run === this.#run && this.#feed.end()) this.#end();
      },
      (error: unknown) => {
        if (run === this.#run) this.#fail(error, reply);
      },
    );
  }

  #fail(error: unknown, reply: FastifyReply): void {
    const shown = toApiError(error);
    if (shown.code === 'internal_error') reply.log.error(error, 'a stream broke');
    this.#feed.fail(shown);
    this.#end();
  }

  #end(): void {
    this.#isOver = true;
    this.#reader?.writer.end();
  }
}
