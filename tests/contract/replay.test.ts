import assert from 'node:assert/strict';
import { test } from 'node:test';
import { oneByOne } from './fake-engine.js';
import { DOCUMENT, QUESTION, startHarness, validatorsOf, type Harness } from './harness.js';

const validate = validatorsOf(DOCUMENT)('Replay');

async function replay(harness: Harness, body: object | string, headers: Record<string, string> = {}): Promise<any> {
  const response = await harness.app.inject({
    method: 'POST',
    url: '/v1/replay',
    headers: { 'content-type': 'application/json', ...headers },
    payload: typeof body === 'string' ? body : JSON.stringify(body),
  });
  const answer = response.json();
  if (response.statusCode === 200) assert.ok(validate(answer), JSON.stringify(validate.errors));
  return { status: response.statusCode, ...answer };
}

test('a finished completion is generated again with all that it was asked for', async () => {
  const harness = startHarness();
  const { body } = await harness.chat({ ...QUESTION, n: 2, temperature: 0.7, seed: 9, stop: ['never'] });
  for (const index of [0, 1]) {
    const answer = await replay(harness, { id: body.id, index });
    assert.deepEqual([answer.status, answer.is_identical, answer.difference], [200, true, null]);
    assert.equal(answer.seed, 9 + index);
    const [original, again] = [harness.engine.requests[index]!, harness.engine.requests.at(-1)!];
    assert.deepEqual({ ...again, requestId: '' }, { ...original, requestId: '' });
  }
  const tokens = harness.thought('Let me see.', 'It is 4.');
  assert.equal((await replay(harness, { id: body.id })).num_tokens, tokens.length);
  await harness.close();
});

test('the first token that differs is told, and an end that comes sooner or later', async () => {
  const harness = startHarness();
  const { body } = await harness.chat(QUESTION);
  const said = harness.thought('Let me see.', 'It is 4.');
  const textOf = (id: number): string => harness.prompts.textOf([id]);
  const cases: [typeof said, number, number | null, number | null][] = [
    [said.with(2, { ...said[2]!, id: 77 }), 2, said[2]!.id, 77],
    [said.slice(0, -2), said.length - 2, said.at(-2)!.id, null],
  ];
  for (const [tokens, position, expected, actual] of cases) {
    harness.engine.script = oneByOne(tokens);
    const answer = await replay(harness, { id: body.id });
    const token = (id: number | null) => (id === null ? null : { token_id: id, text: textOf(id) });
    assert.deepEqual(answer.difference, { position, expected: token(expected), actual: token(actual) });
    assert.deepEqual([answer.is_identical, answer.num_tokens], [false, position]);
  }
  await harness.close();
});

test('a request with its seed: against given tokens, or twice', async () => {
  const harness = startHarness();
  const ids = harness.thought('Let me see.', 'It is 4.').map(({ id }) => id);
  const seed = '"seed": 9223372036854775807';
  const given = await replay(
    harness,
    `{"request": ${JSON.stringify(QUESTION)}, "token_ids": [${ids.join()}], ${seed}}`,
  );
  assert.deepEqual([given.is_identical, given.id], [true, null]);
  assert.equal(harness.engine.requests.at(-1)!.sampling.seed, 9223372036854775807n);
  const numBefore = harness.engine.requests.length;
  let isFirst = true;
  harness.engine.script = () => {
    const tokens = harness.thought('Let me see.', isFirst ? 'It is 4.' : 'It is 5.');
    isFirst = false;
    return oneByOne(tokens)(harness.engine.requests[0]!);
  };
  const twice = await replay(harness, { request: { ...QUESTION, stream: true }, seed: 3 });
  assert.equal(twice.is_identical, false);
  const seeds = harness.engine.requests.slice(numBefore).map(({ sampling }) => sampling.seed);
  assert.deepEqual(seeds, [3n, 3n]);
  await harness.close();
});

test('what cannot be replayed is refused', async () => {
  const harness = startHarness({ args: ['--api-key', 'one', '--api-key', 'two'] });
  const one = { authorization: 'Bearer one' };
  const { body } = await harness.chat(QUESTION, one);
  for (const [sent, status, param] of [
    [{}, 400, 'id'],
    [{ id: body.id, request: QUESTION }, 400, 'id'],
    [{ id: body.id, seed: 1 }, 400, 'seed'],
    [{ id: body.id, token_ids: [] }, 400, 'token_ids'],
    [{ id: body.id, index: 1 }, 404, 'id'],
    [{ id: 'chatcmpl-none' }, 404, 'id'],
    [{ request: QUESTION }, 400, 'seed'],
    [{ request: { ...QUESTION, seed: 2 ** 60 } }, 400, 'request.seed'],
    [{ request: { ...QUESTION, n: 2 }, seed: 1 }, 400, 'request.n'],
    [{ request: { ...QUESTION, prompt_logprobs: 1 }, seed: 1 }, 400, 'prompt_logprobs'],
    [{ request: { ...QUESTION, messages: [] }, seed: 1 }, 400, 'request.messages'],
  ] as const) {
    const answer = await replay(harness, sent, one);
    assert.deepEqual([answer.status, answer.error?.param], [status, param], JSON.stringify(sent));
  }
  assert.equal((await replay(harness, { id: body.id }, { authorization: 'Bearer two' })).status, 404);
  await harness.close();
});
