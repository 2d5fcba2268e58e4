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

/** RODIN_ALL_CUTS=1 tries all pairs of cuts, which takes minutes; else near ones, and some of those further apart. */
const hasAllCuts = process.env['RODIN_ALL_CUTS'] === '1';
const NEAR = 3;
const SPARSE = 101;

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

/** Parts with the text cut at byte positions, as tokens; `perEvent` of them come together. */
function play({ format, startPhase, parts, stops }: Transcript, cuts: readonly number[], perEvent: number): Result {
  const tokenizer = new AnyTokenizer();
  const { phase, tools } = markersOf(format);
  const tracker = new PhaseTracker(phase, startPhase);
  const tokens: EmittedToken[] = [];
  let at = 0;
  const add = (id: number): void => {
    tokens.push({ id, phase: tracker.label(id, id === M.eos) });
  };
  for (const part of parts) {
    if (typeof part === 'number') {
      add(part);
      continue;
    }
    const bytes = new TextEncoder().encode(part);
    let from = 0;
    for (const cut of cuts) {
      if (cut <= at + from || cut >= at + bytes.length) continue;
      add(tokenizer.idOf(bytes.slice(from, cut - at)));
      from = cut - at;
    }
    add(tokenizer.idOf(bytes.slice(from)));
    at += bytes.length;
  }
  const own = tokenizer as unknown as Tokenizer;
  const prompts = {
    tokenizer: own,
    parser: (texts: readonly string[]) =>
      format === 'r1-zero' ? new TagParser(own, texts) : new OutputParser(own, tools, texts),
  } as unknown as PromptEncoder;
  const job = { stops, reasoningView: 'separate', streamsReasoning: true } as unknown as ChatJob;
  const output = new ChatOutput(job, prompts);
  const pieces: Piece[] = [];
  for (let i = 0; i < tokens.length && output.finishReason === null; i += perEvent) {
    const isLast = i + perEvent >= tokens.length;
    const event = { requestId: '', tokens: tokens.slice(i, i + perEvent), cachedTokens: 0 };
    output.accept(isLast ? { ...event, finishReason: 'stop' } : event);
    pieces.push(...output.take());
  }
  const result: Result = { reasoning: '', content: '', calls: [], finish: output.finishReason };
  for (const { kind, text, toolCall } of pieces) {
    if (kind === 'reasoning') result.reasoning += text;
    if (kind === 'content') result.content += text;
    if (!toolCall) continue;
    if (toolCall.name !== undefined) result.calls[toolCall.index] = [toolCall.name, ''];
    result.calls[toolCall.index]![1] += toolCall.arguments;
  }
  return result;
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
    const whole = play(transcript, [], Infinity);
    assert.deepEqual(whole, transcript.expected, shown);
    const length = transcript.parts.reduce<number>(
      (sum, part) => sum + (typeof part === 'string' ? Buffer.byteLength(part) : 0),
      0,
    );
    for (let i = 0; i <= length; i++) {
      for (let j = i; j <= length; j++) {
        if (!hasAllCuts && j - i > NEAR && (i + j) % SPARSE !== 0) continue;
        const result = play(transcript, [i, j], 1 + ((i + j + index) % 3));
        numRuns++;
        if (JSON.stringify(result) === JSON.stringify(whole)) continue;
        assert.deepEqual(result, whole, `cut at ${i}, ${j}: ${shown}`);
      }
    }
  }
  t.diagnostic(`${all.length} transcripts, ${numRuns} runs`);
});
