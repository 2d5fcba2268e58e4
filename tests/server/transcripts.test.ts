import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ChatOutput, type Piece } from '../../server/api/chat-output.js';
import type { ChatJob } from '../../server/api/chat-request.js';
import { PhaseTracker } from '../../server/engine/phase-tracker.js';
import type { EmittedToken, PhaseMarkers } from '../../server/engine/request.js';
import { OutputParser } from '../../server/text/output-parser.js';
import type { PromptEncoder } from '../../server/text/prompt-encoder.js';
import { TagParser } from '../../server/text/tag-parser.js';
import type { ToolMarkers } from '../../server/text/tool-call-parser.js';
import type { Tokenizer } from '../../server/text/tokenizer.js';

/** Ids of marks; texts get ids from FIRST_TEXT on, whatever their bytes. */
const M = { eos: 1, think: 5, thinkEnd: 6, calls: 7, callsEnd: 8, call: 9, callEnd: 10, sep: 11, dsml: 12 } as const;
const FIRST_TEXT = 100;

/** A vocabulary in which any bytes are one token: texts can be cut anywhere, inside characters too. */
class AnyTokenizer {
  readonly #bytes: Uint8Array[] = [];

  idOf(bytes: Uint8Array): number {
    return FIRST_TEXT + this.#bytes.push(bytes) - 1;
  }

  /** Gives the ids from this one on away again. */
  forget(id: number): void {
    this.#bytes.length = id - FIRST_TEXT;
  }

  bytesOf(id: number): Uint8Array {
    return this.#bytes[id - FIRST_TEXT]!;
  }

  isSpecial(id: number): boolean {
    return id < FIRST_TEXT;
  }

  addedId(): number {
    return -1;
  }
}

type Part = string | number;
type Format = 'v3.1' | 'v3' | 'kimi-k2' | 'v3.2' | 'r1-zero';

interface Call {
  name: string;
  args: string;
}

interface Transcript {
  format: Format;
  startPhase: 'reasoning' | 'answer';
  parts: Part[];
  stops: string[];
  expected: { reasoning: string; content: string; calls: [string, string][]; finish: string };
}

interface Result {
  reasoning: string;
  content: string;
  calls: [string, string][];
  finish: string | null;
}

const NO_TOOLS: ToolMarkers = { callBegin: -1, callEnd: -1, separator: -1 };

function markersOf(format: Format): { phase: PhaseMarkers; tools: ToolMarkers } {
  if (format === 'r1-zero') {
    return { phase: { thinkStart: -1, thinkEnd: -1, toolCallsBegin: -1, toolCallsEnd: -1 }, tools: NO_TOOLS };
  }
  const think = { thinkStart: M.think, thinkEnd: M.thinkEnd };
  if (format === 'v3.2') {
    return { phase: { ...think, toolCallsBegin: M.dsml, toolCallsEnd: -1 }, tools: { ...NO_TOOLS, dsml: M.dsml } };
  }
  return {
    phase: { ...think, toolCallsBegin: M.calls, toolCallsEnd: M.callsEnd },
    tools: { callBegin: M.call, callEnd: M.callEnd, separator: M.sep },
  };
}

/** A part as one token; where it is text, with its bytes and where they begin and end in the transcript. */
interface PlacedToken extends EmittedToken {
  bytes: Uint8Array | null;
  begin: number;
  end: number;
}

/** One transcript's tokens, to be played with its texts cut at different places. */
class Player {
  readonly numBytes: number;
  readonly #tokenizer = new AnyTokenizer();
  readonly #tokens: readonly PlacedToken[];
  readonly #firstFree: number;
  readonly #prompts: PromptEncoder;
  readonly #job: ChatJob;

  constructor({ format, startPhase, parts, stops }: Transcript) {
    const { phase, tools } = markersOf(format);
    const tracker = new PhaseTracker(phase, startPhase);
    let at = 0;
    this.#tokens = parts.map((part) => {
      const bytes = typeof part === 'number' ? null : new TextEncoder().encode(part);
      const id = typeof part === 'number' ? part : this.#tokenizer.idOf(bytes!);
      const begin = at;
      at += bytes?.length ?? 0;
      return { id, phase: tracker.label(id, id === M.eos), bytes, begin, end: at };
    });
    this.numBytes = at;
    this.#firstFree = this.#tokenizer.idOf(new Uint8Array(0));
    const tokenizer = this.#tokenizer as unknown as Tokenizer;
    this.#prompts = {
      tokenizer,
      parser: (texts: readonly string[]) =>
        format === 'r1-zero' ? new TagParser(tokenizer, texts) : new OutputParser(tokenizer, tools, texts),
    } as unknown as PromptEncoder;
    const engineRequest = { startPhase, markers: phase };
    this.#job = { stops, reasoningView: 'separate', streamsReasoning: true, engineRequest } as unknown as ChatJob;
  }

  /** What the client gets with the texts cut at `i` and `j`, where `perEvent` tokens come together. */
  play(i: number, j: number, perEvent: number): Result {
    this.#tokenizer.forget(this.#firstFree);
    const tokens: EmittedToken[] = [];
    for (const token of this.#tokens) this.#cut(token, i, j, tokens);
    const output = new ChatOutput(this.#job, this.#prompts);
    const result: Result = { reasoning: '', content: '', calls: [], finish: null };
    for (let at = 0; at < tokens.length && output.finishReason === null; at += perEvent) {
      const isLast = at + perEvent >= tokens.length;
      const event = { requestId: '', tokens: tokens.slice(at, at + perEvent), cachedTokens: 0 };
      output.accept(isLast ? { ...event, finishReason: 'stop' } : event);
      for (const piece of output.take()) addPiece(result, piece);
    }
    result.finish = output.finishReason;
    return result;
  }

  #cut(token: PlacedToken, i: number, j: number, into: EmittedToken[]): void {
    const { bytes, begin, end, phase } = token;
    let from = begin;
    for (const cut of bytes === null || i === j ? [i] : [i, j]) {
      if (bytes === null || cut <= from || cut >= end) continue;
      into.push({ id: this.#tokenizer.idOf(bytes.subarray(from - begin, cut - begin)), phase });
      from = cut;
    }
    if (from === begin) into.push(token);
    else into.push({ id: this.#tokenizer.idOf(bytes!.subarray(from - begin)), phase });
  }
}

function addPiece(result: Result, { kind, text, toolCall }: Piece): void {
  if (kind === 'reasoning') result.reasoning += text;
  if (kind === 'content') result.content += text;
  if (!toolCall) return;
  if (toolCall.name !== undefined) result.calls[toolCall.index] = [toolCall.name, ''];
  result.calls[toolCall.index]![1] += toolCall.arguments;
}

function isSame(one: Result, other: Result): boolean {
  return (
    one.reasoning === other.reasoning &&
    one.content === other.content &&
    one.finish === other.finish &&
    one.calls.length === other.calls.length &&
    one.calls.every(([name, args], at) => other.calls[at]![0] === name && other.calls[at]![1] === args)
  );
}

const REASONING = ['', 'k', 'so é', 'a </answer> b', '苹果 = 2', '\n\nhm <｜', '😀'];
const CONTENT = ['4', 'It is **é**\n', '{"a": "</think>"}', '  <b>`x`</b> ', '👩‍👩‍👧 STO P', 'a STOP b'];
const ARGS = ['{}', '{"q": "苹</think>"}', '{"a": [1, "```"], "b": "\\n"}', '{"t": "<｜tool▁call▁end｜>"}'];

function callParts(format: Format, { name, args }: Call, index: number): Part[] {
  switch (format) {
    case 'v3.1':
      return [M.call, name, M.sep, args, M.callEnd];
    case 'v3':
      return [
        ...(index > 0 ? ['\n'] : []),
        M.call,
        'function',
        M.sep,
        `${name}\n\`\`\`json\n${args}\n\`\`\``,
        M.callEnd,
      ];
    case 'kimi-k2':
      return [M.call, `functions.${name}:${index}`, M.sep, args, M.callEnd];
    case 'v3.2': {
      const parameters = Object.entries(JSON.parse(args) as Record<string, unknown>).flatMap(([key, value]): Part[] => {
        const isString = typeof value === 'string';
        const text = isString ? value : JSON.stringify(value);
        return ['<', M.dsml, `parameter name="${key}" string="${isString}">${text}</`, M.dsml, 'parameter>\n'];
      });
      return ['<', M.dsml, `invoke name="${name}">\n`, ...parameters, '</', M.dsml, 'invoke>\n'];
    }
    case 'r1-zero':
      return [];
  }
}

function callsParts(format: Format, calls: readonly Call[]): Part[] {
  if (calls.length === 0) return [];
  const inner = calls.flatMap((call, index) => callParts(format, call, index));
  return format === 'v3.2'
    ? ['\n\n<', M.dsml, 'function_calls>\n', ...inner, '</', M.dsml, 'function_calls>']
    : [M.calls, ...inner, M.callsEnd];
}

/** Arguments as the client gets them: V3.2 sends parameters, which become JSON again. */
function argsOf(format: Format, args: string): string {
  if (format !== 'v3.2') return args;
  const entries = Object.entries(JSON.parse(args) as object).map(
    ([k, v]) => `${JSON.stringify(k)}: ${JSON.stringify(v)}`,
  );
  return entries.length === 0 ? '{}' : `{${entries.join(', ')}}`;
}

function build(
  format: Format,
  reasoning: string,
  content: string,
  calls: readonly Call[],
  isInside: boolean,
  stops: string[],
): Transcript {
  const at = stops.length > 0 && format !== 'r1-zero' && !isInside ? content.indexOf(stops[0]!) : -1;
  const isStopped = at >= 0;
  const body = callsParts(format, calls);
  const parts: Part[] = isInside ? [reasoning, ...body, M.eos] : [reasoning, M.thinkEnd, content, ...body, M.eos];
  const expectedCalls = isStopped ? [] : calls.map(({ name, args }): [string, string] => [name, argsOf(format, args)]);
  const lead = format === 'v3.2' && calls.length > 0 ? (text: string) => text.trimEnd() : (text: string) => text;
  const shown = isInside ? '' : isStopped ? content.slice(0, at) : lead(content);
  return {
    format,
    startPhase: 'reasoning',
    parts: parts.filter((part) => part !== ''),
    stops,
    expected: {
      reasoning: reasoning.trim() === '' ? '' : isInside ? lead(reasoning) : reasoning,
      content: shown,
      calls: expectedCalls,
      finish: expectedCalls.length > 0 ? 'tool_calls' : 'stop',
    },
  };
}

function buildTagged(reasoning: string, content: string, isLoose: boolean): Transcript {
  const inner = reasoning.replaceAll('</answer>', '');
  const answer = content.replaceAll('</think>', '');
  const text = isLoose
    ? `<think>${inner}</think>${answer}`
    : ` <think> ${inner} </think>\n<answer>\n${answer} </answer>`;
  return {
    format: 'r1-zero',
    startPhase: 'answer',
    parts: [text, M.eos],
    stops: [],
    expected: {
      reasoning: isLoose ? inner.trim() : inner.trim(),
      content: isLoose ? answer : answer.trim(),
      calls: [],
      finish: 'stop',
    },
  };
}

function transcripts(): Transcript[] {
  const all: Transcript[] = [];
  for (const format of ['v3.1', 'v3', 'kimi-k2', 'v3.2'] as const) {
    for (const [r, reasoning] of REASONING.entries()) {
      for (const [c, content] of CONTENT.entries()) {
        all.push(build(format, reasoning, content, [], false, ['STOP']));
        all.push(build(format, reasoning, content, [{ name: 'f', args: ARGS[(r + c) % 4]! }], false, []));
        const two = [
          { name: 'g_1', args: ARGS[c % 4]! },
          { name: 'h', args: ARGS[r % 4]! },
        ];
        if ((r + c) % 2 === 0) all.push(build(format, reasoning, content, two, false, []));
      }
      all.push(build(format, reasoning, '', [{ name: 'f', args: ARGS[r % 4]! }], true, []));
    }
  }
  for (const reasoning of REASONING) {
    for (const content of CONTENT)
      all.push(buildTagged(reasoning, content, false), buildTagged(reasoning, content, true));
  }
  return all;
}

test('stream equals non-stream: every transcript at every one- and two-cut position', (t) => {
  const all = transcripts();
  assert.ok(all.length >= 500, `${all.length} transcripts`);
  let numRuns = 0;
  for (const [index, transcript] of all.entries()) {
    const shown = JSON.stringify(transcript.parts);
    const player = new Player(transcript);
    const whole = player.play(0, 0, Infinity);
    assert.deepEqual(whole, transcript.expected, shown);
    for (let i = 0; i <= player.numBytes; i++) {
      for (let j = i; j <= player.numBytes; j++) {
        const result = player.play(i, j, 1 + ((i + j + index) % 3));
        numRuns++;
        if (!isSame(result, whole)) assert.deepEqual(result, whole, `cut at ${i}, ${j}: ${shown}`);
      }
    }
  }
  t.diagnostic(`${all.length} transcripts, ${numRuns} runs`);
});
