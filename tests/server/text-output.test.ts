import assert from 'node:assert/strict';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { Detokenizer } from '../../server/text/detokenizer.js';
import { OutputParser, type LabelledToken, type OutputDelta } from '../../server/text/output-parser.js';
import { StopMatcher } from '../../server/text/stop-matcher.js';
import { Tokenizer } from '../../server/text/tokenizer.js';

const tokenizer = Tokenizer.read(fileURLToPath(new URL('../../models/pocket-r1', import.meta.url)));
const MARKERS = { callBegin: 9, callEnd: 10, separator: 11 };
const byteIds = new Map<number, number>();
for (let id = 14; id < tokenizer.vocabSize; id++) {
  const bytes = tokenizer.bytesOf(id);
  if (bytes.length === 1) byteIds.set(bytes[0]!, id);
}

function pieces(text: string, cuts: readonly number[]): string[] {
  const at = [0, ...[...cuts].sort((a, b) => a - b), text.length];
  return at.slice(1).map((end, i) => text.slice(at[i], end));
}

function pushAll(matcher: StopMatcher, parts: readonly string[]): string {
  return parts.map((part) => matcher.push(part)).join('') + matcher.end();
}

test('a token stream of single bytes gives whole characters, whatever the bytes', () => {
  assert.equal(byteIds.size, 256);
  const edges = [0x41, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf4, 0xf5];
  const anyBytes = fc.oneof(
    fc.uint8Array({ maxLength: 40 }),
    fc.array(fc.constantFrom(...edges), { maxLength: 12 }).map((bytes) => Uint8Array.from(bytes)),
  );
  fc.assert(
    fc.property(anyBytes, (bytes) => {
      const detokenizer = new Detokenizer(tokenizer);
      const parts = [...bytes].map((byte) => detokenizer.push(byteIds.get(byte)!));
      const text = parts.join('') + detokenizer.end();
      assert.equal(text, new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes));
    }),
    { numRuns: 5000 },
  );
  const text = 'aé€😀';
  const detokenizer = new Detokenizer(tokenizer);
  const parts = [...new TextEncoder().encode(text)].map((byte) => detokenizer.push(byteIds.get(byte)!));
  assert.deepEqual(parts, ['a', '', 'é', '', '', '€', '', '', '', '😀']);
});

test('stop strings are found at every split, and never leak', () => {
  const text = 'one two END three';
  for (let i = 0; i <= text.length; i++) {
    for (let j = i; j <= text.length; j++) {
      const matcher = new StopMatcher(['END', 'never', 'o END']);
      assert.equal(pushAll(matcher, pieces(text, [i, j])), 'one tw', `${i} ${j}`);
      assert.equal(matcher.matched, 'o END');
    }
  }
});

test('any split of any text gives what the whole text gives', () => {
  const letters = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), maxLength: 24 });
  const stop = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength: 4 });
  fc.assert(
    fc.property(letters, fc.array(stop, { minLength: 1, maxLength: 3 }), fc.array(fc.nat(24)), (text, stops, cuts) => {
      const whole = new StopMatcher(stops);
      const split = new StopMatcher(stops);
      const inside = cuts.filter((cut) => cut <= text.length);
      assert.equal(pushAll(split, pieces(text, inside)), pushAll(whole, [text]));
      assert.equal(split.matched, whole.matched);
      if (whole.matched === null) assert.ok(!stops.some((s) => text.includes(s)));
      else assert.ok(text.includes(whole.matched));
    }),
    { numRuns: 3000 },
  );
});

test('no more is held back than could become a stop string', () => {
  const matcher = new StopMatcher(['\n\nUser']);
  assert.equal(matcher.push('hello\n'), 'hello');
  assert.equal(matcher.push('world'), '\nworld');
  assert.equal(matcher.push('\n\nUs'), '');
  assert.equal(matcher.push('age'), '\n\nUsage');
});

function label(text: string, phase: LabelledToken['phase']): LabelledToken[] {
  return tokenizer.encodeText(text).map((id) => ({ id, phase }));
}

const control = (id: number): LabelledToken => ({ id, phase: 'control' });
const tool = (id: number): LabelledToken => ({ id, phase: 'tool' });

function parse(
  tokens: readonly LabelledToken[],
  stops: string[] = [],
): { deltas: OutputDelta[]; parser: OutputParser } {
  const parser = new OutputParser(tokenizer, MARKERS, stops);
  const deltas: OutputDelta[] = [];
  for (const token of tokens) {
    deltas.push(...parser.push(token));
    if (parser.matchedStop !== null) break;
  }
  deltas.push(...parser.end());
  return { deltas, parser };
}

function join(deltas: readonly OutputDelta[]): { reasoning: string; content: string; calls: string[][] } {
  const calls: string[][] = [];
  let reasoning = '';
  let content = '';
  for (const delta of deltas) {
    if (delta.kind === 'reasoning') reasoning += delta.text;
    else if (delta.kind === 'content') content += delta.text;
    else if (delta.kind === 'tool_call') {
      if (delta.name !== undefined) calls[delta.index] = [delta.name, ''];
      calls[delta.index]![1] += delta.arguments;
    }
  }
  return { reasoning, content, calls };
}

test('phases become kinds; stop strings look at the answer alone', () => {
  const tokens = [...label('so END it is', 'reasoning'), control(6), ...label('it is END of it', 'answer')];
  const { deltas, parser } = parse(tokens, ['END']);
  assert.deepEqual(join(deltas), { reasoning: 'so END it is', content: 'it is ', calls: [] });
  assert.equal(parser.matchedStop, 'END');
});

test('reasoning of whitespace is none, and does not delay other whitespace', () => {
  assert.deepEqual(join(parse([...label('\n\n', 'reasoning'), control(6), ...label('\n\nhi', 'answer')]).deltas), {
    reasoning: '',
    content: '\n\nhi',
    calls: [],
  });
  assert.equal(join(parse(label('\n\nso \n', 'reasoning')).deltas).reasoning, '\n\nso \n');
});

test('an unfinished character ends with its phase', () => {
  const half = { id: byteIds.get(0xe2)!, phase: 'reasoning' } as const;
  const { deltas } = parse([...label('x', 'reasoning'), half, control(6), ...label('y', 'answer')]);
  assert.deepEqual(join(deltas), { reasoning: 'x\ufffd', content: 'y', calls: [] });
});

test('control tokens that were sampled out of place have no text', () => {
  assert.equal(
    join(parse([...label('a', 'answer'), { id: 3, phase: 'answer' }, ...label('b', 'answer')]).deltas).content,
    'ab',
  );
});

test('tool calls of V3.1: names and arguments, text that looks like marks, several calls', () => {
  const { callBegin, callEnd, separator } = MARKERS;
  const tokens = [
    ...label('I ask. ', 'answer'),
    control(7),
    ...[callBegin].map(tool),
    ...label('get_weather', 'tool'),
    tool(separator),
    ...label('{"city": "<｜tool▁call▁end｜> é"}', 'tool'),
    tool(callEnd),
    tool(callBegin),
    ...label('search', 'tool'),
    tool(separator),
    tool(callEnd),
    control(8),
  ];
  const { deltas, parser } = parse(tokens, ['city']);
  assert.deepEqual(join(deltas), {
    reasoning: '',
    content: 'I ask. ',
    calls: [
      ['get_weather', '{"city": "<｜tool▁call▁end｜> é"}'],
      ['search', ''],
    ],
  });
  assert.equal(parser.numToolCalls, 2);
});

test('tool calls of V3 and R1 come in a fence', () => {
  const { callBegin, callEnd, separator } = MARKERS;
  const call = [tool(callBegin), ...label('function', 'tool'), tool(separator)];
  const good = [...call, ...label('search\n```json\n{"q": 1}\n```', 'tool'), tool(callEnd)];
  assert.deepEqual(join(parse([control(7), ...good, ...label('\n', 'tool'), ...good, control(8)]).deltas).calls, [
    ['search', '{"q": 1}'],
    ['search', '{"q": 1}'],
  ]);
  const bad = [...call, ...label('no fence', 'tool'), tool(callEnd)];
  assert.deepEqual(join(parse([control(7), ...bad]).deltas), { reasoning: '', content: 'no fence', calls: [] });
});

test('a call cut short keeps what there is', () => {
  const { callBegin, separator } = MARKERS;
  const begun = [control(7), tool(callBegin), ...label('sea', 'tool')];
  assert.deepEqual(join(parse(begun).deltas), { reasoning: '', content: 'sea', calls: [] });
  assert.deepEqual(join(parse([...begun, tool(separator), ...label('{"q', 'tool')]).deltas).calls, [['sea', '{"q']]);
});
