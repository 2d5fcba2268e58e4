import { randomUUID } from 'node:crypto';
import { ApiError } from '../errors.js';
import { checkModel, readChatRequest, type ChatBody, type ChatJob } from './chat-request.js';
import type { ApiContext } from './context.js';
import { readConversation } from './conversation.js';
import { toChatMessages } from './messages-conversation.js';
import type { components } from './openapi.js';
import { readThinking } from './thinking.js';

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
  const chat = await readChatRequest(chatBody, tenant, context, true);
  const fillsContext = body.max_tokens > chat.engineRequest.sampling.maxTokens;
  chat.engineRequest.requestId = `msg_${randomUUID().replaceAll('-', '')}`;
  return { chat, fillsContext, omitsThinking: body.thinking?.display === 'omitted' };
}

/** Prompt tokens of a request, also where no context could hold them. */
export async function countPromptTokens(body: CountBody, context: ApiContext): Promise<number> {
  checkModel(body.model, context);
  const unlimited = { ...context, maxModelLen: Number.MAX_SAFE_INTEGER };
  const conversation = conversationOf(body, context);
  const { ids } = await readConversation(conversation, readThinking(conversation), unlimited);
  return ids.length;
}

/** What makes up the prompt. */
function conversationOf(body: MessagesBody | CountBody, { prompts }: ApiContext): ChatBody {
  const { model, system, messages, tools, tool_choice: choice, thinking } = body;
  // A model that has no switch thinks as it likes: that is what adaptive asks for.
  const isSwitched = thinking && (thinking.type !== 'adaptive' || prompts.hasThinkingSwitch);
  return {
    model,
    messages: toChatMessages(system, messages),
    ...(tools ? { tools: tools.map(toChatTool) } : {}),
    ...(choice?.type === 'none' ? { tool_choice: 'none' } : {}),
    ...(isSwitched ? { thinking: { type: thinking.type === 'disabled' ? 'disabled' : 'enabled' } } : {}),
  };
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
}: components['schemas']['MessagesTool']): components['schemas']['Tool'] {
  return { type: 'function', function: { name, ...(description ? { description } : {}), parameters } };
}

function checkStops(stops: readonly string[]): void {
  stops.forEach((text, index) => {
    if (!/\p{Surrogate}/u.test(text)) return;
    const param = `stop_sequences[${index}]`;
    throw new ApiError('invalid_value', `'${param}' holds half of a surrogate pair; send whole characters.`, param);
  });
}
