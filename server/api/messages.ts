import type { FastifyReply, FastifyRequest } from 'fastify';
import { checkReady } from './chat.js';
import type { ChatOutput } from './chat-output.js';
import { Completion } from './completion.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { ContentBlocks, joinBlocks } from './messages-blocks.js';
import { requestIdOf, toMessagesError } from './messages-error.js';
import {
  countPromptTokens,
  readMessagesRequest,
  type CountBody,
  type MessagesBody,
  type MessagesJob,
} from './messages-request.js';
import type { components } from './openapi.js';
import { SseWriter } from './sse.js';

type Schemas = components['schemas'];

const PING = 'event: ping\ndata: {"type":"ping"}\n\n';

export async function createMessage(
  context: ApiContext,
  request: FastifyRequest<{ Body: MessagesBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const job = await readMessagesRequest(request.body, request.tenant, context);
  checkReady(context);
  const completion = beginCompletion(job, context, request, reply, startedAt);
  if (job.chat.isStream) return streamMessage(context, job, completion, reply);
  while (await completion.advance());
  const { output } = completion;
  if (output.finishReason === null) return reply.hijack(); // the client has left
  const blocks = new ContentBlocks(job);
  const events = [...output.take().flatMap((piece) => blocks.push(piece)), ...blocks.end()];
  const message: Schemas['Message'] = {
    ...headOf(context, job),
    content: joinBlocks(events),
    ...stopOf(output, job),
    usage: usageOf(output),
  };
  return reply.type('application/json; charset=utf-8').send(JSON.stringify(message));
}

/** Submits the job; the client's leaving aborts it, and a shutdown waits for its response. */
function beginCompletion(
  { chat }: MessagesJob,
  context: ApiContext,
  request: FastifyRequest,
  reply: FastifyReply,
  startedAt: number,
): Completion {
  const completion = new Completion(chat, context, request, startedAt);
  const leave = context.drain.enter(() => context.engine.abort(chat.engineRequest.requestId));
  // 'close' comes after every response; before the response is written the client has left.
  reply.raw.once('close', () => {
    leave();
    if (!reply.raw.writableFinished) completion.abort();
  });
  if (request.raw.socket.destroyed) {
    leave();
    completion.abort();
  }
  return completion;
}

export async function countMessageTokens(
  context: ApiContext,
  request: FastifyRequest<{ Body: CountBody }>,
): Promise<Schemas['MessagesCount']> {
  return { input_tokens: await countPromptTokens(request.body, context) };
}

/**
 * The response begins with the first event of the engine, so that an early error still has a status and
 * message_start the usage; or when that takes too long: then message_delta brings what came from the cache.
 */
async function streamMessage(
  context: ApiContext,
  job: MessagesJob,
  completion: Completion,
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

  const sse = new SseWriter(context.sse, PING);
  sse.stream.once('close', () => completion.abort());
  reply.header('cache-control', 'no-cache').header('x-accel-buffering', 'no');
  void reply.type('text/event-stream; charset=utf-8').send(sse.stream);

  const send = (event: Schemas['MessagesEvent']): void => sse.namedEvent(event.type, JSON.stringify(event));
  const blocks = new ContentBlocks(job);
  const flush = (): void => {
    for (const piece of output.take()) blocks.push(piece).forEach(send);
  };
  send({
    type: 'message_start',
    message: {
      ...headOf(context, job),
      content: [],
      stop_reason: null,
      stop_sequence: null,
      usage: usageOf(output),
    },
  });
  sse.onReady = () => {
    if (output.finishReason === null) flush();
  };
  const pump = async (): Promise<void> => {
    let goesOn = await first;
    while (goesOn) {
      if (sse.isReady) flush();
      goesOn = await completion.advance();
    }
    if (output.finishReason === null) return; // the client has left
    flush();
    blocks.end().forEach(send);
    send({ type: 'message_delta', delta: stopOf(output, job), usage: usageOf(output) });
    send({ type: 'message_stop' });
    sse.end();
  };
  pump().catch((error: unknown) => {
    const shown = toApiError(error);
    if (shown.code === 'internal_error') reply.log.error(error, 'a stream broke');
    flush();
    send(toMessagesError(shown, requestIdOf(reply)));
    sse.end();
  });
  return reply;
}

function headOf(
  { modelNames }: ApiContext,
  { chat }: MessagesJob,
): Pick<Schemas['Message'], 'id' | 'type' | 'role' | 'model'> {
  return { id: chat.engineRequest.requestId, type: 'message', role: 'assistant', model: modelNames[0]! };
}

function stopOf(output: ChatOutput, { fillsContext }: MessagesJob): Schemas['MessageDeltaEvent']['delta'] {
  const { finishReason, matchedStop } = output;
  if (matchedStop !== null) return { stop_reason: 'stop_sequence', stop_sequence: matchedStop };
  if (finishReason === 'length') {
    return { stop_reason: fillsContext ? 'model_context_window_exceeded' : 'max_tokens', stop_sequence: null };
  }
  return { stop_reason: finishReason === 'tool_calls' ? 'tool_use' : 'end_turn', stop_sequence: null };
}

function usageOf({ usage }: ChatOutput): Schemas['MessagesUsage'] {
  return {
    input_tokens: usage.prompt_cache_miss_tokens,
    cache_read_input_tokens: usage.prompt_cache_hit_tokens,
    cache_creation_input_tokens: 0,
    output_tokens: usage.completion_tokens,
    output_tokens_details: { thinking_tokens: usage.completion_tokens_details.reasoning_tokens },
  };
}
