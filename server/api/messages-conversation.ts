import { ApiError } from '../errors.js';
import { depthOf, MAX_TOOL_DEPTH } from './conversation.js';
import type { components } from './openapi.js';

type Schemas = components['schemas'];
type ChatMessage = Schemas['ChatMessage'];
type UserBlock = Schemas['MessagesUserBlock'];
type AssistantBlock = Schemas['MessagesAssistantBlock'];
type TextBlock = Schemas['MessagesTextBlock'];
type ToolResult = Schemas['MessagesToolResultBlock'];

/** A block, and where the request has it. */
interface Placed<Block> {
  block: Block;
  param: string;
}

/** Neighbouring turns of one role are one. */
type Turn =
  | { role: 'user'; blocks: Placed<UserBlock>[] }
  | { role: 'assistant'; blocks: Placed<AssistantBlock>[] }
  | { role: 'system'; blocks: Placed<TextBlock>[] };

/** System text and turns of blocks -> the messages of a chat. Throws ApiError where calls and results do not match. */
export function toChatMessages(
  system: string | readonly TextBlock[] | null | undefined,
  messages: readonly Schemas['MessagesTurn'][],
): ChatMessage[] {
  const chat: ChatMessage[] = [];
  if (system?.length) chat.push({ role: 'system', content: partsOf(system) });
  const turns = joinTurns(messages);
  let callIds: string[] = []; // [num_calls] that wait for their results
  for (const turn of turns) {
    switch (turn.role) {
      case 'system':
        chat.push({ role: 'system', content: turn.blocks.map(({ block }) => textPart(block)) });
        break;
      case 'assistant':
        chat.push(assistantMessage(turn.blocks));
        callIds = turn.blocks.flatMap(({ block }) => (block.type === 'tool_use' ? [block.id] : []));
        break;
      case 'user': {
        chat.push(...toolMessages(turn.blocks, callIds));
        callIds = [];
        const parts = turn.blocks.flatMap(({ block }) => (block.type === 'text' ? [textPart(block)] : []));
        if (parts.length > 0) chat.push({ role: 'user', content: parts });
      }
    }
  }
  const [callId] = callIds;
  if (callId !== undefined) throw withoutResult(callId);
  return chat;
}

function joinTurns(messages: readonly Schemas['MessagesTurn'][]): Turn[] {
  const turns: Turn[] = [];
  messages.forEach(({ role, content }, at) => {
    const blocks: readonly (UserBlock | AssistantBlock)[] =
      typeof content === 'string' ? [{ type: 'text', text: content }] : content;
    const param = `messages[${at}].content`;
    const placed = blocks.map((block, index) => ({ block, param: `${param}[${index}]` }));
    const last = turns.at(-1);
    // The contract has checked that the blocks are of their role.
    if (last?.role === role) (last.blocks as Placed<UserBlock | AssistantBlock>[]).push(...placed);
    else turns.push({ role, blocks: placed } as Turn);
  });
  return turns;
}

function assistantMessage(blocks: readonly Placed<AssistantBlock>[]): Schemas['AssistantMessage'] {
  const parts: Schemas['TextPart'][] = [];
  const reasoning: string[] = [];
  const calls: Schemas['ToolCall'][] = [];
  for (const { block, param } of blocks) {
    switch (block.type) {
      case 'text':
        parts.push(textPart(block));
        break;
      case 'thinking':
        if (block.thinking) reasoning.push(block.thinking);
        break;
      case 'redacted_thinking':
        break;
      case 'tool_use': {
        if (calls.some(({ id }) => id === block.id)) {
          throw new ApiError('invalid_value', `'${param}.id' names another call of the same turn too.`, `${param}.id`);
        }
        const { id, name, input } = block;
        calls.push({ id, type: 'function', function: { name, arguments: spacedJson(input, `${param}.input`) } });
      }
    }
  }
  return {
    role: 'assistant',
    content: parts.length > 0 ? parts : calls.length > 0 ? null : '',
    ...(reasoning.length > 0 ? { reasoning_content: reasoning.join('\n') } : {}),
    ...(calls.length > 0 ? { tool_calls: calls } : {}),
  };
}

/** Results in the order of their calls, because most templates show them without an id. */
function toolMessages(blocks: readonly Placed<UserBlock>[], callIds: readonly string[]): Schemas['ToolMessage'][] {
  const results = new Map<string, ToolResult>();
  for (const { block, param } of blocks) {
    if (block.type !== 'tool_result') continue;
    const id = block.tool_use_id;
    if (!callIds.includes(id) || results.has(id)) {
      const why = results.has(id) ? 'has a result already' : 'is no tool_use of the turn before';
      throw new ApiError('invalid_value', `'${param}.tool_use_id' ${why}: '${id}'.`, `${param}.tool_use_id`);
    }
    results.set(id, block);
  }
  return callIds.map((id) => {
    const result = results.get(id);
    if (!result) throw withoutResult(id);
    const content = typeof result.content === 'string' ? result.content : joinText(result.content ?? []);
    return { role: 'tool', tool_call_id: id, content: result.is_error ? `Error: ${content}` : content };
  });
}

function withoutResult(callId: string): ApiError {
  const message = `The tool_use '${callId}' has no tool_result in the turn after it; send one for every call.`;
  return new ApiError('invalid_value', message, 'messages');
}

function partsOf(content: string | readonly TextBlock[]): string | Schemas['TextPart'][] {
  return typeof content === 'string' ? content : content.map(textPart);
}

function textPart({ text }: TextBlock): Schemas['TextPart'] {
  return { type: 'text', text };
}

function joinText(blocks: readonly TextBlock[]): string {
  return blocks.map(({ text }) => text).join('\n');
}

/** JSON with a space after commas and colons: the form that the models were trained on, and write themselves. */
function spacedJson(input: Record<string, unknown>, param: string): string {
  if (depthOf(input, MAX_TOOL_DEPTH + 1) > MAX_TOOL_DEPTH) {
    throw new ApiError(
      'invalid_value',
      `'${param}' is nested deeper than ${MAX_TOOL_DEPTH} levels; flatten it.`,
      param,
    );
  }
  // A line break in the output is formatting: those of strings are escaped.
  return JSON.stringify(input, null, 1).replace(/,\n */g, ', ').replace(/\n */g, '');
}
