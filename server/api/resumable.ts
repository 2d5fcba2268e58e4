import type { FastifyReply, FastifyRequest } from 'fastify';
import { LRUCache } from 'lru-cache';
import { ApiError } from '../errors.js';
import { checkReady } from './client.js';
import type { ApiContext } from './context.js';
import type { ChoiceStream } from './stream.js';

/** of all streams that were left together */
const MAX_TOTAL_BYTES = 64 * 2 ** 20;

interface Kept {
  stream: ChoiceStream;
  tenant: string;
}

/** Streams whose reader may come back: those that are read now, and those that were left a while ago. */
export class ResumableStreams {
  readonly seconds: number;
  readonly #read = new Map<string, Kept>();
  readonly #left: LRUCache<string, Kept>;

  constructor(seconds: number) {
    this.seconds = seconds;
    this.#left = new LRUCache<string, Kept>({
      maxSize: MAX_TOTAL_BYTES,
      sizeCalculation: ({ stream }) => stream.numBytes + 1024,
      ttl: Math.max(1, 1000 * seconds),
      ttlAutopurge: true,
    });
  }

  /** A stream is read from now on, until the response is over. */
  enter(id: string, kept: Kept, reply: FastifyReply): void {
    this.#left.delete(id);
    this.#read.set(id, kept);
    reply.raw.once('close', () => {
      // Whoever has taken over has entered it anew.
      if (this.#read.get(id) !== kept) return;
      this.#read.delete(id);
      this.#left.set(id, kept);
    });
  }

  find(id: string): Kept | undefined {
    return this.#read.get(id) ?? this.#left.get(id);
  }
}

/** The handler of GET /v1/chat/completions: the rest of a stream, behind the event that Last-Event-ID names. */
export function resumeChatCompletion(context: ApiContext, request: FastifyRequest, reply: FastifyReply): FastifyReply {
  checkReady(context);
  const { resumable } = context;
  const given = request.headers['last-event-id'];
  if (typeof given !== 'string' || given === '') {
    const message = "Send the id of the last event that has arrived as 'Last-Event-ID'; its stream goes on behind it.";
    throw new ApiError('missing_required_parameter', message, 'Last-Event-ID');
  }
  const [, id, number] = /^(.+):(\d{1,15})$/.exec(given) ?? [];
  const kept = id === undefined ? undefined : resumable.find(id);
  if (kept === undefined || kept.tenant !== request.tenant || !kept.stream.has(Number(number))) {
    throw new ApiError(
      'not_found',
      `There is no stream with an event '${given.slice(0, 100)}', or it is over ${resumable.seconds} s ago; send the request again.`,
      'Last-Event-ID',
    );
  }
  // The entry is a new one, so that the end of the response before does not take it away.
  resumable.enter(id!, { ...kept }, reply);
  context.running.enter(id!, kept.stream.choices, request, reply);
  return kept.stream.resume(request, reply, Number(number));
}
