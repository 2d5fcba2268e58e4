/**
 * Rodin inside another program:
 *
 *   import { createServer, createEngine } from 'rodin';
 *
 * createServer() is `rodin serve` as a value; createEngine() answers chat requests without a port. Both run the model in
 * a process of its own. Options are the flags' names in camelCase; RODIN_* variables are not read.
 */
import type { FastifyInstance } from 'fastify';
import { serveConfigOf, type ServeOptions } from './config.js';
import { ApiError, StartupError } from './errors.js';
import { LocalChat, type ChatCompletion, type ChatCompletionChunk, type ChatRequest } from './local-chat.js';
import { Server } from './server.js';

export { ApiError, StartupError };
export type { ChatCompletion, ChatCompletionChunk, ChatRequest, ServeOptions };

export interface LogOptions {
  /** gets log lines, JSON each; without it nothing is logged */
  logStream?: { write(line: string): void };
}

export interface RodinServer {
  /** the Fastify instance: routes and hooks may be added before listen() */
  readonly app: FastifyInstance;
  /** Opens the port and resolves with the URL; the model may load for longer. */
  listen(): Promise<string>;
  /** Resolves when requests are answered; rejects with StartupError where the model cannot be loaded. */
  ready(): Promise<void>;
  /** Lets running completions finish, for `drainSeconds` at most (--shutdown-timeout by default), and ends everything. */
  close(drainSeconds?: number): Promise<void>;
}

export interface RodinEngine {
  /** the name that requests may use */
  readonly model: string;
  /** One answer, whole. Rejects with ApiError. */
  chat(request: ChatRequest, options?: { signal?: AbortSignal }): Promise<ChatCompletion>;
  /** One answer, chunk by chunk. Leaving the loop aborts it; a failure throws ApiError. */
  stream(request: ChatRequest): AsyncIterable<ChatCompletionChunk>;
  close(): Promise<void>;
}

/** Rejects with StartupError where the options or the checkpoint cannot be used. */
export async function createServer(options: ServeOptions & LogOptions = {}): Promise<RodinServer> {
  const server = await makeServer(options);
  return {
    app: server.app,
    listen: () => server.listen(),
    ready: () => server.engine.ready(),
    async close(drainSeconds = server.config.shutdownTimeout) {
      await server.drain.begin(drainSeconds * 1000);
      await server.close();
    },
  };
}

/** Options of an engine: those of a server that have to do with more than its port. */
export type EngineOptions = Omit<ServeOptions, (typeof PORT_OPTIONS)[number]>;

const RESPONSE_OPTIONS = ['responseStore', 'responseStoreSize', 'maxSockets', 'maxLanes', 'socketIdle'] as const;
const PORT_OPTIONS = ['host', 'port', 'corsOrigin', 'streamResume', ...RESPONSE_OPTIONS] as const;

/** Resolves when the model is loaded. Rejects with StartupError where that cannot be. */
export async function createEngine(options: EngineOptions & LogOptions = {}): Promise<RodinEngine> {
  for (const name of PORT_OPTIONS) {
    if (name in options) throw new StartupError(`'${name}' is an option of createServer(): an engine has no port.`);
  }
  // A loop that was left cannot be gone on with.
  const server = await makeServer({ ...options, streamResume: 0 });
  const chat = new LocalChat(server.app, server.modelName, server.config.apiKeys[0]);
  try {
    await server.engine.ready();
  } catch (error) {
    await server.close();
    throw error;
  }
  return {
    model: server.modelName,
    chat: (request, { signal } = {}) => chat.whole(request, signal),
    stream: (request) => chat.stream(request),
    close: () => server.close(),
  };
}

function makeServer({ logStream, ...options }: ServeOptions & LogOptions): Promise<Server> {
  const config = serveConfigOf(options);
  return Server.create(config, logStream && { level: config.logLevel, stream: logStream });
}
