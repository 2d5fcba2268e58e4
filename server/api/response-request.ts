import { ApiError } from '../errors.js';
import { cacheSaltOf, readChatRequest, type ChatBody, type ChatJob } from './chat-request.js';
import type { ApiContext } from './context.js';
import { readConversation } from './conversation.js';
import { renamed, withNames, type FieldName } from './field-names.js';
import { SEED_SOURCE, type JsonBody } from './json-body.js';
import type { components } from './openapi.js';
import { toChatMessages } from './response-conversation.js';
import { newId, readItems, type Item } from './response-items.js';
import { itemsBefore, type ResponseSource } from './response-store.js';
import { checkThinking, readThinking } from './thinking.js';

type Schemas = components['schemas'];
export type ResponsesBody = Schemas['ResponsesRequest'];

/** A request for a response as the chat job that it is, and what its response needs beside that. */
export interface ResponseJob {
  chat: ChatJob;
  body: ResponsesBody;
  /** items of the request, with ids */
  input: readonly Item[];
  isStored: boolean;
  isInBackground: boolean;
}

/**
 * Throws ApiError for whatever cannot be served. `source` knows the responses that may be gone on with. Where nothing is
 * generated, instructions alone may be computed ahead.
 */
export async function readResponseRequest(
  body: ResponsesBody,
  tenant: string,
  context: ApiContext,
  source: ResponseSource,
  generates = true,
): Promise<ResponseJob> {
  checkBackground(body);
  const { conversation, input } = conversationOf(body, tenant, source, generates);
  const chatBody: ChatBody = {
    ...conversation,
    ...samplingOf(body),
    stream: body.stream ?? null,
    // Items keep reasoning apart, whatever --reasoning-format says of chats.
    separate_reasoning: true,
  };
  const names = namesOf(body);
  const chat = await withNames(names, () => readChatRequest(chatBody, tenant, context, { isPrefillOnly: !generates }));
  chat.id = chat.engineRequest.requestId = newId('resp');
  chat.formatParam = renamed(chat.formatParam, names);
  return { chat, body, input, isStored: body.store !== false, isInBackground: body.background === true };
}

/** Prompt tokens of a request, also where no context could hold them. */
export async function countInputTokens(
  body: ResponsesBody,
  tenant: string,
  context: ApiContext,
  source: ResponseSource,
): Promise<number> {
  const unlimited = { ...context, maxModelLen: Number.MAX_SAFE_INTEGER };
  const { conversation } = conversationOf(body, tenant, source);
  return withNames(namesOf(body), async () => {
    const wish = readThinking(conversation);
    checkThinking(wish, conversation, context);
    return (await readConversation(conversation, wish, unlimited, cacheSaltOf(tenant, null))).ids.length;
  });
}

function checkBackground({ background, store }: ResponsesBody): void {
  if (background !== true || store !== false) return;
  const message = "A response in the background is read by its id: 'background' needs 'store' to be true.";
  throw new ApiError('invalid_value', message, 'background');
}

/** What makes up the prompt: the responses before, then the items of this request. */
function conversationOf(
  body: ResponsesBody,
  tenant: string,
  source: ResponseSource,
  generates = true,
): { conversation: ChatBody; input: Item[] } {
  const { model, instructions, tools, tool_choice: choice, reasoning, previous_response_id: previousId } = body;
  const before = previousId ? itemsBefore(previousId, tenant, source) : [];
  const input = readItems(body.input, (id) => before.find((item) => item.id === id));
  const last = before.at(-1);
  const goesOn = input.length > 0 || (last !== undefined && !isSaid(last)) || (!generates && instructions);
  if (!goesOn) {
    const message = "'input' is missing: send a text or items for the model to answer.";
    throw new ApiError('missing_required_parameter', message, 'input');
  }
  const conversation: ChatBody = {
    model,
    messages: toChatMessages(instructions, [...before, ...input]),
    ...(tools?.length ? { tools: tools.map(toChatTool) } : {}),
    ...(choice === undefined || choice === null ? {} : { tool_choice: toChatChoice(choice) }),
    ...(reasoning?.effort ? { reasoning_effort: reasoning.effort } : {}),
    ...(body.thinking_token_budget === undefined ? {} : { thinking_token_budget: body.thinking_token_budget }),
  };
  return { conversation, input };
}

/** Whether the model has said it: then nobody has answered yet. */
function isSaid(item: Item): boolean {
  const { type } = item;
  return type === 'reasoning' || type === 'function_call' || (type === 'message' && item.role === 'assistant');
}

function samplingOf(body: ResponsesBody): Partial<ChatBody> {
  const wantsLogprobs = (body.top_logprobs ?? 0) > 0 || (body.include ?? []).includes('message.output_text.logprobs');
  const seedSource = (body as Partial<JsonBody>)[SEED_SOURCE];
  const sampling = {
    ...formatOf(body),
    max_completion_tokens: body.max_output_tokens ?? null,
    temperature: body.temperature ?? null,
    top_p: body.top_p ?? null,
    top_k: body.top_k ?? null,
    min_p: body.min_p ?? null,
    seed: body.seed ?? null,
    priority: body.priority ?? 0,
    cache_salt: body.cache_salt ?? null,
    parallel_tool_calls: body.parallel_tool_calls ?? null,
    ...(wantsLogprobs ? { logprobs: true, top_logprobs: body.top_logprobs ?? 0 } : {}),
    ...(seedSource === undefined ? {} : { [SEED_SOURCE]: seedSource }),
  };
  return sampling;
}

function formatOf({ text }: ResponsesBody): Partial<ChatBody> {
  const format = text?.format;
  if (!format || format.type === 'text') return {};
  if (format.type === 'json_object') return { response_format: { type: 'json_object' } };
  const { name, schema } = format;
  return {
    response_format: { type: 'json_schema', json_schema: { name: name ?? 'output', ...(schema && { schema }) } },
  };
}

/** Chat's names of fields in messages of errors -> the ones of this API. */
function namesOf({ instructions }: ResponsesBody): FieldName[] {
  return [
    [/max_completion_tokens/, 'max_output_tokens'],
    [/response_format\.json_schema/, 'text.format'],
    [/response_format/, 'text.format'],
    [/(tools\[\d+\])\.function\./, '$1.'],
    [/^reasoning_effort$|(?<=')reasoning_effort(?=')/, 'reasoning.effort'],
    [/messages\[0\](\.\w+|\[\d+\])*/, instructions ? 'instructions' : 'input'],
    [/messages(\[\d+\])?(\.\w+|\[\d+\])*/, 'input'],
  ];
}

function toChatTool({ name, description, parameters, strict }: Schemas['ResponsesTool']): Schemas['Tool'] {
  return {
    type: 'function',
    function: {
      name,
      ...(description ? { description } : {}),
      ...(parameters ? { parameters } : {}),
      ...(strict ? { strict } : {}),
    },
  };
}

function toChatChoice(choice: NonNullable<ResponsesBody['tool_choice']>): NonNullable<ChatBody['tool_choice']> {
  if (typeof choice === 'string') return choice;
  const { type, name, mode, tools } = choice as Record<string, unknown>;
  if (type === 'function') return { type, function: { name } };
  const named = (Array.isArray(tools) ? tools : []).map((tool: unknown) => ({
    type: 'function',
    function: { name: (tool as { name?: string } | null)?.name },
  }));
  return { type: 'allowed_tools', allowed_tools: { mode, tools: named } };
}
