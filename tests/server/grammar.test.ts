import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { Ajv2020 } from 'ajv/dist/2020.js';
import formatsPlugin from 'ajv-formats';
import { parseEbnf } from '../../server/grammar/ebnf.js';
import { choice, GrammarBuilder, type Grammar } from '../../server/grammar/grammar.js';
import { CompiledGrammar, Matcher, type MatcherMask } from '../../server/grammar/matcher.js';
import { wholeRegex } from '../../server/grammar/regex.js';
import { SchemaCompiler } from '../../server/grammar/schema-check.js';
import { SchemaError } from '../../server/grammar/schema-error.js';
import { GrammarThread } from '../../server/grammar/thread.js';
import { readTokenTable, TokenTree } from '../../server/grammar/vocabulary.js';
import { POCKET_R1 } from '../helpers/checkpoint-copy.js';
import { randomBelow, randomSchema, sampleText } from '../helpers/schema-samples.js';

const compiler = new SchemaCompiler();
const STOP = 1;

function readTree(): TokenTree {
  const file = JSON.parse(readFileSync(join(POCKET_R1, 'tokenizer.json'), 'utf8')) as Parameters<
    typeof readTokenTable
  >[0];
  return new TokenTree(readTokenTable(file, 1024));
}

const ajv = new Ajv2020({ strict: false });
(formatsPlugin as unknown as (ajv: Ajv2020) => void)(ajv);

function regexGrammar(pattern: string): Grammar {
  return new GrammarBuilder().build(choice(wholeRegex(pattern)));
}

/** Whether a grammar takes a text, byte token by byte token. */
function takes(grammar: Grammar, text: string): boolean {
  const bytes = Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte));
  const compiled = new CompiledGrammar(grammar, new TokenTree({ bytes, controls: new Set() }));
  return compiled.read([...Buffer.from(text)])?.accepts === true;
}

test('whatever a schema grammar matches is valid for Ajv', () => {
  let numChecked = 0;
  for (let seed = 0; seed < 240; seed++) {
    const next = randomBelow(seed);
    const schema = randomSchema(next, seed % 6);
    const validate = ajv.compile(schema);
    let grammar: Grammar;
    try {
      grammar = compiler.compile(schema);
    } catch (error) {
      assert.ok(error instanceof SchemaError);
      continue;
    }
    for (let round = 0; round < 10; round++) {
      const text = sampleText(grammar, next);
      if (text === null) continue;
      numChecked++;
      assert.ok(validate(JSON.parse(text)), `${JSON.stringify(schema)}\n${text}\n${JSON.stringify(validate.errors)}`);
    }
  }
  assert.ok(numChecked > 2000, `${numChecked}`);
});

test('keywords that need care: what fits and what does not', () => {
  const cases: [object, unknown[], string[]][] = [
    [{ type: 'integer', exclusiveMinimum: 3, maximum: 12 }, [4, 10, 12], ['3', '13', '04', '4.0']],
    [{ type: 'number', minimum: -0.5, exclusiveMaximum: 1 }, [-0.5, 0, 0.99], ['1', '-0.51', '1.00']],
    [{ type: 'integer', multipleOf: 7 }, [0, 7, -14, 343], ['8', '10']],
    [{ type: 'integer', multipleOf: 30, minimum: 1, maximum: 100 }, [30, 90], ['0', '120', '31']],
    [{ type: 'string', minLength: 2, maxLength: 3 }, ['ab', '😀é"'], ['"a"', '"abcd"', '"\\ud83d"']],
    [{ type: 'string', pattern: 'a"?b$' }, ['ab', 'xa"b'], ['"abc"', '"b"']],
    [{ type: 'string', pattern: '^[a-z]+$', maxLength: 3 }, ['a', 'abc'], ['""', '"abcd"']],
    [{ type: 'array', items: { enum: [1, 2, 3] }, uniqueItems: true }, [[], [2, 1]], ['[1, 1]', '[4]']],
    [
      { type: 'object', properties: { a: { type: 'null' }, b: { type: 'null' } }, minProperties: 1 },
      [{ b: null }],
      ['{}'],
    ],
    [{ properties: { a: { type: 'null' } }, additionalProperties: { type: 'boolean' } }, [{ a: null, ab: true }, { b: false }], ['{"a": true}', '{"b": null}']], // prettier-ignore
    [{ type: 'object', patternProperties: { '^x-': { const: 1 } }, additionalProperties: false }, [{}, { 'x-y': 1 }], ['{"y": 1}']], // prettier-ignore
    [{ type: ['string', 'null'], enum: ['a', null, 4] }, ['a', null], ['4']],
    [{ allOf: [{ minimum: 3 }, { type: 'integer' }, { maximum: 4 }] }, [3, 4], ['2', '5']],
    [{ oneOf: [{ type: 'integer' }, { type: 'string', maxLength: 1 }] }, [5, 'a'], ['null', '"ab"']],
    [{ $ref: '#/$defs/a~1b', $defs: { 'a/b': { const: 'ok' } } }, ['ok'], ['"no"']],
    [{ type: 'string', format: 'date' }, ['2024-12-31'], ['"2024-02-30"', '"2024-13-01"']],
    [{ prefixItems: [{ const: 1 }, { const: 2 }], items: false }, [[1, 2]], ['[1, 2, 3]', '[2]']],
  ];
  for (const [schema, good, bad] of cases) {
    const grammar = compiler.compile(schema);
    for (const value of good)
      assert.ok(takes(grammar, spaced(value)), `${JSON.stringify(schema)} takes ${spaced(value)}`);
    for (const text of bad) assert.ok(!takes(grammar, text), `${JSON.stringify(schema)} does not take ${text}`);
  }
});

function spaced(value: unknown): string {
  return JSON.stringify(value, null, 1).replaceAll(/\n\s*/g, '').replaceAll(',"', ', "');
}

test('what cannot be followed exactly is refused, with the place', () => {
  const cases: [unknown, string][] = [
    [{ type: 'number', multipleOf: 0.1 }, '/multipleOf'],
    [{ type: 'array', items: { type: 'integer' }, uniqueItems: true }, '/uniqueItems'],
    [{ properties: { a: { not: { type: 'null' } } } }, '/properties/a/not'],
    [{ if: { type: 'null' }, then: false }, '/if'],
    [{ type: 'string', pattern: '(?=a)b' }, '/pattern'],
    [{ type: 'string', pattern: '(a)\\1' }, '/pattern'],
    [{ type: 'string', pattern: '\\bfoo' }, '/pattern'],
    [{ type: 'string', pattern: '(' }, '/pattern'],
    [{ type: 'string', pattern: '(ab|c)*d*', maxLength: 7 }, '/pattern'],
    [{ type: 'string', format: 'unheard-of' }, '/format'],
    [{ type: 'string', maxLength: 1e9 }, '/maxLength'],
    [{ type: 'string', minLength: -1 }, '/minLength'],
    [{ type: 'srting' }, '/type'],
    [{ oneOf: [{ type: 'string' }, { type: 'string', maxLength: 3 }] }, '/oneOf/1'],
    [{ $ref: 'https://example.com/a' }, '/$ref'],
    [{ properties: { a: { $ref: '#/$defs/none' } } }, '/properties/a/$ref'],
    [{ type: 'object', additionalProperties: { type: 'null' }, minProperties: 3 }, '/minProperties'],
    [{ type: 'object', minPropertiez: 3 }, '/minPropertiez'],
    [{ type: 'object', properties: { a: { $ref: '#' } }, required: ['a'] }, ''],
    [{ type: 'integer', minimum: 5, maximum: 4 }, ''],
    [false, ''],
    [42, ''],
    [{ $schema: 'http://example.com/mine' }, '/$schema'],
  ];
  for (const [schema, pointer] of cases) {
    assert.throws(
      () => compiler.compile(schema),
      (error) => error instanceof SchemaError && error.pointer === pointer,
      `${JSON.stringify(schema)} is refused at '${pointer}'`,
    );
  }
  let deep: object = { type: 'null' };
  for (let depth = 0; depth < 5000; depth++) deep = { type: 'array', items: deep };
  const startedAt = performance.now();
  assert.throws(() => compiler.compile(deep), SchemaError);
  assert.ok(performance.now() - startedAt < 500);
});

test('regular expressions: the same texts as in JavaScript', () => {
  const patterns = ['a|bc', '(?:ab)*c?', '[^a-c]{2}', '\\d+\\.\\d{1,2}', '[\\w-]+@x', '\\u{1f600}|\\x41', '.a', 'a{0}b', '(?<n>a|b){2,3}', '[\\]\\\\^-]', '\\s\\S', '(|a)b', '[😀-😂]']; // prettier-ignore
  const texts = ['a', 'bc', 'abab', 'ababc', 'zz', 'az', '1.5', '12.345', '9.99', 'a-b@x', '😀', '😁', 'A', 'ba', 'b', 'ab', 'aab', ']', '\\', '^', '-', ' x', '', '\na', 'éé']; // prettier-ignore
  for (const pattern of patterns) {
    const grammar = regexGrammar(pattern);
    for (const text of texts) {
      assert.equal(
        takes(grammar, text),
        new RegExp(`^(?:${pattern})$`, 'u').test(text),
        `${pattern} and ${JSON.stringify(text)}`,
      );
    }
  }
});

test('EBNF and GBNF grammars', () => {
  const grammar = parseEbnf(
    '# sums\nroot ::= term (op term)*\nop ::= [-+] | " and "\nterm ::= "(" root ")" | [0-9]{1,3}\n  | \'x\\u00e9\'\n',
  );
  for (const text of ['1', '12+(3-x\u00e9)', '1 and 2']) assert.ok(takes(grammar, text), text);
  for (const text of ['', '1+', '1234', '(1']) assert.ok(!takes(grammar, text), text);
  const bad = ['', 'root ::= a', 'root = "a"', 'root ::= "a', 'root ::= [a', 'root ::= (a', 'a ::= "b"', 'root ::= "a"\nroot ::= "b"', 'root ::= ${x}', 'root ::= "a" root', 'root ::= "\\q"']; // prettier-ignore
  for (const source of bad) assert.throws(() => parseEbnf(source), SyntaxError, source);
});

test('masks allow exactly the tokens that a byte-by-byte check allows', () => {
  const tree = readTree();
  const schema = {
    type: 'object',
    properties: { a: { type: 'string', maxLength: 9 }, n: { type: 'number', minimum: 0.5 } },
  };
  for (const grammar of [compiler.compile(schema), regexGrammar('[a-fé]{2,}(yes|no)+')]) {
    const compiled = new CompiledGrammar(grammar, tree);
    for (let seed = 0; seed < 6; seed++) {
      const next = randomBelow(seed);
      const matcher = new Matcher(compiled, [STOP]);
      const tokens: number[] = [];
      for (let length = 0; length < 25; length++) {
        const { words } = matcher.mask(Infinity);
        if (words === null) break;
        const allowed: number[] = [];
        for (let id = 0; id < tree.vocabSize; id++) {
          const isAllowed: number = (words[id >> 5]! >>> (id & 31)) & 1;
          if (id !== STOP && seed === 0) {
            assert.equal(isAllowed === 1, compiled.read([...tokens, id]) !== null, `token ${id}`);
          }
          if (isAllowed && id !== STOP) allowed.push(id);
        }
        if (allowed.length === 0) break;
        tokens.push(allowed[next(allowed.length)]!);
        matcher.accept(tokens.slice(-1));
      }
    }
  }
});

test('with as many tokens left as are said to be needed, any way through the masks ends in a complete text', () => {
  const tree = readTree();
  const isAllowed = (words: Int32Array, id: number): boolean => ((words[id >> 5]! >>> (id & 31)) & 1) === 1;
  let [numHeld, numFree] = [0, 0];
  for (let seed = 0; seed < 60; seed++) {
    const next = randomBelow(seed);
    const grammar = compiler.compile(randomSchema(next, seed % 6));
    const compiled = new CompiledGrammar(grammar, tree);
    const shortest = new Matcher(compiled, [STOP]).mask(Infinity).numToEnd;
    assert.ok(shortest > 0 && shortest < 400, `${shortest}`);
    for (const limit of [shortest, shortest + 1, shortest + 9, 2 * shortest]) {
      const matcher = new Matcher(compiled, [STOP]);
      const tokens: number[] = [];
      for (;;) {
        const { words, numToEnd } = matcher.mask(limit - tokens.length);
        const free = matcher.mask(Infinity).words;
        assert.ok(numToEnd <= limit - tokens.length, `${numToEnd} of ${limit - tokens.length}`);
        if (words === null || tokens.length === limit) break;
        const all = Array.from({ length: tree.vocabSize }, (_, id) => id).filter((id) => isAllowed(words, id));
        const id = all[next(all.length)]!;
        if (id === STOP) break;
        if (free!.every((word, index) => word === words[index])) numFree++;
        else numHeld++;
        tokens.push(id);
        matcher.accept([id]);
      }
      assert.equal(compiled.read(tokens)!.accepts, true, `limit ${limit}`);
    }
  }
  assert.ok(numHeld > 500 && numFree > 500, `${numHeld} masks with fewer tokens, ${numFree} as without a limit`);
  const text = regexGrammar('(hello|a{40})!');
  const hello = new Matcher(new CompiledGrammar(text, tree), [STOP]);
  assert.equal(hello.mask(Infinity).mostToEnd, 41);
  const first = (numLeft: number) => {
    const { words } = hello.mask(numLeft);
    return [0x68, 0x61].map((byte) => isAllowed(words!, tree.table.bytes.findIndex((b) => b?.length === 1 && b[0] === byte))); // prettier-ignore
  };
  assert.deepEqual([first(41), first(40), first(6), first(0)], [[true, true], [true, false], [true, false], [true, true]]); // prettier-ignore
});

test('left recursion and endless ambiguity are refused, deep nesting is', () => {
  const tree = readTree();
  for (const source of ['root ::= root "a" | "b"', 'root ::= a "x"\na ::= b?\nb ::= ("" | "c") a "d" | "e"']) {
    assert.throws(
      () => new Matcher(new CompiledGrammar(parseEbnf(source), tree), []).mask(Infinity),
      RangeError,
      source,
    );
  }
  const nested = new Matcher(new CompiledGrammar(parseEbnf('root ::= "[" root "]" | "x"'), tree), []);
  const open = tree.table.bytes.findIndex((bytes) => bytes?.length === 1 && bytes[0] === 0x5b);
  assert.throws(() => nested.accept(Array.from({ length: 5000 }, () => open)), /too deeply nested/);
});

interface Heard {
  masks: MatcherMask[];
  failures: [string, boolean][];
  wake: () => void;
}

function listen(): Heard & {
  onMask(mask: MatcherMask): void;
  onFailed(message: string, isFirst: boolean): void;
} {
  const heard: Heard = { masks: [], failures: [], wake: () => {} };
  return Object.assign(heard, {
    onMask: (mask: MatcherMask) => {
      heard.masks.push(mask);
      heard.wake();
    },
    onFailed: (message: string, isFirst: boolean) => {
      heard.failures.push([message, isFirst]);
      heard.wake();
    },
  });
}

async function until(heard: Heard, isDone: () => boolean): Promise<void> {
  while (!isDone()) await new Promise<void>((resolve) => (heard.wake = resolve));
}

test('a thread that hangs is replaced: the culprit fails in time, the others go on where they were', async () => {
  const entry = new URL('../helpers/hanging-grammar-thread.ts', import.meta.url);
  const thread = new GrammarThread({ tokenizer: '', vocabSize: 64, entry, compileMs: 300, maskMs: 300 });
  const grammar = parseEbnf('root ::= "a"');
  // A thread's timers do not keep the test alive.
  const alive = setInterval(() => {}, 1000);
  try {
    const healthy = listen();
    const handle = thread.open('good', grammar, [], Infinity, healthy);
    await until(healthy, () => healthy.masks.length === 1);
    thread.accept(handle, [5, 6], Infinity);
    await until(healthy, () => healthy.masks.length === 2);

    for (let round = 0; round < 2; round++) {
      const startedAt = performance.now();
      const poison = listen();
      thread.open('hang', grammar, [], Infinity, poison);
      await until(poison, () => poison.failures.length === 1);
      assert.ok(performance.now() - startedAt < 1000);
      assert.deepEqual(poison.failures, [['the grammar could not be prepared within 300 ms', true]]);
    }
    const before = healthy.masks.length;
    thread.accept(handle, [7], Infinity);
    await until(healthy, () => healthy.masks.length > before);
    assert.deepEqual(healthy.failures, []);

    const late = listen();
    const lateHandle = thread.open('late', grammar, [], Infinity, late);
    await until(late, () => late.masks.length === 1);
    thread.accept(lateHandle, [13], Infinity);
    await until(late, () => late.failures.length === 1);
    assert.deepEqual(late.failures, [['the next tokens could not be found within 300 ms', false]]);
  } finally {
    clearInterval(alive);
    await thread.end();
  }
});
