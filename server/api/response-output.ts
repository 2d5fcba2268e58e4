import type { Piece } from './chat-output.js';
import type { TokenLogprob } from './logprobs.js';
import type { components } from './openapi.js';
import { encodeReasoning, newId, type OutputItem } from './response-items.js';

type Schemas = components['schemas'];
/** An event without its place in the stream. */
export type ResponseEvent = Omit<Schemas['ResponsesEvent'], 'sequence_number'>;

type Text = Schemas['ResponseText'];

/** Pieces of an output -> items and the events of their making: one after the other, each begun and ended once. */
export class ResponseOutput {
  readonly items: OutputItem[] = []; // [num_items] the last one may be open
  readonly #encodesReasoning: boolean;
  #kind: Piece['kind'] = null;
  /** which call of the answer the open item is */
  #callIndex = -1;

  constructor({ encodesReasoning }: { encodesReasoning: boolean }) {
    this.#encodesReasoning = encodesReasoning;
  }

  push({ kind, text, toolCall, logprobs }: Piece): ResponseEvent[] {
    switch (kind) {
      case null:
        return [];
      case 'reasoning': {
        if (text === '') return [];
        const begun = this.#enter(kind);
        const { content } = this.#item('reasoning');
        content[0]!.text += text;
        return [...begun, { type: 'response.reasoning_text.delta', ...this.#place, content_index: 0, delta: text }];
      }
      case 'content': {
        if (text === '' && logprobs.length === 0) return [];
        const begun = this.#enter(kind);
        const part = this.#item('message').content[0]!;
        part.text += text;
        part.logprobs.push(...logprobs);
        return [
          ...begun,
          { type: 'response.output_text.delta', ...this.#place, content_index: 0, delta: text, logprobs },
        ];
      }
      case 'tool_call': {
        const { index, id, name, arguments: args } = toolCall!;
        const begun = this.#enter(kind, index, { id, name });
        this.#item('function_call').arguments += args;
        if (args === '') return begun;
        return [...begun, { type: 'response.function_call_arguments.delta', ...this.#place, delta: args }];
      }
    }
  }

  /** The output is over; an open item that the token limit has cut is incomplete. */
  end(isCut: boolean): ResponseEvent[] {
    const item = this.items.at(-1);
    if (this.#kind === null || item === undefined) return [];
    this.#kind = null;
    item.status = isCut ? 'incomplete' : 'completed';
    return [...this.#endPart(item), { type: 'response.output_item.done', output_index: this.#at, item: copyOf(item) }];
  }

  get #at(): number {
    return this.items.length - 1;
  }

  get #place(): { item_id: string; output_index: number } {
    return { item_id: this.items[this.#at]!.id, output_index: this.#at };
  }

  #item<Type extends OutputItem['type']>(type: Type): Extract<OutputItem, { type: Type }> {
    const item = this.items.at(-1)!;
    if (item.type !== type) throw new Error(`the open item is ${item.type}, not ${type}`);
    return item as Extract<OutputItem, { type: Type }>;
  }

  #enter(
    kind: 'reasoning' | 'content' | 'tool_call',
    callIndex = -1,
    call: { id?: string | undefined; name?: string | undefined } = {},
  ): ResponseEvent[] {
    if (kind === this.#kind && callIndex === this.#callIndex) return [];
    const ended = this.end(false);
    this.#kind = kind;
    this.#callIndex = callIndex;
    const item = emptyItem(kind, call);
    this.items.push(item);
    const added: ResponseEvent = { type: 'response.output_item.added', output_index: this.#at, item: copyOf(item) };
    const part = partOf(kind);
    if (item.type === 'function_call' || part === null) return [...ended, added];
    (item.content as (typeof part)[]).push(part);
    const begun = { ...part, ...('logprobs' in part ? { logprobs: [] } : {}) };
    return [...ended, added, { type: 'response.content_part.added', ...this.#place, content_index: 0, part: begun }];
  }

  #endPart(item: OutputItem): ResponseEvent[] {
    const place = this.#place;
    switch (item.type) {
      case 'function_call':
        return [
          { type: 'response.function_call_arguments.done', ...place, name: item.name, arguments: item.arguments },
        ];
      case 'reasoning': {
        const part = { ...item.content[0]! };
        if (this.#encodesReasoning) item.encrypted_content = encodeReasoning(part.text);
        return [
          { type: 'response.reasoning_text.done', ...place, content_index: 0, text: part.text },
          { type: 'response.content_part.done', ...place, content_index: 0, part },
        ];
      }
      case 'message': {
        const part = copyOfText(item.content[0]!);
        const { text, logprobs } = part;
        return [
          { type: 'response.output_text.done', ...place, content_index: 0, text, logprobs },
          { type: 'response.content_part.done', ...place, content_index: 0, part },
        ];
      }
    }
  }
}

function emptyItem(
  kind: 'reasoning' | 'content' | 'tool_call',
  { id, name }: { id?: string | undefined; name?: string | undefined },
): OutputItem {
  const status = 'in_progress';
  switch (kind) {
    case 'reasoning':
      return { type: 'reasoning', id: newId('rs'), summary: [], content: [], status };
    case 'content':
      return { type: 'message', id: newId('msg'), role: 'assistant', status, content: [] };
    case 'tool_call':
      return { type: 'function_call', id: newId('fc'), call_id: id!, name: name!, arguments: '', status };
  }
}

function partOf(kind: 'reasoning' | 'content' | 'tool_call'): Schemas['ResponseReasoningText'] | Text | null {
  if (kind === 'reasoning') return { type: 'reasoning_text', text: '' };
  return kind === 'content' ? { type: 'output_text', text: '', annotations: [], logprobs: [] as TokenLogprob[] } : null;
}

function copyOfText(part: Text): Text {
  return { ...part, logprobs: [...part.logprobs] };
}

/** As it is now: items grow after events have been made of them. */
export function copyOf(item: OutputItem): OutputItem {
  switch (item.type) {
    case 'function_call':
      return { ...item };
    case 'reasoning':
      return { ...item, content: item.content.map((part) => ({ ...part })) };
    case 'message':
      return { ...item, content: item.content.map(copyOfText) };
  }
}
