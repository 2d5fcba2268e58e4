import type { FastifyReply } from 'fastify';
import { isEmpty, type ChatOutput, type Piece, type Usage } from './chat-output.js';
import type { Choice, Choices } from './choices.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
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

/**
 * Streams choices as server-sent events. The response begins with the first event, so that an early error still has a
 * status; or when that takes too long.
 */
export async function streamChoices(
  context: ApiContext,
  choices: Choices,
  bodies: readonly ChunkBodies[],
  { includeUsage, hasContinuousUsage }: StreamOptions,
  reply: FastifyReply,
): Promise<unknown> {
  let sse: SseWriter | null = null;
  const ended = new Set<number>();
  const usageNow = (): Usage | null | undefined =>
    hasContinuousUsage ? choices.usage : includeUsage ? null : undefined;
  const send = ({ index }: Choice, output: ChatOutput): void => {
    if (sse === null || ended.has(index)) return;
    const isOver = output.finishReason !== null;
    if (!isOver && !sse.isReady) return;
    const pieces = output.take();
    const tail = isOver && pieces.length > 0 && isEmpty(pieces.at(-1)!) ? pieces.splice(-1) : [];
    for (const piece of pieces) sse.event(bodies[index]!.piece(piece, usageNow()));
    if (!isOver) return;
    ended.add(index);
    sse.event(bodies[index]!.finish(output, tail, usageNow()));
  };
  const sendAll = (): void => {
    for (const choice of choices.all) if (choice.completion) send(choice, choice.completion.output);
  };

  let begin: () => void = () => {};
  const hasBegun = new Promise<'begun'>((resolve) => (begin = () => resolve('begun')));
  let timer: NodeJS.Timeout | undefined;
  const isLate = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), context.sse.heartbeatMs);
  });
  const run = choices.run((choice, output) => {
    begin();
    send(choice, output);
  });
  const started = await Promise.race([hasBegun, isLate, run]).finally(() => clearTimeout(timer));
  if (started === undefined && choices.isAborted) return reply.hijack(); // the client has left

  const writer = new SseWriter(context.sse);
  sse = writer;
  writer.stream.once('close', () => choices.abort());
  writer.onReady = sendAll;
  reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
  void reply.type('text/event-stream; charset=utf-8').send(writer.stream);
  if (started === 'late') writer.comment('keep-alive');
  sendAll();
  run.then(
    () => {
      if (ended.size < choices.all.length) return; // the client has left
      if (includeUsage) writer.event(bodies[0]!.usage(choices.usage));
      writer.event('[DONE]');
      writer.end();
    },
    (error: unknown) => {
      const shown = toApiError(error);
      if (shown.code === 'internal_error') reply.log.error(error, 'a stream broke');
      for (const { index, completion } of choices.all) {
        if (completion === null || ended.has(index)) continue;
        for (const piece of completion.output.take()) writer.event(bodies[index]!.piece(piece, usageNow()));
      }
      writer.event(JSON.stringify(shown.toBody()));
      writer.end();
    },
  );
  return reply;
}
