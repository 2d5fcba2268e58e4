import type { FastifyReply, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { ChatBodies } from './chat-body.js';
import { isEmpty } from './chat-output.js';
import { readChatRequest, type ChatBody, type ChatJob } from './chat-request.js';
import { Completion } from './completion.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { SseWriter } from './sse.js';

export async function createChatCompletion(
  context: ApiContext,
  request: FastifyRequest<{ Body: ChatBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const job = await readChatRequest(request.body, request.tenant, context);
  checkReady(context);
  const completion = new Completion(job, context, request.log, startedAt);
  const leave = context.drain.enter(() => context.engine.abort(job.engineRequest.requestId));
  // 'close' comes after every response; before the response is written the client has left.
  reply.raw.once('close', () => {
    leave();
    if (!reply.raw.writableFinished) completion.abort();
  });
  if (request.raw.socket.destroyed) {
    leave();
    completion.abort();
  }
  const bodies = new ChatBodies(job, context);
  if (job.isStream) return streamCompletion(context, job, completion, bodies, reply);
  while (await completion.advance());
  if (completion.output.finishReason === null) return reply.hijack();
  return reply.type('application/json; charset=utf-8').send(bodies.whole(completion.output, completion.output.take()));
}

/** The response begins with the first event, so that an early error still has a status; or when that takes too long. */
async function streamCompletion(
  context: ApiContext,
  job: ChatJob,
  completion: Completion,
  bodies: ChatBodies,
  reply: FastifyReply,
): Promise<unknown> {
  const { output } = completion;
  const first = completion.advance();
  let timer: NodeJS.Timeout | undefined;
  const isLate = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), context.sse.heartbeatMs);
  });
  const started = await Promise.race([first, isLate]).finally(() => clearTimeout(timer));
  if (started === false && output.finishReason === null) return reply.hijack(); // the client has left

  const sse = new SseWriter(context.sse);
  sse.stream.once('close', () => completion.abort());
  reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
  void reply.type('text/event-stream; charset=utf-8').send(sse.stream);
  if (started === 'late') sse.comment('keep-alive');

  const flush = (): void => {
    if (output.finishReason === null) for (const piece of output.take()) sse.event(bodies.piece(piece));
  };
  sse.onReady = flush;
  const pump = async (): Promise<void> => {
    let goesOn = await first;
    while (goesOn) {
      if (sse.isReady) flush();
      goesOn = await completion.advance();
    }
    if (output.finishReason === null) return; // the client has left
    const rest = output.take();
    const tail = rest.length > 0 && isEmpty(rest.at(-1)!) ? rest.splice(-1) : [];
    for (const piece of rest) sse.event(bodies.piece(piece));
    sse.event(bodies.finish(output, tail));
    if (job.includeUsage) sse.event(bodies.usage(output.usage));
    sse.event('[DONE]');
    sse.end();
  };
  pump().catch((error: unknown) => {
    const shown = toApiError(error);
    if (shown.code === 'internal_error') reply.log.error(error, 'a stream broke');
    if (output.finishReason === null) for (const piece of output.take()) sse.event(bodies.piece(piece));
    sse.event(JSON.stringify(shown.toBody()));
    sse.end();
  });
  return reply;
}

export function checkReady({ drain }: ApiContext): void {
  if (drain.isDraining) throw new ApiError('shutting_down', 'The server is shutting down; send the request elsewhere.');
}
