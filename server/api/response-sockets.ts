import websocket from '@fastify/websocket';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import type { ApiContext } from './context.js';
import { errorFrame, ResponseSocket, type FrameValidators, type Socket } from './response-socket.js';

const TRY_LATER = 1013;
const GOING_AWAY = 1001;
/** for clients to answer the server's close */
const CLOSE_MS = 1000;

/** The WebSockets of /v1/responses. */
export class ResponseSockets {
  readonly #context: ApiContext;
  readonly #validators: FrameValidators;
  readonly #open = new Set<Socket>();

  constructor(context: ApiContext) {
    const { contract } = context;
    this.#context = context;
    this.#validators = {
      create: contract.validator('#/components/schemas/ResponseCreateFrame'),
      control: contract.validator('#/components/schemas/ResponseControlFrame'),
      body: contract.validator('#/components/schemas/ResponsesRequest'),
    };
  }

  /** Lets routes of the application have a wsHandler once it is loaded. */
  register(app: FastifyInstance): void {
    // An upgrade that is refused before the plugin's own hooks run: nobody else ends its connection.
    app.addHook('onResponse', async (request) => {
      if (!request.ws && request.headers.upgrade !== undefined) request.raw.socket.destroy();
    });
    void app.register(websocket, {
      // A frame that is somewhat too large is answered; one far beyond closes the socket before it is read.
      options: { maxPayload: 2 * this.#context.config.maxBodyBytes },
      errorHandler: (error, _socket, request) => request.log.debug(error, 'a WebSocket broke'),
      preClose: (done) => {
        for (const socket of this.#open) socket.close(GOING_AWAY, 'the server is shutting down');
        setTimeout(() => this.#open.forEach((socket) => socket.terminate()), CLOSE_MS).unref();
        done();
      },
    });
  }

  connect(socket: Socket, request: FastifyRequest): void {
    const { maxSockets } = this.#context.config;
    if (this.#open.size >= maxSockets) {
      const message = `The server has ${maxSockets} WebSockets, which is its limit; try again later, or use HTTP.`;
      socket.send(errorFrame(new ApiError('websocket_connection_limit_reached', message)), () => {});
      return socket.close(TRY_LATER, 'too many WebSockets');
    }
    const { metrics } = this.#context;
    this.#open.add(socket);
    metrics.observeWebSockets(this.#open.size);
    socket.on('close', () => {
      this.#open.delete(socket);
      metrics.observeWebSockets(this.#open.size);
    });
    new ResponseSocket(socket, request, this.#context, this.#validators);
  }
}

/**
 * A page may open a WebSocket to any server, and no browser asks that server first: what it may not call by HTTP, it
 * may not call so either. Throws ApiError.
 */
export function checkOrigin({ headers }: FastifyRequest, { config }: ApiContext): void {
  const { origin, host } = headers;
  if (origin === undefined || config.corsOrigins.includes('*') || config.corsOrigins.includes(origin)) return;
  if (URL.canParse(origin) && new URL(origin).host === host) return;
  const message = `Pages of ${origin.slice(0, 100)} may not use this server; --cors-origin allows it.`;
  throw new ApiError('origin_not_allowed', message, 'origin');
}

/** The handler of GET /v1/responses without an upgrade. */
export function refusePlainRequest(): never {
  const message = "GET /v1/responses opens a WebSocket: connect with 'Upgrade: websocket', or POST for one response.";
  throw new ApiError('upgrade_required', message);
}
