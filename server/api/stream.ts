import type { FastifyReply } from 'fastify';
import type { Choices } from './choices.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { ChoiceFeed, type Dialect } from './feed.js';
import { KEEP_ALIVE, SseWriter } from './sse.js';

/**
 * Streams choices as server-sent events. The response begins with the first event, so that an early error still has a
 * status; or when that takes too long. `heartbeat` is sent when nothing else is.
 */
export async function streamChoices(
  context: ApiContext,
  choices: Choices,
  dialect: Dialect,
  reply: FastifyReply,
  heartbeat = KEEP_ALIVE,
): Promise<unknown> {
  const feed = new ChoiceFeed(choices, dialect);
  let begin: () => void = () => {};
  const hasBegun = new Promise<'begun'>((resolve) => (begin = () => resolve('begun')));
  let timer: NodeJS.Timeout | undefined;
  const isLate = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), context.sse.heartbeatMs);
  });
  const run = choices.run((choice, output) => {
    begin();
    feed.onEvent(choice, output);
  });
  const started = await Promise.race([hasBegun, isLate, run]).finally(() => clearTimeout(timer));
  if (started === undefined && choices.isAborted) return reply.hijack(); // the client has left

  const writer = new SseWriter(context.sse, heartbeat);
  writer.stream.once('close', () => choices.abort());
  reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
  void reply.type('text/event-stream; charset=utf-8').send(writer.stream);
  feed.attach(writer);
  if (started === 'late') writer.beat();
  run.then(
    () => {
      if (feed.end()) writer.end();
    },
    (error: unknown) => {
      const shown = toApiError(error);
      if (shown.code === 'internal_error') reply.log.error(error, 'a stream broke');
      feed.fail(shown);
      writer.end();
    },
  );
  return reply;
}
