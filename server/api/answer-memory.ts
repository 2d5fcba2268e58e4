import { createHash } from 'node:crypto';
import { LRUCache } from 'lru-cache';
import { PhaseTracker } from '../engine/phase-tracker.js';
import type { EngineRequest } from '../engine/request.js';
import type { TemplateMessage } from '../text/chat-template.js';
import { asJson } from '../text/final-answer.js';
import type { PromptEncoder } from '../text/prompt-encoder.js';
import type { SampledText } from '../text/sampled-text.js';

/** of all texts that are kept */
const MAX_TOTAL_TOKENS = 2 * 2 ** 20;

interface Run {
  text: string;
  ids: readonly number[]; // [num_tokens]
}

/** An assistant's turn as it was sampled. A text that came in pieces is not there. */
interface Turn {
  content: Run | null;
  reasoning: Run | null;
  /** names and arguments by turns */
  calls: readonly Run[]; // [2 * num_calls]
}

/**
 * What answers were sampled as. A conversation that comes back as text gets the same tokens again, which another
 * tokenization of the text would miss, and with them the prefix cache; and calls of tools get back the reasoning
 * before them where the client has dropped it.
 */
export class AnswerMemory {
  readonly #turns = new LRUCache<string, Turn>({
    maxSize: MAX_TOTAL_TOKENS,
    sizeCalculation: ({ content, reasoning, calls }) =>
      [content, reasoning, ...calls].reduce((sum, run) => sum + (run?.ids.length ?? 0), 64),
  });

  /** An answer to the conversation `key` has ended; `callIds` are the names of its calls. */
  add(
    key: string,
    request: EngineRequest,
    tokenIds: readonly number[],
    callIds: readonly string[],
    prompts: PromptEncoder,
  ): void {
    const turn = turnOf(request, tokenIds, prompts);
    const [callId] = callIds;
    if (callId !== undefined) this.#turns.set(callKey(key, callId), turn);
    else if (turn.content !== null) this.#turns.set(textKey(key, turn.content.text), turn);
  }

  /**
   * The messages of a conversation with what the client has dropped, the texts in them that are known as tokens, and
   * the key of its next answer. Messages with another salt are others.
   */
  recall(
    given: readonly TemplateMessage[],
    salt: string,
  ): { messages: TemplateMessage[]; sampled: SampledText[]; key: string } {
    const messages: TemplateMessage[] = [];
    const sampled: SampledText[] = [];
    let key = keyOf(salt, '');
    for (const [index, message] of given.entries()) {
      const turn = message.role === 'assistant' ? this.#find(message, key) : undefined;
      messages.push(turn ? restored(message, turn, index, sampled) : message);
      const calls = message.tool_calls?.map(({ function: { name, arguments: args } }) => [name, args]) ?? [];
      key = keyOf(salt, JSON.stringify([key, message.role, message.content ?? '', calls]));
    }
    return { messages, sampled, key };
  }

  #find({ content, tool_calls: calls }: TemplateMessage, key: string): Turn | undefined {
    const callId = calls?.[0]?.id;
    return this.#turns.get(callId === undefined ? textKey(key, content ?? '') : callKey(key, callId));
  }
}

/** Adds to `sampled` the texts of a message that are those of the turn. */
function restored(message: TemplateMessage, turn: Turn, index: number, sampled: SampledText[]): TemplateMessage {
  const { content, reasoning, calls } = turn;
  const add = (field: SampledText['field'], run: Run, call = 0): void => {
    if (run.ids.length > 0) sampled.push({ message: index, field, call, ids: run.ids });
  };
  if (content !== null && content.text === message.content && !content.text.includes('</think>'))
    add('content', content);
  const hasReasoning = message.reasoning_content === undefined || message.reasoning_content === reasoning?.text;
  if (reasoning !== null && hasReasoning) add('reasoning_content', reasoning);
  const toolCalls = message.tool_calls?.map((one, at) => {
    const [name, args] = [calls[2 * at], calls[2 * at + 1]];
    const given = one.function.arguments;
    if (!name || !args || name.text !== one.function.name || typeof given !== 'string') return one;
    // Clients write JSON anew: the same value in other spacing is what the model has written.
    const isSame = given === args.text || (asJson(given) !== null && asJson(given) === asJson(args.text));
    if (!isSame) return one;
    add('name', name, at);
    add('arguments', args, at);
    return { ...one, function: { name: name.text, arguments: args.text } };
  });
  return {
    ...message,
    ...(reasoning !== null && hasReasoning ? { reasoning_content: reasoning.text } : {}),
    ...(toolCalls ? { tool_calls: toolCalls } : {}),
  };
}

/** The texts between control tokens, by what they are part of. */
export function turnOf(
  { markers, startPhase, sampling }: EngineRequest,
  tokenIds: readonly number[],
  prompts: PromptEncoder,
): Turn {
  const phases = new PhaseTracker(markers, startPhase);
  const stopIds = new Set(sampling.stopTokenIds);
  const { tokenizer } = prompts;
  const runs = { reasoning: [] as number[][], answer: [] as number[][], tool: [] as number[][] };
  let last: 'reasoning' | 'answer' | 'tool' | null = null;
  for (const id of tokenIds) {
    const before = phases.phase;
    const label = phases.label(id, stopIds.has(id));
    // A control token that changes nothing is part of what it stands in; in calls it marks their parts.
    const isIdle = label === 'control' && phases.phase === before && !stopIds.has(id);
    const phase = isIdle ? before : label;
    const isText = phase !== 'control' && !(phase === 'tool' && tokenizer.isSpecial(id));
    if (isText && phase === last) runs[phase].at(-1)!.push(id);
    else if (isText) runs[phase].push([id]);
    last = isText ? phase : null;
  }
  const textOf = (ids: readonly number[]): string => prompts.textOf(ids.filter((id) => !tokenizer.isSpecial(id)));
  const runOf = (ids: readonly number[]): Run => ({ text: textOf(ids), ids });
  const only = (list: readonly number[][]): Run | null => (list.length === 1 ? runOf(list[0]!) : null);
  // A call that is written as one text, or with an empty part, is left as the client has it.
  const calls = runs.tool.length % 2 === 0 ? runs.tool.map(runOf) : [];
  // Templates show reasoning again behind calls alone.
  return { content: only(runs.answer), reasoning: calls.length > 0 ? only(runs.reasoning) : null, calls };
}

function keyOf(salt: string, text: string): string {
  return `${createHash('sha256').update(text).digest('base64')} ${salt}`;
}

function saltOf(key: string): string {
  return key.slice(key.indexOf(' ') + 1);
}

/** Another API names calls otherwise: what comes behind is the same. Names that models give are the same everywhere. */
function callKey(key: string, callId: string): string {
  const drawn = /^(?:call|toolu)_([0-9a-f]{24})$/.exec(callId)?.[1];
  return drawn === undefined ? `named ${callId} ${key}` : `call ${drawn} ${saltOf(key)}`;
}

function textKey(key: string, text: string): string {
  return `text ${createHash('sha256').update(text).digest('base64')} ${key}`;
}
