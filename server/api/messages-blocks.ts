import type { Piece } from './chat-output.js';
import type { components } from './openapi.js';

type Schemas = components['schemas'];
export type OutputBlock = Schemas['MessagesOutputBlock'];
export type BlockEvent =
  Schemas['ContentBlockStartEvent'] | Schemas['ContentBlockDeltaEvent'] | Schemas['ContentBlockStopEvent'];

/** Pieces of an output -> content blocks as events: one start, deltas, one stop each, one block after the other. */
export class ContentBlocks {
  readonly #omitsThinking: boolean;
  #index = -1;
  /** the open block: its kind, and which call of the answer it is */
  #kind: Piece['kind'] = null;
  #callIndex = -1;

  constructor({ omitsThinking }: { omitsThinking: boolean }) {
    this.#omitsThinking = omitsThinking;
  }

  push({ kind, text, toolCall }: Piece): BlockEvent[] {
    switch (kind) {
      case null:
        return [];
      case 'reasoning': {
        const started = text === '' ? [] : this.#enter(kind, { type: 'thinking', thinking: '', signature: '' });
        const isShown = text !== '' && !this.#omitsThinking;
        return isShown ? [...started, this.#delta({ type: 'thinking_delta', thinking: text })] : started;
      }
      case 'content': {
        if (text === '') return [];
        return [...this.#enter(kind, { type: 'text', text: '' }), this.#delta({ type: 'text_delta', text })];
      }
      case 'tool_call': {
        const { index, id, name, arguments: args } = toolCall!;
        const started =
          name === undefined ? [] : this.#enter(kind, { type: 'tool_use', id: toolUseId(id!), name, input: {} }, index);
        return args === '' ? started : [...started, this.#delta({ type: 'input_json_delta', partial_json: args })];
      }
    }
  }

  /** the output is over */
  end(): BlockEvent[] {
    const kind = this.#kind;
    if (kind === null) return [];
    this.#kind = null;
    const stop: BlockEvent = { type: 'content_block_stop', index: this.#index };
    return kind === 'reasoning' ? [this.#delta({ type: 'signature_delta', signature: '' }), stop] : [stop];
  }

  #enter(kind: Piece['kind'], block: OutputBlock, callIndex = -1): BlockEvent[] {
    if (kind === this.#kind && callIndex === this.#callIndex) return [];
    const events = this.end();
    this.#kind = kind;
    this.#callIndex = callIndex;
    this.#index += 1;
    return [...events, { type: 'content_block_start', index: this.#index, content_block: block }];
  }

  #delta(delta: Schemas['ContentBlockDelta']): BlockEvent {
    return { type: 'content_block_delta', index: this.#index, delta };
  }
}

/** What a client has when it has taken in all events: so a whole message is what its stream would be. */
export function joinBlocks(events: readonly BlockEvent[]): OutputBlock[] {
  const blocks: OutputBlock[] = [];
  let args = '';
  for (const event of events) {
    if (event.type === 'content_block_start') {
      blocks.push({ ...event.content_block });
      args = '';
      continue;
    }
    const block = blocks[event.index]!;
    if (event.type === 'content_block_stop') {
      if (block.type === 'tool_use') block.input = toInput(args);
      continue;
    }
    const { delta } = event;
    if (delta.type === 'thinking_delta' && block.type === 'thinking') block.thinking += delta.thinking;
    if (delta.type === 'text_delta' && block.type === 'text') block.text += delta.text;
    if (delta.type === 'input_json_delta') args += delta.partial_json;
  }
  return blocks;
}

/** What the model wrote need not be JSON, nor be whole. */
function toInput(args: string): Record<string, unknown> {
  if (args.trim() === '') return {};
  try {
    const input: unknown = JSON.parse(args);
    if (typeof input === 'object' && input !== null && !Array.isArray(input)) return input as Record<string, unknown>;
  } catch {
    // shown below as it is
  }
  return { INVALID_JSON: args };
}

function toolUseId(id: string): string {
  return id.replace(/^call_/, 'toolu_');
}
