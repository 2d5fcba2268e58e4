import { randomUUID } from 'node:crypto';
import { ApiError } from '../errors.js';
import { cacheSaltOf, checkModel, readChatRequest, type ChatBody, type ChatJob } from './chat-request.js';
import type { ApiContext } from './context.js';
import { readConversation } from './conversation.js';
import { renamed, withNames, type FieldName } from './field-names.js';
import { toChatMessages } from './messages-conversation.js';
import type { components } from './openapi.js';
import { checkThinking, readThinking } from './thinking.js';

export type MessagesBody = components['schemas']['MessagesRequest'];
export type CountBody = components['schemas']['MessagesCountRequest'];

/** A Messages request as the chat job that it is, and what its response needs beside that. */
export interface MessagesJob {
  chat: ChatJob;
  /** the context ends before max_tokens do */
  fillsContext: boolean;
  omitsThinking: boolean;
}

/** Throws ApiError for whatever cannot be served. */
export async function readMessagesRequest(
  body: MessagesBody,
  tenant: string,
  context: ApiContext,
): Promise<MessagesJob> {
  checkStops(body.stop_sequences ?? []);
  const chatBody: ChatBody = {
    ...conversationOf(body, context),
    ...thinkingBudgetOf(body),
    ...formatOf(body),
    max_tokens: body.max_tokens,
    temperature: body.temperature ?? null,
    top_p: body.top_p ?? null,
    top_k: body.top_k ?? null,
    stop: body.stop_sequences ?? null,
    stream: body.stream ?? null,
    parallel_tool_calls: !body.tool_choice?.disable_parallel_tool_use,
    // Blocks keep reasoning apart, whatever --reasoning-format says of chats.
    separate_reasoning: true,
  };
  const names = namesOf(body);
  const chat = await withNames(names, () => readChatRequest(chatBody, tenant, context, { mayFillContext: true }));
  const fillsContext = body.max_tokens > chat.engineRequest.sampling.maxTokens;
  chat.engineRequest.requestId = `msg_${randomUUID().replaceAll('-', '')}`;
  chat.formatParam = renamed(chat.formatParam, names);
  return { chat, fillsContext, omitsThinking: body.thinking?.display === 'omitted' };
}

/** Prompt tokens of a request, also where no context could hold them. */
export async function countPromptTokens(body: CountBody, tenant: string, context: ApiContext): Promise<number> {
  checkModel(body.model, context);
  const unlimited = { ...context, maxModelLen: Number.MAX_SAFE_INTEGER };
  const conversation = conversationOf(body, context);
  return withNames(namesOf(body), async () => {
    const wish = readThinking(conversation);
    checkThinking(wish, conversation, context);
    return (await readConversation(conversation, wish, unlimited, cacheSaltOf(tenant, null))).ids.length;
  });
}

/** What makes up the prompt. */
function conversationOf(body: MessagesBody | CountBody, { prompts }: ApiContext): ChatBody {
  const { model, system, messages, tools, tool_choice: choice, thinking, output_config: output } = body;
  // A model that has no switch thinks as it likes: that is what adaptive asks for.
  const isSwitched = thinking && (thinking.type !== 'adaptive' || prompts.hasThinkingSwitch);
  // The default effort of a model that does not reason is no effort.
  const canReason = prompts.markers.thinkEnd >= 0 || prompts.form === 'r1-zero';
  const effort = output?.effort === 'high' && !canReason ? null : output?.effort;
  return {
    model,
    messages: toChatMessages(system, messages),
    ...(tools ? { tools: tools.map(toChatTool) } : {}),
    ...(choice ? { tool_choice: toChatChoice(choice) } : {}),
    ...(isSwitched ? { thinking: { type: thinking.type === 'disabled' ? 'disabled' : 'enabled' } } : {}),
    ...(effort && thinking?.type !== 'disabled' ? { output_config: { effort } } : {}),
  };
}

/** The text's format under either of its names. */
function formatOf({ output_config: output, output_format: older }: MessagesBody): Partial<ChatBody> {
  const newer = output?.format;
  if (newer && older) {
    const message = "'output_config.format' and 'output_format' both say a format; give one of them.";
    throw new ApiError('invalid_value', message, 'output_format');
  }
  const format = newer ?? older;
  if (!format) return {};
  return { response_format: { type: 'json_schema', json_schema: { name: 'output', schema: format.schema } } };
}

/** Chat's names of fields in messages of errors -> the ones of this API. */
function namesOf({ messages, ...rest }: MessagesBody | CountBody): FieldName[] {
  const format = 'output_format' in rest && rest.output_format ? 'output_format' : 'output_config.format';
  return [
    [/response_format\.json_schema\.schema/, `${format}.schema`],
    [/(tools\[\d+\])\.function\.parameters/, '$1.input_schema'],
    [/messages\[\d+\]\.reasoning(_content)?/, `messages[${messages.length - 1}].content`],
  ];
}

/** Fields of a chat request that say how long the model may think; {} where there is no budget. */
function thinkingBudgetOf({ thinking, max_tokens: maxTokens }: MessagesBody): Partial<ChatBody> {
  const budget = thinking?.budget_tokens ?? null;
  const param = 'thinking.budget_tokens';
  if (thinking?.type !== 'enabled') {
    if (budget === null) return {};
    throw new ApiError('invalid_value', `'${param}' is only allowed with thinking.type 'enabled'; remove it.`, param);
  }
  if (budget === null) {
    const message = `'${param}' is missing; thinking.type 'enabled' needs it, 'adaptive' does not.`;
    throw new ApiError('missing_required_parameter', message, param);
  }
  if (budget >= maxTokens) {
    const message = `'${param}' must be less than max_tokens, ${maxTokens}, which it is part of; it is ${budget}.`;
    throw new ApiError('invalid_value', message, param);
  }
  return { thinking: { type: 'enabled', budget_tokens: budget } };
}

function toChatTool({
  name,
  description,
  input_schema: parameters,
  strict,
}: components['schemas']['MessagesTool']): components['schemas']['Tool'] {
  const described = description ? { description } : {};
  return { type: 'function', function: { name, ...described, parameters, ...(strict ? { strict } : {}) } };
}

function toChatChoice(choice: components['schemas']['MessagesToolChoice']): NonNullable<ChatBody['tool_choice']> {
  switch (choice.type) {
    case 'auto':
    case 'none':
      return choice.type;
    case 'any':
      return 'required';
    case 'tool':
      if (choice.name) return { type: 'function', function: { name: choice.name } };
      throw new ApiError('missing_required_parameter', "'tool_choice.name' is missing; it says which tool.", 'tool_choice.name'); // prettier-ignore
  }
}

function checkStops(stops: readonly string[]): void {
  stops.forEach((text, index) => {
    if (!/\p{Surrogate}/u.test(text)) return;
    const param = `stop_sequences[${index}]`;
    throw new ApiError('invalid_value', `'${param}' holds half of a surrogate pair; send whole characters.`, param);
  });
}
