import { randomUUID } from 'node:crypto';
import type { ServerResponse } from 'node:http';
import type { FastifyInstance } from 'fastify';
import type { components } from './api/openapi.js';
import { ApiError, ERROR_CODES, type ErrorBody, type ErrorCode } from './errors.js';

type Schemas = components['schemas'];

/** The body of POST /v1/chat/completions; the model may be left out. */
export type ChatRequest = Omit<Schemas['ChatCompletionRequest'], 'model' | 'stream'> & { model?: string };
export type ChatCompletion = Schemas['ChatCompletion'];
export type ChatCompletionChunk = Schemas['ChatCompletionChunk'];

/** Chat requests to an application in this process: the same checks, answers and errors as over HTTP, without a port. */
export class LocalChat {
  readonly #app: FastifyInstance;
  readonly #model: string;
  readonly #apiKey: string | undefined;
  /** ids of requests on their way into the application */
  readonly #waiting = new Set<string>();
  /** request id -> its response, until that is over: what aborting destroys */
  readonly #open = new Map<string, ServerResponse>();

  /** The application must not be ready yet. */
  constructor(app: FastifyInstance, model: string, apiKey: string | undefined) {
    this.#app = app;
    this.#model = model;
    this.#apiKey = apiKey;
    app.addHook('onRequest', async (request, reply) => {
      if (!this.#waiting.delete(request.id)) return;
      this.#open.set(request.id, reply.raw);
      reply.raw.once('close', () => this.#open.delete(request.id));
    });
  }

  async whole(request: ChatRequest, signal?: AbortSignal): Promise<ChatCompletion> {
    signal?.throwIfAborted();
    const id = randomUUID();
    const abort = (): void => this.#abort(id);
    signal?.addEventListener('abort', abort, { once: true });
    try {
      const response = await this.#inject(id, { ...request, stream: false });
      const body = response.json<ChatCompletion | ErrorBody>();
      if ('error' in body) throw errorOf(body);
      return body;
    } catch (error) {
      signal?.throwIfAborted();
      throw error;
    } finally {
      signal?.removeEventListener('abort', abort);
      this.#waiting.delete(id);
    }
  }

  async *stream(request: ChatRequest): AsyncGenerator<ChatCompletionChunk, void, void> {
    const id = randomUUID();
    let isOver = false;
    try {
      const response = await this.#inject(id, { ...request, stream: true }, true);
      let text = '';
      for await (const part of response.stream().setEncoding('utf8') as AsyncIterable<string>) {
        text += part;
        if (response.statusCode !== 200) continue;
        const blocks = text.split('\n\n');
        text = blocks.pop()!;
        for (const block of blocks) {
          const data = /^data: (.*)$/m.exec(block)?.[1];
          if (data === undefined || data === '[DONE]') continue; // a comment, or the end
          const chunk = JSON.parse(data) as ChatCompletionChunk | ErrorBody;
          if ('error' in chunk) throw errorOf(chunk);
          yield chunk;
        }
      }
      isOver = true;
      if (response.statusCode !== 200) throw errorOf(JSON.parse(text) as ErrorBody);
    } finally {
      if (!isOver) this.#abort(id);
      this.#waiting.delete(id);
    }
  }

  async #inject(id: string, body: object, payloadAsStream = false) {
    this.#waiting.add(id);
    return this.#app.inject({
      method: 'POST',
      url: '/v1/chat/completions',
      headers: { 'x-request-id': id, ...(this.#apiKey ? { authorization: `Bearer ${this.#apiKey}` } : {}) },
      payload: { model: this.#model, ...body },
      payloadAsStream,
    });
  }

  /** What a client does that hangs up. */
  #abort(id: string): void {
    this.#open.get(id)?.destroy();
  }
}

function errorOf({ error }: ErrorBody): ApiError {
  const code = Object.hasOwn(ERROR_CODES, error.code) ? (error.code as ErrorCode) : 'internal_error';
  return new ApiError(code, error.message, error.param);
}
