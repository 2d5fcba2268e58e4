import { randomUUID } from 'node:crypto';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { withSeed } from './chat-body.js';
import { jobOfChoice, readChatRequest, type ChatBody, type ChatJob } from './chat-request.js';
import { Choices } from './choices.js';
import { checkReady } from './client.js';
import type { ApiContext } from './context.js';
import { SEED_SOURCE, type JsonBody } from './json-body.js';
import type { components } from './openapi.js';
import { refuseUnsupported } from './unsupported.js';
import { sendWhole } from './whole.js';

type Schemas = components['schemas'];
type ReplayBody = Schemas['ReplayRequest'];

/** What is generated, and the tokens that should come out: null where a second generation says it. */
interface Replay {
  /** of the response that is generated again */
  id: string | null;
  job: ChatJob;
  expectedIds: readonly number[] | null; // [num_expected]
}

/** The handler of POST /v1/replay: generates a completion again and tells the first token that differs. */
export async function replayCompletion(
  context: ApiContext,
  request: FastifyRequest<{ Body: ReplayBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const { id, job, expectedIds } = await readReplay(request.body, request.tenant, context);
  checkReady(context);
  // A second one with the same seed, not the next.
  const again = jobOfChoice(job, 1);
  const twin = { ...again, engineRequest: { ...again.engineRequest, sampling: job.engineRequest.sampling } };
  const choices = new Choices([expectedIds ? [job] : [job, twin]], context, request, startedAt);
  const bodyOf = (): string => {
    const [first, second] = choices.all.map(({ completion }) => completion!.ids);
    const difference = firstDifference(expectedIds ?? first!, second ?? first!, context);
    const body: Omit<Schemas['Replay'], 'seed'> = {
      object: 'replay',
      id,
      is_identical: difference === null,
      num_tokens: difference?.position ?? first!.length,
      difference,
      system_fingerprint: context.systemFingerprint,
    };
    return withSeed(JSON.stringify(body), job);
  };
  return sendWhole(context, choices, bodyOf, request, reply);
}

async function readReplay(body: ReplayBody, tenant: string, context: ApiContext): Promise<Replay> {
  const { id, index = 0, request, seed, token_ids: tokenIds } = body;
  if ((id === undefined) === (request === undefined)) {
    const code = id === undefined ? 'missing_required_parameter' : 'invalid_value';
    throw new ApiError(code, "Give either the 'id' of a response, or its 'request' and 'seed'.", 'id');
  }
  if (id === undefined) {
    const job = await readChatRequest(readRequest(body, context), tenant, context);
    return { id: null, job: { ...job, numChoices: 1 }, expectedIds: tokenIds ?? null };
  }
  for (const [param, value] of Object.entries({ seed, token_ids: tokenIds })) {
    if (value === undefined) continue;
    throw new ApiError('invalid_value', `'${param}' belongs to 'request'; with 'id' it is known.`, param);
  }
  const finished = context.finished.find(id, index, tenant);
  if (finished === undefined) {
    const message = `There is no finished completion '${id.slice(0, 100)}' with a choice ${index}, or it is too long ago; give its 'request' and 'seed'.`;
    throw new ApiError('not_found', message, 'id');
  }
  const { job, controls } = finished;
  const requestId = `replay-${randomUUID().replaceAll('-', '')}`;
  const marked = controls.length > 0 ? { controls } : {};
  const engineRequest = { ...job.engineRequest, ...marked, requestId };
  return { id, job: { ...job, engineRequest, numChoices: 1 }, expectedIds: finished.tokenIds };
}

/** The chat request of the body, with its seed. Its fields are checked like those of a request of its own. */
function readRequest(body: ReplayBody, { contract }: ApiContext): ChatBody {
  const fields: ChatBody = { ...body.request! };
  refuseUnsupported(fields, new Set(contract.propertiesOf('ChatCompletionRequest')));
  if ((fields.n ?? 1) !== 1) {
    throw new ApiError('invalid_value', "Replay one choice: remove 'n', and give 'seed' plus its index.", 'request.n');
  }
  const { [SEED_SOURCE]: source } = body as Partial<JsonBody>;
  const seed = body.seed ?? fields.seed;
  if (seed === undefined || seed === null) {
    throw new ApiError('missing_required_parameter', "Give the 'seed' that the response says.", 'seed');
  }
  if (source === undefined && !Number.isSafeInteger(seed)) {
    throw new ApiError('invalid_value', "A seed of 64 bits must stand beside 'request', not in it.", 'request.seed');
  }
  return Object.assign(fields, { seed, stream: false, stream_options: null, vote: false }, { [SEED_SOURCE]: source });
}

function firstDifference(
  expected: readonly number[],
  actual: readonly number[],
  { prompts }: ApiContext,
): Schemas['Replay']['difference'] {
  const length = Math.max(expected.length, actual.length);
  let position = 0;
  while (position < length && expected[position] === actual[position]) position++;
  if (position === length) return null;
  const tokenOf = (id: number | undefined) => (id === undefined ? null : { token_id: id, text: prompts.textOf([id]) });
  return { position, expected: tokenOf(expected[position]), actual: tokenOf(actual[position]) };
}
