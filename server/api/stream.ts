import type { FastifyBaseLogger, FastifyReply } from 'fastify';
import { isEmpty, type ChatOutput, type Piece, type Usage } from './chat-output.js';
import type { Choice, Choices } from './choices.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { EventLog } from './event-log.js';
import { keepAlive } from './progress.js';
import { SseWriter } from './sse.js';

/** Chunks of one choice as JSON text; `usage` is what stands in each of them, undefined where nothing does. */
export interface ChunkBodies {
  piece(piece: Piece, usage: Usage | null | undefined): string;
  /** the chunk that ends the choice; `rest` are pieces without text */
  finish(output: ChatOutput, rest: readonly Piece[], usage: Usage | null | undefined): string;
  /** the chunk after all choices */
  usage(usage: Usage): string;
}

export interface StreamOptions {
  includeUsage: boolean;
  hasContinuousUsage: boolean;
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
export class ChoiceStream {
  readonly #context: ApiContext;
  readonly #choices: Choices;
  readonly #bodies: readonly ChunkBodies[];
  readonly #options: StreamOptions;
  readonly #log: FastifyBaseLogger;
  readonly #events: { id: string; log: EventLog } | null;
  readonly #ended = new Set<number>();
  #reader: Reader | null = null;
  #run: Promise<void> | null = null;
  #isOver = false;
  #hasBegun: () => void = () => {};

  /** `kept` says under which id and up to how many bytes events are kept; null: they are not. */
  constructor(
    context: ApiContext,
    choices: Choices,
    bodies: readonly ChunkBodies[],
    options: StreamOptions,
    log: FastifyBaseLogger,
    kept: { id: string; maxBytes: number } | null,
  ) {
    this.#context = context;
    this.#choices = choices;
    this.#bodies = bodies;
    this.#options = options;
    this.#log = log;
    this.#events = kept && { id: kept.id, log: new EventLog(kept.maxBytes) };
  }

  /** all events have been made */
  get isOver(): boolean {
    return this.#isOver;
  }

  get numBytes(): number {
    return this.#events?.log.numBytes ?? 0;
  }

  /**
   * Serves the first reader. The response begins with the first event, so that an early error still has a status; or
   * when that takes too long.
   */
  async begin(reply: FastifyReply): Promise<unknown> {
    let timer: NodeJS.Timeout | undefined;
    const isLate = new Promise<'late'>((resolve) => {
      timer = setTimeout(() => resolve('late'), this.#context.sse.heartbeatMs);
    });
    const hasBegun = new Promise<'begun'>((resolve) => (this.#hasBegun = () => resolve('begun')));
    const run = this.#start();
    const started = await Promise.race([hasBegun, isLate, run]).finally(() => clearTimeout(timer));
    if (started === undefined && this.#choices.isAborted) return reply.hijack(); // the client has left
    const { writer } = this.#attach(reply);
    if (started === 'late') writer.comment(this.#keepAlive());
    this.#sendAll();
    this.#finishWith(run);
    return reply;
  }

  /** Whether what comes behind event number `last` can still be had. */
  has(last: number): boolean {
    const { log } = this.#events!;
    return last < log.length && log.after(last) !== null;
  }

  /** Serves a reader that has had the events up to number `last`; has(last) is true. */
  resume(reply: FastifyReply, last: number): FastifyReply {
    const { id, log } = this.#events!;
    const before = this.#reader;
    const { writer } = this.#attach(reply);
    before?.writer.stream.destroy();
    for (const [number, data] of log.after(last)!) writer.event(data, `${id}:${number}`);
    if (this.#isOver) {
      writer.end();
    } else if (before === null) {
      try {
        this.#choices.resume();
        this.#finishWith(this.#start());
      } catch (error) {
        this.#fail(error);
      }
    } else {
      this.#sendAll();
    }
    return reply;
  }

  /** The reader of this response is gone: nobody reads, unless another one has taken over. */
  leave(reply: FastifyReply): void {
    if (this.#reader !== null && this.#reader.reply !== reply) return;
    this.#reader = null;
    if (!this.#isOver) this.#choices.abort();
  }

  #attach(reply: FastifyReply): Reader {
    const writer = new SseWriter(this.#context.sse, () => `: ${this.#keepAlive()}\n\n`);
    this.#reader = { reply, writer };
    writer.stream.once('close', () => this.leave(reply));
    writer.onReady = () => this.#sendAll();
    reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
    void reply.type('text/event-stream; charset=utf-8').send(writer.stream);
    return this.#reader;
  }

  /** Runs the choices from where they are. */
  #start(): Promise<void> {
    const run = this.#choices.run((choice, output) => {
      this.#hasBegun();
      this.#send(choice, output);
    });
    this.#run = run;
    return run;
  }

  #finishWith(run: Promise<void>): void {
    run.then(
      () => {
        // Otherwise the reader has left, or a later run goes on.
        if (run !== this.#run || this.#ended.size < this.#choices.all.length) return;
        if (this.#options.includeUsage) this.#event(this.#bodies[0]!.usage(this.#choices.usage));
        this.#event('[DONE]');
        this.#end();
      },
      (error: unknown) => {
        if (run === this.#run) this.#fail(error);
      },
    );
  }

  #send({ index }: Choice, output: ChatOutput): void {
    if (this.#reader === null || this.#ended.has(index)) return;
    const isOver = output.finishReason !== null;
    if (!isOver && !this.#reader.writer.isReady) return;
    const pieces = output.take();
    const tail = isOver && pieces.length > 0 && isEmpty(pieces.at(-1)!) ? pieces.splice(-1) : [];
    for (const piece of pieces) this.#event(this.#bodies[index]!.piece(piece, this.#usage));
    if (!isOver) return;
    this.#ended.add(index);
    this.#event(this.#bodies[index]!.finish(output, tail, this.#usage));
  }

  #sendAll(): void {
    for (const choice of this.#choices.all) if (choice.completion) this.#send(choice, choice.completion.output);
  }

  #fail(error: unknown): void {
    const shown = toApiError(error);
    if (shown.code === 'internal_error') this.#log.error(error, 'a stream broke');
    for (const { index, completion } of this.#choices.all) {
      if (completion === null || this.#ended.has(index)) continue;
      for (const piece of completion.output.take()) this.#event(this.#bodies[index]!.piece(piece, this.#usage));
    }
    this.#event(JSON.stringify(shown.toBody()));
    this.#end();
  }

  #event(data: string): void {
    if (this.#events === null) return this.#reader?.writer.event(data);
    const { id, log } = this.#events;
    this.#reader?.writer.event(data, `${id}:${log.length}`);
    log.add(data);
  }

  #end(): void {
    this.#isOver = true;
    this.#reader?.writer.end();
  }

  #keepAlive(): string {
    return keepAlive(this.#context.engine, this.#choices.requestIds());
  }

  get #usage(): Usage | null | undefined {
    const { hasContinuousUsage, includeUsage } = this.#options;
    return hasContinuousUsage ? this.#choices.usage : includeUsage ? null : undefined;
  }
}
