import type { FastifyRequest } from 'fastify';
import type { ValidateFunction } from 'ajv/dist/2020.js';
import { ApiError } from '../errors.js';
import type { RequestOrigin } from './completion.js';
import type { ApiContext } from './context.js';
import { keepSeedSource } from './json-body.js';
import type { components } from './openapi.js';
import { ResponseLane, type LaneRun, type LaneSocket } from './response-lane.js';
import type { ResponsesBody } from './response-request.js';
import { keepResponse, MemoryResponses, type ResponseSource, type StoredResponse } from './response-store.js';
import { refuseUnsupportedInResponses } from './response-unsupported.js';
import { toControl } from './running.js';
import { isObject, type Json } from './unsupported.js';
import { toApiError } from './validation-error.js';

type Schemas = components['schemas'];

/** What is used of a WebSocket of the library ws. */
export interface Socket {
  readonly bufferedAmount: number;
  send(text: string, onSent: () => void): void;
  close(code: number, reason: string): void;
  terminate(): void;
  ping(): void;
  on(event: 'message', listener: (data: Buffer, isBinary: boolean) => void): void;
  on(event: 'close' | 'error' | 'pong', listener: () => void): void;
}

/** Validators of frames and of the body in one. */
export interface FrameValidators {
  create: ValidateFunction;
  control: ValidateFunction;
  body: ValidateFunction;
}

/** Bytes that wait for the client, before events are held back and merged. */
const MAX_BUFFERED_BYTES = 64 * 1024;
/** fields of a frame that are none of the request in it */
const ENVELOPE = new Set(['type', 'stream_id', 'generate']);
const STREAM_ID = /^[\w.-]{1,256}$/;
/** requests that wait in one lane */
const MAX_WAITING = 64;
/** longest frames whose bytes may wait on one socket */
const MAX_WAITING_FRAMES = 4;
/** of the responses of one connection that are stored nowhere else */
const MAX_LOCAL_BYTES = 8 * 2 ** 20;
const PING_MS = 30_000;
const GOING_AWAY = 1001;

/** One client's WebSocket: frames in, events of its lanes out. When it closes, all that runs on it is aborted. */
export class ResponseSocket implements LaneSocket {
  readonly context: ApiContext;
  readonly origin: RequestOrigin;
  readonly tenant: string;
  readonly source: ResponseSource;
  readonly #socket: Socket;
  readonly #validators: FrameValidators;
  readonly #local = new MemoryResponses(MAX_LOCAL_BYTES);
  readonly #lanes = new Map<string | null, ResponseLane>();
  readonly #timer: NodeJS.Timeout;
  #isClosed = false;
  /** when a frame has come, or a lane has become idle */
  #activeAt = performance.now();
  /** when the client has last taken something in */
  #takenAt = performance.now();
  #pingedAt = performance.now();
  #isAlive = true;
  /** more had been sent than the client took in: lanes wait to be told */
  #holdsBack = false;

  constructor(socket: Socket, request: FastifyRequest, context: ApiContext, validators: FrameValidators) {
    this.context = context;
    this.origin = request;
    this.tenant = request.tenant;
    this.#socket = socket;
    this.#validators = validators;
    this.source = { get: (id, tenant) => this.#local.get(id, tenant) ?? context.responses.get(id, tenant) };
    socket.on('message', (data, isBinary) => this.#take(data, isBinary));
    socket.on('pong', () => (this.#isAlive = true));
    socket.on('close', () => this.#leave());
    socket.on('error', () => this.#leave());
    this.#timer = setInterval(() => this.#watch(), Math.min(1000, context.sse.stallMs));
    this.#timer.unref();
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  get isReady(): boolean {
    return !this.#isClosed && this.#socket.bufferedAmount < MAX_BUFFERED_BYTES;
  }

  send(json: string, streamId: string | null): void {
    if (this.#isClosed) return;
    const text = streamId === null ? json : `${json.slice(0, -1)},"stream_id":${JSON.stringify(streamId)}}`;
    if (this.#socket.bufferedAmount === 0) this.#takenAt = performance.now();
    this.#socket.send(text, () => this.#sent());
    if (!this.isReady) this.#holdsBack = true;
  }

  fail(error: ApiError, streamId: string | null): void {
    this.send(errorFrame(error), streamId);
  }

  /** Responses of this connection can be gone on with here, also those that are not stored. */
  keep(response: StoredResponse, isStored: boolean): void {
    keepResponse(isStored ? this.context.responses : this.#local, response, this.origin);
  }

  #take(data: Buffer, isBinary: boolean): void {
    this.#activeAt = performance.now();
    let streamId: string | null = null;
    try {
      const { text, frame } = this.#parse(data, isBinary);
      const given = frame['stream_id'];
      if (typeof given === 'string' && STREAM_ID.test(given)) streamId = given;
      switch (frame['type']) {
        case 'response.create':
          this.#create(frame, text);
          break;
        case 'response.control':
          this.#control(frame);
          break;
        default: {
          const message = "'type' must be response.create or response.control.";
          throw new ApiError('invalid_value', message, 'type');
        }
      }
    } catch (error) {
      if (!(error instanceof ApiError)) this.origin.log.error(error, 'a frame of a WebSocket broke');
      const broke = new ApiError('internal_error', 'Something broke on the server; its log says what.');
      this.fail(error instanceof ApiError ? error : broke, streamId);
    }
  }

  #parse(data: Buffer, isBinary: boolean): { text: string; frame: Json } {
    const { maxBodyBytes } = this.context.config;
    if (data.length > maxBodyBytes) {
      const message = `The frame has ${data.length} bytes; --max-body-size allows ${maxBodyBytes}.`;
      throw new ApiError('request_too_large', message);
    }
    const text = isBinary ? '' : data.toString();
    let frame: unknown;
    try {
      frame = JSON.parse(text);
    } catch (error) {
      const problem = isBinary ? 'is binary; send text' : `is not valid JSON: ${(error as Error).message}`;
      throw new ApiError('invalid_json', `The frame ${problem}.`);
    }
    if (!isObject(frame)) throw new ApiError('invalid_type', 'The frame must be a JSON object.');
    return { text, frame };
  }

  #create(frame: Json, text: string): void {
    validate(this.#validators.create, frame);
    const { stream_id: streamId = null, generate = true } = frame as Schemas['ResponseCreateFrame'];
    const body = Object.fromEntries(Object.entries(frame).filter(([name]) => !ENVELOPE.has(name)));
    if (body['stream'] === false || body['background'] === true) {
      const param = body['background'] === true ? 'background' : 'stream';
      const message = `'${param}' does not go with a WebSocket, where every response is streamed; remove it.`;
      throw new ApiError('unsupported_value', message, param);
    }
    keepSeedSource(body, text);
    refuseUnsupportedInResponses(body);
    validate(this.#validators.body, body);
    const numBytes = text.length;
    const lanes = [...this.#lanes.values()];
    const waitingBytes = lanes.reduce((sum, lane) => sum + lane.waitingBytes, 0);
    if (waitingBytes > 0 && waitingBytes + numBytes > MAX_WAITING_FRAMES * this.context.config.maxBodyBytes) {
      const message = `Requests of ${waitingBytes} bytes wait on this WebSocket already; send the next one when some have ended.`;
      throw new ApiError('queue_full', message);
    }
    const lane = this.#laneOf(streamId);
    if (lane.numWaiting >= MAX_WAITING) {
      const message = `${MAX_WAITING} requests wait in this lane already; send the next one when some have ended.`;
      throw new ApiError('queue_full', message, 'stream_id');
    }
    lane.push({ body: body as unknown as ResponsesBody, generates: generate, numBytes });
  }

  /** A lane is there as long as something runs or waits in it. */
  #laneOf(streamId: string | null): ResponseLane {
    const known = this.#lanes.get(streamId);
    if (known !== undefined) return known;
    const { maxLanes } = this.context.config;
    if (this.#lanes.size >= maxLanes) {
      const message = `This WebSocket has ${maxLanes} lanes at work, which is its limit; wait for one, or open another.`;
      throw new ApiError('websocket_stream_limit_reached', message, 'stream_id');
    }
    const lane = new ResponseLane(this, streamId, () => {
      this.#lanes.delete(streamId);
      this.#activeAt = performance.now();
    });
    this.#lanes.set(streamId, lane);
    return lane;
  }

  #control(frame: Json): void {
    validate(this.#validators.control, frame);
    const { action, tokens, ...target } = frame as Schemas['ResponseControlFrame'];
    const run = this.#find(target);
    if (action === 'cancel') {
      if (tokens === undefined) return run.cancel();
      throw new ApiError('invalid_value', "'tokens' belongs to extend_thinking; remove it.", 'tokens');
    }
    if (this.context.prompts.markers.thinkEnd < 0) {
      const message = "This model's reasoning has no end marker that could be forced or held back.";
      throw new ApiError('unsupported_value', message, 'action');
    }
    const control = toControl({ action, ...(tokens === undefined ? {} : { tokens }) }, this.context);
    if (run.choices.control(control).length > 0) return;
    throw new ApiError('not_reasoning', 'Reasoning is over, or has not begun; the answer cannot be steered.', 'action');
  }

  /** The response that a control is for: by its id, or what its lane makes. */
  #find({ response_id: id, stream_id: streamId }: Partial<Schemas['ResponseControlFrame']>): LaneRun {
    const lane = this.#lanes.get(streamId ?? null);
    const runs = id === undefined ? [lane?.run] : [...this.#lanes.values()].map(({ run }) => run);
    const found = runs.find((run) => run && (id === undefined || run.id === id));
    if (found) return found;
    const param = id === undefined ? 'stream_id' : 'response_id';
    const message =
      'No such response is being made on this WebSocket; send the frame between its first event and its last.';
    throw new ApiError('not_found', message, param);
  }

  #sent(): void {
    this.#takenAt = performance.now();
    if (!this.#holdsBack || !this.isReady) return;
    this.#holdsBack = false;
    for (const lane of this.#lanes.values()) lane.onReady();
  }

  /** Cuts off a client that is gone or takes nothing in, and one that has nothing more to say. */
  #watch(): void {
    const now = performance.now();
    const { config, sse } = this.context;
    if (this.#socket.bufferedAmount > 0 && now - this.#takenAt >= sse.stallMs) return this.#socket.terminate();
    if (now - this.#pingedAt >= PING_MS) {
      if (!this.#isAlive) return this.#socket.terminate();
      this.#isAlive = false;
      this.#pingedAt = now;
      this.#socket.ping();
    }
    if (this.#lanes.size > 0 || now - this.#activeAt < config.socketIdle * 1000) return;
    const message = `No frame has come for ${config.socketIdle} s; open a new WebSocket to go on.`;
    this.fail(new ApiError('websocket_connection_limit_reached', message), null);
    this.#socket.close(GOING_AWAY, 'idle');
  }

  #leave(): void {
    this.#isClosed = true;
    clearInterval(this.#timer);
    for (const lane of this.#lanes.values()) lane.close();
    this.#local.close();
  }
}

/** As the API's own clients know it: the error of HTTP beside its status. */
export function errorFrame(error: ApiError): string {
  return JSON.stringify({ type: 'error', status: error.status, ...error.toBody() });
}

/** Throws ApiError for the first thing that is wrong. */
function validate(validator: ValidateFunction, value: unknown): void {
  if (!validator(value)) throw toApiError(validator.errors!);
}
