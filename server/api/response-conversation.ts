import { ApiError } from '../errors.js';
import type { components } from './openapi.js';
import type { Item } from './response-items.js';

type Schemas = components['schemas'];
type ChatMessage = Schemas['ChatMessage'];
type ToolMessage = Schemas['ToolMessage'];

/** An assistant's turn that items are being added to. */
interface Turn {
  reasoning: string[];
  parts: string[];
  calls: Schemas['ToolCall'][];
}

/** Instructions and items -> the messages of a chat. Throws ApiError where calls and their outputs do not match. */
export function toChatMessages(instructions: string | null | undefined, items: readonly Item[]): ChatMessage[] {
  const chat: ChatMessage[] = instructions ? [{ role: 'system', content: instructions }] : [];
  let turn: Turn | null = null;
  let callIds: string[] = []; // [num_calls] that wait for their outputs
  let outputs = new Map<string, string>();
  const openTurn = (): Turn => (turn ??= { reasoning: [], parts: [], calls: [] });
  const endTurn = (): void => {
    if (turn === null) return;
    chat.push(assistantMessage(turn));
    callIds = turn.calls.map(({ id }) => id);
    turn = null;
  };
  const endOutputs = (): void => {
    chat.push(...callIds.map((id) => toolMessage(id, outputs)));
    callIds = [];
    outputs = new Map();
  };
  for (const item of items) {
    if (item.type === 'function_call_output') {
      endTurn();
      if (!callIds.includes(item.call_id) || outputs.has(item.call_id)) {
        const why = outputs.has(item.call_id) ? 'has an output already' : 'is no call of the turn before';
        throw new ApiError('invalid_value', `The call '${item.call_id}' ${why}; check call_id.`, 'input');
      }
      outputs.set(item.call_id, item.output);
      continue;
    }
    if (turn === null) endOutputs();
    if (item.type === 'reasoning') {
      // Reasoning goes before what it has led to.
      if (openTurn().parts.length + openTurn().calls.length > 0) {
        endTurn();
        endOutputs();
      }
      openTurn().reasoning.push(...item.content.map(({ text }) => text));
    } else if (item.type === 'function_call') {
      const { call_id: id, name, arguments: args } = item;
      openTurn().calls.push({ id, type: 'function', function: { name, arguments: args } });
    } else if (item.role === 'assistant') {
      if (openTurn().calls.length > 0) {
        endTurn();
        endOutputs();
      }
      openTurn().parts.push(...item.content.map(({ text }) => text));
    } else {
      endTurn();
      endOutputs();
      chat.push({ role: item.role, content: item.content.map(({ text }) => ({ type: 'text', text })) });
    }
  }
  endTurn();
  endOutputs();
  return chat;
}

function assistantMessage({ reasoning, parts, calls }: Turn): Schemas['AssistantMessage'] {
  return {
    role: 'assistant',
    content: parts.length > 0 ? parts.join('\n') : calls.length > 0 ? null : '',
    ...(reasoning.length > 0 ? { reasoning_content: reasoning.join('\n') } : {}),
    ...(calls.length > 0 ? { tool_calls: calls } : {}),
  };
}

/** Outputs come in the order of their calls, because most templates show them without an id. */
function toolMessage(id: string, outputs: ReadonlyMap<string, string>): ToolMessage {
  const content = outputs.get(id);
  if (content !== undefined) return { role: 'tool', tool_call_id: id, content };
  const message = `The call '${id}' has no output behind it; send a function_call_output for every call.`;
  throw new ApiError('invalid_value', message, 'input');
}
