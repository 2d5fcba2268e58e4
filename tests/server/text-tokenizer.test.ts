import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { StartupError } from '../../server/errors.js';
import { PromptEncoder } from '../../server/text/prompt-encoder.js';
import { Tokenizer } from '../../server/text/tokenizer.js';

const POCKET = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));
const GREEDY = new URL('../fixtures/pocket-r1-reference/greedy.jsonl', import.meta.url);
const tokenizer = Tokenizer.read(POCKET);

/** lone halves of surrogate pairs as UTF-8 has them */
function wellFormed(text: string): string {
  return Buffer.from(text).toString();
}

function textOf(ids: readonly number[]): string {
  return new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(ids.map((id) => tokenizer.bytesOf(id))));
}

test('rendered prompts have the reference ids, all 48', async () => {
  const prompts = PromptEncoder.read(POCKET);
  const lines = readFileSync(GREEDY, 'utf8').trim().split('\n');
  assert.equal(lines.length, 48);
  for (const line of lines) {
    const { messages, tools, thinking, prompt_ids: expected, prompt } = JSON.parse(line);
    const { ids, startPhase } = await prompts.encode({ messages, tools: tools ?? null, thinking });
    assert.deepEqual(ids, expected, prompt);
    assert.equal(startPhase, prompt.endsWith('<think>') ? 'reasoning' : 'answer');
  }
  await prompts.close();
});

test('encoding and the byte table are inverse for any text', () => {
  fc.assert(
    fc.property(fc.string({ unit: 'grapheme', maxLength: 60 }), (text) => {
      assert.equal(textOf(tokenizer.encodeText(text)), wellFormed(text));
    }),
    { numRuns: 500 },
  );
});

test('ordinary text never becomes an added token', () => {
  const added = tokenizer.files.tokenizer.added_tokens!;
  const ids = new Set(added.map((token) => token.id));
  const unit = fc.oneof(fc.constantFrom(...added.map((token) => token.content)), fc.string({ maxLength: 4 }));
  fc.assert(
    fc.property(fc.array(unit, { maxLength: 8 }), (parts) => {
      const text = wellFormed(parts.join(''));
      const encoded = tokenizer.encodeText(text);
      assert.ok(!encoded.some((id) => ids.has(id)));
      const mark = '\ufdd0';
      assert.deepEqual(tokenizer.encodeRendered(tokenizer.breakAddedTokens(text, mark), mark), encoded);
    }),
    { numRuns: 500 },
  );
});

test('added tokens written by a template are found between broken ones', () => {
  const mark = '\ufdd0';
  const typed = tokenizer.breakAddedTokens('a</think>b<', mark);
  const ids = tokenizer.encodeRendered(`<think>${typed}</think>`, mark);
  assert.deepEqual(ids, [5, ...tokenizer.encodeText('a</think>b<'), 6]);
  // An ending that what follows would complete.
  const split = tokenizer.breakAddedTokens('<thi', mark) + tokenizer.breakAddedTokens('nk>', mark);
  assert.ok(!tokenizer.encodeRendered(split, mark).includes(5));
});

test('ids beyond the vocabulary have no bytes', () => {
  assert.equal(tokenizer.bytesOf(tokenizer.vocabSize).length, 0);
  assert.equal(tokenizer.bytesOf(-1).length, 0);
});

test('the lower bound of tokens is one', () => {
  const prompts = PromptEncoder.read(POCKET);
  fc.assert(
    fc.property(fc.string({ unit: 'grapheme', maxLength: 200 }), (text) => {
      assert.ok(prompts.minTokensOf(text) <= tokenizer.encodeText(text).length);
    }),
  );
});

test('tokenizers that are not byte-level are refused with a sentence', () => {
  const { tokenizer: json, config } = tokenizer.files;
  const refuse = (change: Record<string, unknown>, expected: RegExp): void => {
    assert.throws(
      () => new Tokenizer({ tokenizer: { ...json, ...change }, config }),
      (error) => error instanceof StartupError && expected.test(error.message),
    );
  };
  refuse({ decoder: { type: 'Metaspace' } }, /decoder is not ByteLevel/);
  refuse({ pre_tokenizer: null }, /pre_tokenizer is not ByteLevel/);
  refuse({ model: { ...json.model, type: 'Unigram' } }, /'Unigram' is not supported/);
  assert.throws(() => Tokenizer.read('/nowhere'), /tokenizer\.json is missing/);
});
