import type { FastifyReply, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { Choices } from './choices.js';
import { checkReady } from './client.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';
import { ResponseDialect } from './response-dialect.js';
import type { Item } from './response-items.js';
import { ResponseRecord } from './response-record.js';
import { countInputTokens, readResponseRequest, type ResponsesBody } from './response-request.js';
import { keepResponse, type StoredResponse } from './response-store.js';
import { ChoiceStream } from './stream.js';
import { sendWhole } from './whole.js';

type Schemas = components['schemas'];
type ById<Query = unknown> = FastifyRequest<{ Params: { response_id: string }; Querystring: Query }>;
/** Texts, or lists of them where a client says a parameter twice. */
type Query<Name extends string> = Partial<Record<Name, string | string[] | undefined>>;

const JSON_TYPE = 'application/json; charset=utf-8';
const MAX_ITEMS = 100;
const DEFAULT_ITEMS = 20;

export async function createResponse(
  context: ApiContext,
  request: FastifyRequest<{ Body: ResponsesBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const { tenant } = request;
  const job = await readResponseRequest(request.body, tenant, context, context.responses);
  checkReady(context);
  if (job.isInBackground) {
    const run = context.background.start(job, tenant, context, request);
    return job.chat.isStream ? run.read(request, reply, -1) : reply.type(JSON_TYPE).send(run.record.json);
  }
  const record = new ResponseRecord(job, context);
  const choices = new Choices([[job.chat]], context, request, startedAt);
  const dialect = new ResponseDialect(record, choices, () => {
    if (job.isStored) keepResponse(context.responses, record.stored(tenant), request);
  });
  if (job.chat.isStream) return new ChoiceStream(context, choices, dialect).begin(request, reply);
  const bodyOf = (): string => {
    const choice = choices.all[0]!;
    dialect.finish(choice, choice.completion!.output.take());
    return record.json;
  };
  // Where the status is sent already, a response that failed says so itself.
  return sendWhole(context, choices, bodyOf, request, reply, (error) => {
    dialect.fail(error);
    return record.json;
  });
}

export async function countResponseTokens(
  context: ApiContext,
  request: FastifyRequest<{ Body: ResponsesBody }>,
): Promise<Schemas['ResponseTokenCount']> {
  const { body, tenant } = request;
  return {
    object: 'response.input_tokens',
    input_tokens: await countInputTokens(body, tenant, context, context.responses),
  };
}

/** The response as far as it has come; with `stream`, the events of one in the background from anywhere on. */
export function getResponse(
  context: ApiContext,
  request: ById<Query<'stream' | 'starting_after' | 'include' | 'include[]'>>,
  reply: FastifyReply,
): FastifyReply {
  const { stream, starting_after: after, include, 'include[]': includes } = request.query;
  if (include !== undefined || includes !== undefined) {
    const message = "'include' is said when a response is made; here it comes with what was asked for then.";
    throw new ApiError('unsupported_parameter', message, 'include');
  }
  const isStream = readSwitch(stream, 'stream');
  const last = readNumber(after, 'starting_after', 0, Number.MAX_SAFE_INTEGER) ?? -1;
  if (after !== undefined && !isStream) {
    throw new ApiError('invalid_value', "'starting_after' is only allowed with 'stream=true'.", 'starting_after');
  }
  const stored = find(context, request);
  const run = context.background.find(stored.id, request.tenant);
  if (!isStream) {
    return reply.type(JSON_TYPE).send(run && !run.record.isOver ? run.record.json : stored.body);
  }
  if (run === undefined) {
    const message =
      "The events of this response are not kept: they are for a response with 'background' and a while after; leave 'stream' out.";
    throw new ApiError('invalid_value', message, 'stream');
  }
  if (!run.has(last)) {
    const message = `There is no event ${last}, or those behind it are not kept any more; leave 'stream' out.`;
    throw new ApiError('invalid_value', message, 'starting_after');
  }
  return run.read(request, reply, last);
}

export function deleteResponse(context: ApiContext, request: ById): Schemas['DeletedResponse'] {
  const { id } = find(context, request);
  context.background.delete(id);
  context.responses.delete(id);
  return { id, object: 'response', deleted: true };
}

/** One that has ended stays as it is. */
export function cancelResponse(context: ApiContext, request: ById, reply: FastifyReply): FastifyReply {
  const stored = find(context, request);
  if ((JSON.parse(stored.body) as Schemas['Response']).background !== true) {
    const message = "Only a response made with 'background' can be cancelled; leave a stream to end its response.";
    throw new ApiError('invalid_value', message, 'response_id');
  }
  const run = context.background.find(stored.id, request.tenant);
  run?.cancel();
  return reply.type(JSON_TYPE).send(run?.record.json ?? stored.body);
}

export function listInputItems(
  context: ApiContext,
  request: ById<Query<'limit' | 'order' | 'after'>>,
): Schemas['ResponseItemList'] {
  const { limit, order = 'desc', after } = request.query;
  const maxItems = readNumber(limit, 'limit', 1, MAX_ITEMS) ?? DEFAULT_ITEMS;
  if (order !== 'asc' && order !== 'desc') {
    throw new ApiError('invalid_value', "'order' must be asc or desc.", 'order');
  }
  const items = JSON.parse(find(context, request).input) as Item[];
  const ordered = order === 'asc' ? items : items.toReversed();
  const from = after === undefined ? 0 : ordered.findIndex(({ id }) => id === after) + 1;
  if (after !== undefined && from === 0) {
    throw new ApiError('invalid_value', "'after' must be the id of an item of this response's input.", 'after');
  }
  const data = ordered.slice(from, from + maxItems);
  return {
    object: 'list',
    data,
    has_more: from + data.length < ordered.length,
    first_id: data[0]?.id ?? '',
    last_id: data.at(-1)?.id ?? '',
  };
}

function find({ responses }: ApiContext, { params, tenant }: ById): StoredResponse {
  const stored = responses.get(params.response_id, tenant);
  if (stored !== undefined) return stored;
  const message = `There is no response '${params.response_id.slice(0, 100)}': it was not stored, was deleted or had to make room.`;
  throw new ApiError('not_found', message, 'response_id');
}

function readSwitch(value: string | string[] | undefined, param: string): boolean {
  if (value === undefined || value === 'false') return false;
  if (value === 'true') return true;
  throw new ApiError('invalid_value', `'${param}' must be true or false.`, param);
}

function readNumber(value: string | string[] | undefined, param: string, min: number, max: number): number | null {
  if (value === undefined) return null;
  const number = typeof value === 'string' && /^\d{1,15}$/.test(value) ? Number(value) : NaN;
  if (number >= min && number <= max) return number;
  throw new ApiError('invalid_value', `'${param}' must be a whole number from ${min} to ${max}.`, param);
}
